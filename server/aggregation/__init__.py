"""Arrays in, arrays out: means, robust rules, LoRA's products, the server's optimizer."""
