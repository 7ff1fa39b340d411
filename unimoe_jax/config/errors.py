"""The error that every refused setting raises."""

from __future__ import annotations


class ConfigError(ValueError):
    """One line per problem, each naming the file, the key, the value and the remedy."""
