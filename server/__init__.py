"""The operator: rounds, adapters and reports. Imports only itself and common."""
