"""Both sides on one machine, with data, recipes and comparisons. May import everything."""
