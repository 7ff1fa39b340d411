"""Turn validation errors into one line per wrong key: file, key, value, what is allowed."""

from __future__ import annotations

import re
from collections.abc import Mapping

from pydantic import ValidationError

from unimoe_jax.config.describe import describe_at, keys_at, nearest, places_of, remedy
from unimoe_jax.config.merge import (
    COMMAND_LINE,
    Key,
    RawSettings,
    dotted,
    is_set,
    leaves,
    show_value,
)
from unimoe_jax.config.run import RunConfig


def _key(error: Mapping, settings: RawSettings) -> Key:
    """The error's path without the union arms that pydantic puts in between."""
    key: Key = ()
    for position, part in enumerate(error["loc"]):
        last = position == len(error["loc"]) - 1
        if is_set(settings, (*key, part)) or (last and error["type"] == "missing"):
            key = (*key, part)
    return key


def problem_lines(error: ValidationError, settings: RawSettings) -> list[str]:
    """One line per key that is wrong."""
    by_key: dict[Key, dict] = {}
    for item in error.errors(include_url=False):
        by_key.setdefault(_key(item, settings), item)
    # A union complains once per arm, some of them deeper: keep the outermost complaint.
    by_key = {k: i for k, i in by_key.items() if not any(k[:n] in by_key for n in range(1, len(k)))}
    missing = {key for key, item in by_key.items() if item["type"] == "missing"}
    lines = []
    for key, item in by_key.items():
        if item["type"] != "extra_forbidden":
            continue
        allowed = keys_at(RunConfig, key[:-1])
        near = nearest(str(key[-1]), allowed)
        missing.discard((*key[:-1], near))  # one misspelt key, one line
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
    if item["type"] != "value_error":
        value = settings.value(key)
        allowed = describe_at(RunConfig, key)
        return (
            f"{settings.origin(key)}: {dotted(key)} = {show_value(value)}: allowed: {allowed}; "
            f"{remedy(RunConfig, key, value)}"
        )
    reason = " ".join(item["msg"].removeprefix("Value error, ").split())
    key = _culprit(key, reason, settings)
    value = settings.value(key)
    shown = "" if isinstance(value, dict | list) else f" = {show_value(value)}"
    named = f" {dotted(key)}{shown}:" if key else ""
    reason = reason.removeprefix(f"{dotted(key)}: ")
    return f"{settings.origin(key)}:{named} {reason}; change one of these settings"


def _culprit(key: Key, reason: str, settings: RawSettings) -> Key:
    """The key below `key` that the sentence of a validator in config.py speaks about."""
    start = re.match(r"([a-z_]+(?:\.\w+)*)(?=:| \()", reason)
    path = tuple(int(p) if p.isdecimal() else p for p in start[1].split(".")) if start else ()
    if path and is_set(settings, key + path):
        key = key + path
    value = settings.value(key)
    named = []
    for name in re.findall(r"'([^']*)'", reason)[:1]:
        for leaf, leaf_value in leaves(value):
            if leaf_value == name:
                named.append(key + leaf)
            elif name in leaf:
                named.append(key + leaf[: leaf.index(name) + 1])
    if not named and isinstance(value, dict):
        words = re.findall(r"[a-z_]+(?:\.[a-z_]+)*", reason)
        paths = [(*key, *word.split(".")) for word in words]
        named = [path for path in paths if is_set(settings, path)]
    # Two settings clash: blame the one that was set last.
    order = [*settings.files, COMMAND_LINE]
    return max(named, key=lambda k: order.index(settings.origin(k)), default=key)
