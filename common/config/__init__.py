"""Configuration files: value types, and messages about invalid ones."""
