"""Experts between checkpoints: dense layers become experts, and experts become dense layers.

Imports config, params, nn, checkpoints, convert and runtime.

opening    a checkpoint -> its layer parts, every adapter merged, read one slice at a time
making     the content of a new checkpoint: upcycle and assemble, split, prune
writing    that content -> a checkpoint on disk, with a manifest of parents and hashes
listing    where a checkpoint has experts, how large they are, and what they were made from
__main__   the commands upcycle, assemble, split, prune and list
"""
