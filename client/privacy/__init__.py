"""What a site's records have spent: keys, accountant, ledger, budget."""
