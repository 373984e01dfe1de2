"""Models: the frozen base, the adapter, and the networks made of both."""
