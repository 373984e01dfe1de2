"""Secure aggregation without a contract and without torch: secret sharing, masks, keys, sums."""
