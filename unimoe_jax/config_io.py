"""YAML files, includes and `a.b.c=value` overrides -> `RunConfig`, and back.

A file may start with `include: [other.yaml, …]` (relative to itself). Included files are merged in
order, mapping into mapping, the file's own keys last; lists are replaced. A mapping over a list
changes single items, named by index or, where items have a `name` (stages), by that name.
Every problem is one line of a `ConfigError`: file, key, value, what is allowed, what to do.
"""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from unimoe_jax import config_schema as schema
from unimoe_jax.config import RunConfig
from unimoe_jax.config_yaml import ConfigError, Dumper, parse

COMMAND_LINE = "command line"
DEFAULT = "default"
Key = tuple[str | int, ...]


# --------------------------------------------------------------------------- files and merging


@dataclass
class _Settings:
    """The merged raw tree and, for every path that was set as a whole, who set it."""

    data: dict = field(default_factory=dict)
    origins: dict[Key, str] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)

    def put(self, container, key: str | int, path: Key, value, origin: str) -> None:
        """Sets `container[key]`, found at `path`, and forgets who set what was there."""
        container[key] = copy.deepcopy(value)
        self.origins = {p: o for p, o in self.origins.items() if p[: len(path)] != path}
        self.origins[path] = origin

    def merge(self, into, new: Mapping, origin: str, path: Key = ()) -> None:
        """Deep merge of `new` into the mapping or list `into`, which lies at `path`."""
        for name, value in new.items():
            key = _item(into, name, path, origin)
            here = (*path, key)
            known = isinstance(into, list) or key in into
            if isinstance(value, dict) and known and isinstance(into[key], dict | list):
                self.merge(into[key], value, origin, here)
            else:
                self.put(into, key, here, value, origin)

    def override(self, text: str) -> None:
        """Applies one `a.b.c=value`; the value replaces what was there."""
        name, equals, value = text.partition("=")
        parts = name.strip().split(".")
        if not equals or not all(parts):
            raise ConfigError(
                f"{COMMAND_LINE}: {text!r} is not an override; write key.subkey=value"
            )
        parsed = parse(value, f"{COMMAND_LINE}: {text!r} (quote the value if it is text)")
        container, path = self.data, ()
        for part in parts[:-1]:
            key = _item(container, part, path, COMMAND_LINE)
            path = (*path, key)
            if isinstance(container, dict) and container.get(key) is None:
                self.put(container, key, path, {}, COMMAND_LINE)
            container = container[key]
            if not isinstance(container, dict | list):
                raise ConfigError(
                    f"{COMMAND_LINE}: {text!r}: {dotted(path)} = {_show(container)} is a single "
                    f"value and has no key {parts[len(path)]!r}; set {dotted(path)} itself"
                )
        key = _item(container, parts[-1], path, COMMAND_LINE)
        self.put(container, key, (*path, key), parsed, COMMAND_LINE)

    def origin(self, path: Key) -> str:
        """Who set `path`: the longest recorded prefix, else the file given to `load`."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.origins:
                return self.origins[path[:length]]
        return self.files[-1]

    def value(self, path: Key) -> Any:
        value: Any = self.data
        for key in path:
            value = value[key]
        return value


def _item(container, name: str, path: Key, origin: str) -> str | int:
    """The key of `name`: itself in a mapping; in a list an index or an item's `name`."""
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
        f"allowed: {', '.join([indices, *named])}{schema.suggestion(name, named)}"
    )


def _read(path: str, chain: tuple[str, ...], included_by: str | None) -> Iterator[tuple[str, dict]]:
    """(file, its own keys) of `path` and all it includes, in merge order."""
    by = f"{included_by}: include = {_show(path)}: " if included_by else f"{path}: "
    identity = os.path.realpath(path)
    if identity in chain:
        cycle = " -> ".join(os.path.relpath(f) for f in (*chain[chain.index(identity) :], identity))
        raise ConfigError(f"{by}include cycle {cycle}; remove one of these includes")
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{by}not UTF-8 text ({error.reason}); give a YAML file") from error
    except OSError as error:
        folder = Path(path).parent
        near = [p.name for p in folder.glob("*.y*ml")] if folder.is_dir() else []
        hint = schema.suggestion(Path(path).name, near) or (
            "; includes are relative to the including file" if included_by else "; check the path"
        )
        raise ConfigError(f"{by}cannot be read: {error.strerror}{hint}") from error
    content = parse(text, path)
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise ConfigError(
            f"{path}: holds {_show(content)}; allowed: a mapping; write key: value lines"
        )
    includes = content.pop("include", [])
    includes = [includes] if isinstance(includes, str) else includes
    if not isinstance(includes, list) or not all(isinstance(i, str) and i for i in includes):
        raise ConfigError(f"{path}: include = {_show(includes)}: allowed: a list of paths")
    for include in includes:
        nested = os.path.normpath(os.path.join(os.path.dirname(path), include))
        yield from _read(nested, (*chain, identity), path)
    yield path, content


# ------------------------------------------------------------------------------------ public


@dataclass(frozen=True)
class Resolved:
    """A config and, per dotted leaf key, the file it came from, `default` or `command line`."""

    config: RunConfig
    origins: dict[str, str]


def resolve(path: str | os.PathLike, overrides: Sequence[str] = ()) -> Resolved:
    """Like `load`, but also says where every value came from."""
    settings = _Settings()
    for file, content in _read(os.fspath(path), (), None):
        settings.files.append(file)
        settings.merge(settings.data, content, file)
    for text in overrides:
        settings.override(text)
    try:
        # Strict JSON mode: lists become tuples, but "1" is no number, 1 and "on" are no booleans.
        config = RunConfig.model_validate_json(_json(settings), strict=True)
    except ValidationError as error:
        raise ConfigError("\n".join(_problems(error, settings))) from error
    try:
        run_dir(config)
    except ConfigError as error:
        raise ConfigError(f"{settings.origin(('output',))}: {error}") from error
    origins = {}
    for key, _ in leaves(config.model_dump()):
        origins[dotted(key)] = settings.origin(key) if _is_set(settings, key) else DEFAULT
    return Resolved(config, origins)


