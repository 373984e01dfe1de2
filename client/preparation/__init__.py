"""Records made ready for a contract: checks, cleaning, de-identification, report."""
