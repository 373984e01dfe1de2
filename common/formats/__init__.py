"""How single values are written: cells, tags, encodings, JSON."""
