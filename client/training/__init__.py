"""One round at a site: private steps from the server's adapter."""
