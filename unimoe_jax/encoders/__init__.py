"""Encoders: raw media features in, a sequence of states out."""
