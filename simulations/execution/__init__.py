"""One method of a recipe, run: workers, roster keys, threads, Flower's engine."""
