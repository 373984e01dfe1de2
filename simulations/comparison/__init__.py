"""A recipe's methods side by side: run, compared and summarised."""
