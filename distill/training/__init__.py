"""The training loop that every method shares: optimizer phases, checkpoints, logs, samples."""
