"""The YAML dialect of config files: YAML 1.2 scalars, no duplicate keys, one-line errors."""

from __future__ import annotations

import re
from typing import Any

import yaml

from unimoe_jax.config.errors import ConfigError


class Loader(yaml.SafeLoader):
    """YAML 1.2 scalars: 1e-4 is a number, only true/false are booleans, 010 is ten."""

    yaml_implicit_resolvers: dict = {}

    def construct_mapping(self, node, deep=False):
        """A mapping whose keys are text, each of them once."""
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(
                    problem="a key must be plain text", problem_mark=key.start_mark
                )
            line = key.start_mark.line + 1
            if key.value in lines:
                raise yaml.constructor.ConstructorError(
                    problem=f"key `{key.value}` is already set on line {lines[key.value]}; "
                    "remove one of the two",
                    problem_mark=key.start_mark,
                )
            lines[key.value] = line
        # Insert the keys of `<<: *anchor` in front, so that the keys of the mapping itself win.
        self.flatten_mapping(node)
        return {key.value: self.construct_object(value, deep) for key, value in node.value}

    def construct_int(self, node):
        """Decimal, 0x and 0o integers; a leading zero is no octal sign."""
        text = node.value.replace("_", "")
        return int(text, 0) if text.lstrip("+-")[:2].lower() in ("0x", "0o") else int(text)


class Dumper(yaml.SafeDumper):
    """Quotes exactly the strings that `Loader` would not read as strings."""

    yaml_implicit_resolvers: dict = {}

    def ignore_aliases(self, data):
        """Write repeated values out instead of as anchors."""
        return True


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9][0-9_]*|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    ("merge", r"<<", ["<"]),
):
    for _class in (Loader, Dumper):
        _class.add_implicit_resolver(
            f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), _first
        )
Loader.add_constructor("tag:yaml.org,2002:int", Loader.construct_int)
Dumper.add_representer(tuple, Dumper.represent_list)


def parse(text: str, where: str) -> Any:
    """The YAML value of `text`; a ConfigError naming `where`, line and column otherwise."""
    try:
        # Loader derives from SafeLoader, which builds plain values only and runs no code.
        return yaml.load(text, Loader=Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        problem = " ".join(str(error.problem or error.context).split())
        raise ConfigError(f"{where}: {place}not valid YAML: {problem}") from error
    except (yaml.YAMLError, ValueError) as error:
        problem = " ".join(str(error).split())
        raise ConfigError(f"{where}: not valid YAML: {problem}; correct the text") from error
    except RecursionError as error:
        raise ConfigError(f"{where}: nested too deeply; flatten it") from error
