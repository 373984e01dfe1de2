"""The rounds of a run, without a network."""
