"""The error that tells a user what is wrong with a request, a setting or a model."""

from __future__ import annotations


class GenerationError(ValueError):
    """One line: what is wrong, with names and numbers, and what to do."""
