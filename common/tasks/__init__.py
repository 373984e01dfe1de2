"""One small class per task: what its head learns, its per-example loss, its public metrics."""
