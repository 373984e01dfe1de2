"""The commands that belong to no side."""
