"""Layers that every family shares. Mathematics in pure functions, parameters in linen modules."""
