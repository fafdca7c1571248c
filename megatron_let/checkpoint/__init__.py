"""All that reads, writes, chooses, sums and removes checkpoints."""
