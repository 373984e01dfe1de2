"""Methods by epsilon by partition by seed: a grid of runs, and its page."""
