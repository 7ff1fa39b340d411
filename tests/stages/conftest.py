"""Fixtures of small data sets, shared with tests/data."""

from tests.data.conftest import folder, tokenizer

__all__ = ["folder", "tokenizer"]
