"""Nested parameters as flat mappings from path to array."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from flax import traverse_util

T = TypeVar("T")
Flat = dict[str, Any]
"""{path: array}; a path joins the names of nested modules with `/`."""


class ParamError(ValueError):
    """Raised for rules, paths or shapes of parameters that do not fit together."""


def flatten(tree: Mapping[str, Any]) -> Flat:
    """Nested dict -> {path: leaf}, for example {"a": {"b": 1}} -> {"a/b": 1}."""
    return traverse_util.flatten_dict(tree, sep="/")


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{path: leaf} -> nested dict, the inverse of `flatten`."""
    return traverse_util.unflatten_dict(dict(flat), sep="/")


def first_match(rules: Sequence[T], path: str, pattern: Callable[[T], str]) -> int | None:
    """Index of the first rule whose regular expression matches the whole path, or None.

    Args:
        pattern: gives the regular expression of a rule.
    """
    for index, rule in enumerate(rules):
        if re.fullmatch(pattern(rule), path):
            return index
    return None
