"""Nested parameters as flat mappings from path to array."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from flax import traverse_util

T = TypeVar("T")
Flat = dict[str, Any]


class ParamError(ValueError):
    """Rules, paths or shapes of parameters that do not fit together."""


def flatten(tree: Mapping[str, Any]) -> Flat:
    """Nested dict -> {path: leaf}."""
    return traverse_util.flatten_dict(tree, sep="/")


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{path: leaf} -> nested dict."""
    return traverse_util.unflatten_dict(dict(flat), sep="/")


def first_match(rules: Sequence[T], path: str, pattern: Callable[[T], str]) -> int | None:
    """Index of the first rule whose pattern matches the whole path."""
    for index, rule in enumerate(rules):
        if re.fullmatch(pattern(rule), path):
            return index
    return None
