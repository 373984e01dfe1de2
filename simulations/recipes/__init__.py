"""The shipped recipes: one contract (TOML) and one loader for each system of the field."""
