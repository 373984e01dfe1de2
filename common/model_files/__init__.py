"""The files of a base model: where they are, their hash, their bytes."""
