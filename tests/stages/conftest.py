"""Fixtures of small data sets that the tests of tests/data share with those of stages."""

from tests.data.conftest import folder, tokenizer

__all__ = ["folder", "tokenizer"]
