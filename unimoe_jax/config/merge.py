"""Merge included files and overrides, and remember which file set which key."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from unimoe_jax.config.describe import suggestion
from unimoe_jax.config.errors import ConfigError
from unimoe_jax.config.yaml_dialect import parse

COMMAND_LINE = "command line"
DEFAULT = "default"
Key = tuple[str | int, ...]


@dataclass
class RawSettings:
    """The merged raw tree, and for every path that was set as a whole the file that set it.

    files: all files in merge order; the last one is the file given to `load_config`.
    """

    data: dict = field(default_factory=dict)
    origins: dict[Key, str] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)

    def put(self, container: Any, key: str | int, path: Key, value, origin: str) -> None:
        """Set `container[key]`, which is at `path`, and forget the origins of the old value."""
        container[key] = copy.deepcopy(value)
        self.origins = {p: o for p, o in self.origins.items() if p[: len(path)] != path}
        self.origins[path] = origin

    def merge(self, into: Any, new: Mapping, origin: str, path: Key = ()) -> None:
        """Merge `new` deeply into `into`, the mapping or list at `path`."""
        for name, value in new.items():
            key = raw_item(into, name, path, origin)
            here = (*path, key)
            known = isinstance(into, list) or key in into
            old = _entry(into, key) if known else None
            if isinstance(value, dict) and isinstance(old, dict | list):
                self.merge(old, value, origin, here)
            else:
                self.put(into, key, here, value, origin)

    def override(self, text: str) -> None:
        """Apply one override `a.b.c=value`; the value replaces the old one."""
        name, equals, value = text.partition("=")
        parts = name.strip().split(".")
        if not equals or not all(parts):
            raise ConfigError(
                f"{COMMAND_LINE}: {text!r} is not an override; write key.subkey=value"
            )
        parsed = parse(value, f"{COMMAND_LINE}: {text!r} (quote the value if it is text)")
        container: Any = self.data
        path: Key = ()
        for part in parts[:-1]:
            key = raw_item(container, part, path, COMMAND_LINE)
            path = (*path, key)
            if isinstance(container, dict) and container.get(key) is None:
                self.put(container, key, path, {}, COMMAND_LINE)
            container = _entry(container, key)
            if not isinstance(container, dict | list):
                raise ConfigError(
                    f"{COMMAND_LINE}: {text!r}: {dotted(path)} = {show_value(container)} is a "
                    f"single value and has no key {parts[len(path)]!r}; set {dotted(path)} itself"
                )
        key = raw_item(container, parts[-1], path, COMMAND_LINE)
        self.put(container, key, (*path, key), parsed, COMMAND_LINE)

    def origin(self, path: Key) -> str:
        """The file that set `path`, or `command line`.

        It is recorded for the longest part of the path that was set as a whole; without a record
        it is the file given to `load_config`.
        """
        for length in range(len(path), 0, -1):
            if path[:length] in self.origins:
                return self.origins[path[:length]]
        return self.files[-1]

    def value(self, path: Key) -> Any:
        """The value at `path`. Raises KeyError or IndexError if there is none."""
        value: Any = self.data
        for key in path:
            value = value[key]
        return value


def _entry(container: Any, key: str | int) -> Any:
    """`container[key]` of a mapping or a list."""
    return container[key]


def raw_item(container: Any, name: str, path: Key, origin: str) -> str | int:
    """The key that `name` stands for: in a list the index, or the index of the item with that
    `name`; in a mapping the name itself."""
    if not isinstance(container, list):
        return name
    if name.isdecimal() and int(name) < len(container):
        return int(name)
    names = [item.get("name") for item in container if isinstance(item, dict)]
    if name in names:
        return next(
            i
            for i, item in enumerate(container)
            if isinstance(item, dict) and item.get("name") == name
        )
    indices = f"0..{len(container) - 1}" if container else "no index, the list is empty"
    named = [n for n in names if isinstance(n, str)]
    raise ConfigError(
        f"{origin}: {dotted((*path, name))}: the list {dotted(path)} has no item {name!r}; "
        f"allowed: {', '.join([indices, *named])}{suggestion(name, named)}"
    )


def dotted(key: Iterable[str | int]) -> str:
    """("stages", 0, "name") -> `stages.0.name`."""
    return ".".join(str(part) for part in key)


def leaves(value, key: Key = ()) -> Iterator[tuple[Key, Any]]:
    """(path, value) of everything in `value` that is not a non-empty mapping or list."""
    if isinstance(value, Mapping) and value:
        for name, child in value.items():
            yield from leaves(child, (*key, name))
    elif isinstance(value, list | tuple) and value:
        for index, child in enumerate(value):
            yield from leaves(child, (*key, index))
    else:
        yield key, value


def is_set(settings: RawSettings, key: Key) -> bool:
    """Whether some file or override has set `key`."""
    value: Any = settings.data
    for part in key:
        if isinstance(value, list):
            inside = isinstance(part, int) and part < len(value)
        else:
            inside = isinstance(value, dict) and part in value
        if not inside:
            return False
        value = _entry(value, part)
    return True


def show_value(value, limit: int | None = 80) -> str:
    """A value as JSON for messages, cut to `limit` characters."""
    text = json.dumps(value, ensure_ascii=False)
    return text if limit is None or len(text) <= limit else text[: limit - 1] + "…"
