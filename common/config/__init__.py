"""Configuration files: value types, and what is said of a wrong one."""
