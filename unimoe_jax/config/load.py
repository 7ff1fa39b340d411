"""Read YAML files, includes and `a.b.c=value` overrides into a `RunConfig`, and write it back.

A file may start with `include: [other.yaml, …]` (relative to itself). Included files are merged in
order, mapping into mapping, and the keys of the including file last; lists are replaced. A mapping
in place of a list changes single items, which it names by index or, where items have a `name`
(stages), by that name. Every problem is one line of a `ConfigError`: file, key, value, what is
allowed and what to do.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import yaml
from pydantic import ValidationError

from unimoe_jax.config.describe import help_text, suggestion
from unimoe_jax.config.errors import ConfigError
from unimoe_jax.config.merge import DEFAULT, RawSettings, dotted, is_set, leaves, show_value
from unimoe_jax.config.problems import problem_lines
from unimoe_jax.config.run import RunConfig
from unimoe_jax.config.yaml_dialect import Dumper, parse

# A symbolic link to configs/ in a clone, and a folder of its own in a wheel.
RUN_FILES = Path(str(files("unimoe_jax"))) / "configs" / "run"


def _read(path: str, chain: tuple[str, ...], included_by: str | None) -> Iterator[tuple[str, dict]]:
    """(file, keys that it sets itself) of `path` and of all files that it includes, in merge order.

    chain: the files that include each other down to this one, to find cycles.
    included_by: the file that includes `path`, for messages.
    """
    by = f"{included_by}: include = {show_value(path)}: " if included_by else f"{path}: "
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
        hint = suggestion(Path(path).name, near) or (
            "; includes are relative to the including file" if included_by else "; check the path"
        )
        raise ConfigError(f"{by}cannot be read: {error.strerror}{hint}") from error
    content = parse(text, path)
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise ConfigError(
            f"{path}: holds {show_value(content)}; allowed: a mapping; write key: value lines"
        )
    includes = content.pop("include", [])
    includes = [includes] if isinstance(includes, str) else includes
    if not isinstance(includes, list) or not all(isinstance(i, str) and i for i in includes):
        raise ConfigError(f"{path}: include = {show_value(includes)}: allowed: a list of paths")
    for include in includes:
        nested = os.path.normpath(os.path.join(os.path.dirname(path), include))
        yield from _read(nested, (*chain, identity), path)
    yield path, content


def run_file_names() -> list[str]:
    """Names of the run files that come with the package, as `--config` takes them."""
    return sorted(path.stem for path in RUN_FILES.glob("*.yaml"))


def find_run_file(path: str | os.PathLike) -> str:
    """The file that `--config` names: a path, or a run file that comes with the package.

    A file in the working directory has precedence: `tiny` is the file `tiny` if there is one, else
    configs/run/tiny.yaml of the package.

    Raises:
        ConfigError: a bare name that is neither a file nor a run file of the package.
    """
    text = os.fspath(path)
    is_name = os.sep not in text and not Path(text).suffix
    if not is_name or Path(text).exists():
        return text
    names = run_file_names()
    if text not in names:
        raise ConfigError(
            f"--config {text}: no such file, and no run file of this name comes with the package"
            f"{suggestion(text, names)}; allowed: a path, or one of {', '.join(names)}"
        )
    return str(RUN_FILES / f"{text}.yaml")


@dataclass(frozen=True)
class Resolved:
    """A config and, per dotted leaf key, the file it came from, `default` or `command line`."""

    config: RunConfig
    origins: dict[str, str]


def resolve_config(path: str | os.PathLike, overrides: Sequence[str] = ()) -> Resolved:
    """Like `load_config`, and also records where every value came from.

    path: a run file, or the name of one that comes with the package, see `find_run_file`.
    """
    settings = RawSettings()
    for file, content in _read(find_run_file(path), (), None):
        settings.files.append(file)
        settings.merge(settings.data, content, file)
    for text in overrides:
        settings.override(text)
    try:
        # Strict JSON mode turns lists into tuples, but takes no "1" for a number and neither 1 nor
        # "on" for a boolean.
        config = RunConfig.model_validate_json(_json(settings), strict=True)
    except ValidationError as error:
        raise ConfigError("\n".join(problem_lines(error, settings))) from error
    try:
        run_dir(config)
    except ConfigError as error:
        raise ConfigError(f"{settings.origin(('output',))}: {error}") from error
    origins = {}
    for key, _ in leaves(config.model_dump()):
        origins[dotted(key)] = settings.origin(key) if is_set(settings, key) else DEFAULT
    return Resolved(config, origins)


def load_config(path: str | os.PathLike, overrides: Sequence[str] = ()) -> RunConfig:
    """The run that the file `path` and the overrides describe.

    Raises:
        ConfigError: one line per problem.
    """
    return resolve_config(path, overrides).config


def dump_config(config: RunConfig) -> str:
    """All settings as YAML; `load_config` of the text gives equal settings."""
    return yaml.dump(
        config.model_dump(), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=100
    )


def run_dir(config: RunConfig) -> Path:
    """The run directory: `output` with `{name}` replaced.

    Raises:
        ConfigError: `output` has other braces.
    """
    text = config.output.replace("{name}", config.name)
    if not text or re.search(r"[{}]", text):
        raise ConfigError(
            f"output = {show_value(config.output)}: allowed: a path in which only {{name}} is "
            "replaced; remove the other braces"
        )
    return Path(text).expanduser()


def format_config(config: RunConfig, origins: Mapping[str, str]) -> str:
    """One line per value, `key = value  # origin`; the keys are valid overrides."""
    rows = [
        (f"{dotted(k)} = {show_value(v, limit=None)}", dotted(k))
        for k, v in leaves(config.model_dump())
    ]
    width = min(72, max(len(text) for text, _ in rows))
    return "\n".join(f"{text:<{width}}  # {origins[key]}" for text, key in rows)


def print_config(config: RunConfig, origins: Mapping[str, str]) -> None:
    """Print all settings, one per line, with their origins."""
    print(format_config(config, origins))


def settings_help() -> str:
    """All settings by section, with type, default and description; for `--help`."""
    return help_text(RunConfig)


def _json(settings: RawSettings) -> bytes:
    """The merged settings as JSON, which pydantic validates."""
    try:
        return json.dumps(settings.data, ensure_ascii=False).encode()
    except (ValueError, TypeError, RecursionError) as error:
        raise ConfigError(
            f"{settings.files[-1]}: {error}; allowed: text, numbers, true, false, null, lists, "
            "mappings, and no anchor that contains itself"
        ) from error
