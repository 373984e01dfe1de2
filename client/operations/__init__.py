"""What keeps a site running: checks before a start, supervision, metrics."""
