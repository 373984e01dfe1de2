"""Public data and models by name, tables, and their division among sites."""
