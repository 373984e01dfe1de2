"""The contract: the one TOML file on which a federation runs. Imports no torch."""
