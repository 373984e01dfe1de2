"""What keeps a server running: certificates, folder, processes, metrics."""
