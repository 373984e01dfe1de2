"""Costs, measured beside a limit or a peer; each writes results/NAME.json."""
