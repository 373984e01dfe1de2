"""The relay: a Flower ClientApp that passes bytes to the worker. Never imports torch."""
