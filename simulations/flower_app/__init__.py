"""A Flower app that `flwr run` starts: a recipe in a local simulation, with sites on disk."""
