"""The server's side of Flower: strategy, ServerApp and the app that is submitted."""
