"""What a site's records have spent: keys, fingerprints, accountant, ledger, budget."""
