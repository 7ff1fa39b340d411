"""Connectors: encoder states in, soft tokens of the decoder's width out."""
