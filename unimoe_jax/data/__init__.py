"""Records to batches. Knows numpy and grain, neither jax nor the models."""
