"""Checkpoints of the PyTorch originals in and out. `python -m unimoe_jax.convert --help`."""
