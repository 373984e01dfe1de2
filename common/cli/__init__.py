"""Commands shared by sites and server."""
