"""Malicious sites in simulations."""
