"""Records: files and databases read into compact rows, and rows turned into features."""
