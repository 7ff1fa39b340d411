"""`python -m unimoe_jax.evaluate`: score what a stage left behind. Imports stages, checkpoints.

__main__      the command line: held-out exact match of a finished run
exact_match   the score of one pass over held-out batches
controls      chance levels, and data in which every question has the media of another record
"""
