"""Experts between checkpoints, see `python -m unimoe_jax.experts --help`."""