def load(path: str | os.PathLike, overrides: Sequence[str] = ()) -> RunConfig:
    """The run that `path` and `overrides` describe. Raises ConfigError, one line per problem."""
    return resolve(path, overrides).config


def dump(config: RunConfig) -> str:
    """The fully resolved YAML; `load` of it gives an equal config."""
    return yaml.dump(
        config.model_dump(), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=100
    )


def run_dir(config: RunConfig) -> Path:
    """The run's directory: `output` with `{name}` expanded. ConfigError for other braces."""
    text = config.output.replace("{name}", config.name)
    if not text or re.search(r"[{}]", text):
        raise ConfigError(
            f"output = {_show(config.output)}: allowed: a path in which only {{name}} is replaced; "
            "remove the other braces"
        )
    return Path(text).expanduser()


def format_config(config: RunConfig, origins: Mapping[str, str]) -> str:
    """One line per value, `key = value  # origin`; the keys are valid overrides."""
    rows = [
        (f"{dotted(k)} = {_show(v, limit=None)}", dotted(k)) for k, v in leaves(config.model_dump())
    ]
    width = min(72, max(len(text) for text, _ in rows))
    return "\n".join(f"{text:<{width}}  # {origins[key]}" for text, key in rows)


def print_config(config: RunConfig, origins: Mapping[str, str]) -> None:
    """Prints `format_config`."""
    print(format_config(config, origins))


def help_text() -> str:
    """All settings by section, with type, default and description; for `--help`."""
    return schema.help_text(RunConfig)


def dotted(key: Iterable[str | int]) -> str:
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


# ------------------------------------------------------------------------------------ errors


def _json(settings: _Settings) -> bytes:
    try:
        return json.dumps(settings.data, ensure_ascii=False).encode()
    except (ValueError, TypeError, RecursionError) as error:
        raise ConfigError(
            f"{settings.files[-1]}: {error}; allowed: text, numbers, true, false, null, lists, "
            "mappings, and no anchor that contains itself"
        ) from error


def _is_set(settings: _Settings, key: Key) -> bool:
    value: Any = settings.data
    for part in key:
        if isinstance(value, list):
            inside = isinstance(part, int) and part < len(value)
        else:
            inside = isinstance(value, dict) and part in value
        if not inside:
            return False
        value = value[part]
    return True


def _show(value, limit: int | None = 80) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if limit is None or len(text) <= limit else text[: limit - 1] + "…"


def _key(error: Mapping, settings: _Settings) -> Key:
    """The error's path without the union arms that pydantic puts in between."""
    key: Key = ()
    for position, part in enumerate(error["loc"]):
        last = position == len(error["loc"]) - 1
        if _is_set(settings, (*key, part)) or (last and error["type"] == "missing"):
            key = (*key, part)
    return key


def _problems(error: ValidationError, settings: _Settings) -> list[str]:
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
        allowed = schema.keys_at(RunConfig, key[:-1])
        near = schema.nearest(str(key[-1]), allowed)
        missing.discard((*key[:-1], near))  # one misspelt key, one line
        elsewhere = [] if near else schema.places_of(RunConfig, str(key[-1]))
        hint = f"did you mean {near!r}?" if near else "remove it."
        if elsewhere:
            hint = f"did you mean {' or '.join(elsewhere[:3])}?"
        lines.append(
            f"{settings.origin(key)}: {dotted(key)} = {_show(settings.value(key))}: unknown key; "
            f"{hint} Allowed here: {', '.join(allowed)}"
        )
    for key, item in by_key.items():
        if item["type"] == "missing" and key in missing:
            lines.append(
                f"{settings.origin(key)}: {dotted(key)} is not set and has no default; "
                f"allowed: {schema.describe_at(RunConfig, key)}; add it"
            )
        elif item["type"] not in ("missing", "extra_forbidden"):
            lines.append(_wrong_value(key, item, settings))
    return lines


def _wrong_value(key: Key, item: Mapping, settings: _Settings) -> str:
    if item["type"] != "value_error":
        value = settings.value(key)
        allowed = schema.describe_at(RunConfig, key)
        return (
            f"{settings.origin(key)}: {dotted(key)} = {_show(value)}: allowed: {allowed}; "
            f"{schema.remedy(RunConfig, key, value)}"
        )
    reason = " ".join(item["msg"].removeprefix("Value error, ").split())
    key = _culprit(key, reason, settings)
    value = settings.value(key)
    shown = "" if isinstance(value, dict | list) else f" = {_show(value)}"
    named = f" {dotted(key)}{shown}:" if key else ""
    reason = reason.removeprefix(f"{dotted(key)}: ")
    return f"{settings.origin(key)}:{named} {reason}; change one of these settings"


def _culprit(key: Key, reason: str, settings: _Settings) -> Key:
    """The key below `key` that the sentence of a validator in config.py speaks about."""
    start = re.match(r"([a-z_]+(?:\.\w+)*)(?=:| \()", reason)
    path = tuple(int(p) if p.isdecimal() else p for p in start[1].split(".")) if start else ()
    if path and _is_set(settings, key + path):
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
        named = [path for path in paths if _is_set(settings, path)]
    # Two settings clash: blame the one that was set last.
    order = [*settings.files, COMMAND_LINE]
    return max(named, key=lambda k: order.index(settings.origin(k)), default=key)
