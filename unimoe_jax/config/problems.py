"""Turn validation errors into one line per wrong key: file, key, value and what is allowed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from unimoe_jax.config.base import INVALID
from unimoe_jax.config.describe import describe_at, keys_at, nearest, places_of, remedy
from unimoe_jax.config.merge import (
    COMMAND_LINE,
    Key,
    RawSettings,
    dotted,
    is_set,
    show_value,
)
from unimoe_jax.config.run import RunConfig


def _key(error: Mapping, settings: RawSettings) -> Key:
    """The key of an error.

    pydantic puts the names of union members between the keys. They are left out, and so is
    everything that the user has not set, except a last key that is missing.
    """
    key: Key = ()
    for position, part in enumerate(error["loc"]):
        last = position == len(error["loc"]) - 1
        if is_set(settings, (*key, part)) or (last and error["type"] == "missing"):
            key = (*key, part)
    return key


def problem_lines(error: ValidationError, settings: RawSettings) -> list[str]:
    """One line per wrong key."""
    by_key: dict[Key, Mapping[str, Any]] = {}
    for item in error.errors(include_url=False):
        by_key.setdefault(_key(item, settings), item)
    # A union reports one error per member, some of them deeper: keep the outermost one.
    by_key = {k: i for k, i in by_key.items() if not any(k[:n] in by_key for n in range(1, len(k)))}
    missing = {key for key, item in by_key.items() if item["type"] == "missing"}
    lines = []
    for key, item in by_key.items():
        if item["type"] != "extra_forbidden":
            continue
        allowed = keys_at(RunConfig, key[:-1])
        near = nearest(str(key[-1]), allowed)
        missing.discard((*key[:-1], near))  # A misspelt key is not reported as missing as well.
        elsewhere = [] if near else places_of(RunConfig, str(key[-1]))
        hint = f"did you mean {near!r}?" if near else "remove it."
        if elsewhere:
            hint = f"did you mean {' or '.join(elsewhere[:3])}?"
        lines.append(
            f"{settings.origin(key)}: {dotted(key)} = {show_value(settings.value(key))}: unknown "
            f"key; {hint} Allowed here: {', '.join(allowed)}"
        )
    for key, item in by_key.items():
        if item["type"] == "missing" and key in missing:
            lines.append(
                f"{settings.origin(key)}: {dotted(key)} is not set and has no default; "
                f"allowed: {describe_at(RunConfig, key)}; add it"
            )
        elif item["type"] not in ("missing", "extra_forbidden"):
            lines.append(_wrong_value(key, item, settings))
    return lines


def _wrong_value(key: Key, item: Mapping, settings: RawSettings) -> str:
    """One line about a value of the wrong kind, or about values that do not fit each other."""
    if item["type"] not in (INVALID, "value_error"):
        value = settings.value(key)
        allowed = describe_at(RunConfig, key)
        return (
            f"{settings.origin(key)}: {dotted(key)} = {show_value(value)}: allowed: {allowed}; "
            f"{remedy(RunConfig, key, value)}"
        )
    reason = " ".join(item["msg"].removeprefix("Value error, ").split())
    if item["type"] == INVALID:
        key = _set_last(key, item["ctx"]["keys"], settings)
    value = settings.value(key)
    shown = "" if isinstance(value, dict | list) else f" = {show_value(value)}"
    setting = f" {dotted(key)}{shown}:" if key else ""
    return f"{settings.origin(key)}:{setting} {reason}; change one of these settings"


def _set_last(section: Key, keys: list[list[str | int]], settings: RawSettings) -> Key:
    """The key that was set last of those that contradict each other, or the section itself if all
    of them have their defaults."""
    candidates = [(*section, *key) for key in keys]
    candidates = [key for key in candidates if is_set(settings, key)]
    order = [*settings.files, COMMAND_LINE]
    return max(candidates, key=lambda key: order.index(settings.origin(key)), default=section)


def first_problem(error: ValidationError) -> str:
    """The first problem as one line: the dotted key, if there is one, and pydantic's message.

    For settings that no YAML file of the user holds, so that no origin can be named; `load` lists
    every problem of a run file with `problem_lines` instead. Example: "decoder.num_heads: Input
    should be greater than 0".
    """
    problem = error.errors(include_url=False)[0]
    key = ".".join(map(str, problem["loc"]))
    message = problem["msg"].removeprefix("Value error, ")
    return f"{key}: {message}" if key else message
