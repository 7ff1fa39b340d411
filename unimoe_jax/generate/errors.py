"""The error of a request, a setting or a model that cannot be used."""

from __future__ import annotations


class GenerationError(ValueError):
    """One line for the user: what is wrong, with names and numbers, and what to do."""
