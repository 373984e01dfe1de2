"""What is done with a trained adapter: labels over time, drift, retrieval."""
