"""Describe in words what the settings classes allow, for error messages and `--help`."""

from __future__ import annotations

import difflib
import json
import math
import textwrap
import types
import typing
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal, Union

from pydantic import BaseModel
from pydantic.fields import FieldInfo

Key = tuple[str | int, ...]


# ----------------------------------------------------------------------------------- in words


def describe(annotation: Any) -> str:
    """Describe the values that a type allows, e.g. `integer > 0 or null`."""
    bounds: list[Any] = []
    while typing.get_origin(annotation) is Annotated:
        annotation, *extra = typing.get_args(annotation)
        bounds += extra
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join(describe(arm) for arm in arguments)
    if origin is Literal:
        return " | ".join(str(choice) for choice in arguments)
    if origin is tuple:
        return f"list of {describe(arguments[0])}"
    if origin is dict:
        limits = _bounds(bounds)
        return f"mapping of name to {describe(arguments[1])}" + (f",{limits}" if limits else "")
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"mapping ({annotation.__name__})"
    words = {bool: "true or false", int: "integer", float: "number", str: "text"}
    words[type(None)] = "null"
    return words.get(annotation, str(annotation)) + _bounds(bounds)


def _bounds(extra: Iterable[Any]) -> str:
    """The limits in the metadata of a type, in words with a space in front; or nothing."""
    limits: dict[str, Any] = {}
    for item in extra:
        for part in item.metadata if isinstance(item, FieldInfo) else [item]:
            names = ("gt", "ge", "lt", "le", "pattern", "min_length")
            limits |= {n: getattr(part, n) for n in names if getattr(part, n, None) is not None}
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    given = {sign: limits[name] for name, sign in signs.items() if name in limits}
    words = [f"{sign} {n if isinstance(n, int) else f'{n:g}'}" for sign, n in given.items()]
    if "pattern" in limits:
        words.append(f"matching {limits['pattern']}")
    if "min_length" in limits:
        words.append("not empty")
    return f" {' and '.join(words)}" if words else ""


# ------------------------------------------------------------------------------------- lookups


def _arms(annotation: Any) -> Iterator[Any]:
    """The types a value may have, without Annotated and unions."""
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        yield from _arms(typing.get_args(annotation)[0])
    elif origin in (Union, types.UnionType):
        for arm in typing.get_args(annotation):
            yield from _arms(arm)
    else:
        yield annotation


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _child(annotation: Any, key: str | int) -> Any:
    """The annotation of the setting `key` in a section, list or mapping."""
    for arm in _arms(annotation):
        origin, arguments = typing.get_origin(arm), typing.get_args(arm)
        if _is_section(arm) and key in arm.model_fields:
            return arm.model_fields[key].rebuild_annotation()
        if origin is tuple and isinstance(key, int):
            return arguments[0]
        if origin is dict:
            return arguments[1]
    raise KeyError(key)


def type_at(root: type[BaseModel], key: Key) -> Any:
    """The annotation at a path below `root`. Raises KeyError if there is no such setting."""
    annotation: Any = root
    for part in key:
        annotation = _child(annotation, part)
    return annotation


def describe_at(root: type[BaseModel], key: Key) -> str:
    """`describe` of the setting at `key`."""
    return describe(type_at(root, key))


def keys_at(root: type[BaseModel], key: Key) -> list[str]:
    """The field names of the section at `key`."""
    return [n for arm in _arms(type_at(root, key)) if _is_section(arm) for n in arm.model_fields]


def nearest(name: str, allowed: Iterable[str]) -> str | None:
    """The allowed name that `name` is probably meant to be.

    Initials count as well: `lr` is near `learning_rate`.
    """
    allowed = list(allowed)
    close = difflib.get_close_matches(name, allowed, n=1)
    initials = [a for a in allowed if "".join(word[:1] for word in a.split("_")) == name]
    return next(iter(close + initials), None)


def suggestion(name: str, allowed: Iterable[str]) -> str:
    """`; did you mean …?` to append to a message, or nothing."""
    near = nearest(name, allowed)
    return f"; did you mean {near!r}?" if near else ""


def _choices(arms: Iterable[Any]) -> list[str]:
    return [str(c) for arm in arms if typing.get_origin(arm) is Literal for c in arm.__args__]


def _meant(value: Any, choices: list[str]) -> str | None:
    """A question that names the choice nearest to `value`, if one is near."""
    near = nearest(value, choices) if isinstance(value, str) else None
    return near and f"did you mean {near!r}?"


def remedy(root: type[BaseModel], key: Key, value: Any) -> str:
    """Advice about a value of the wrong kind."""
    arms = list(_arms(type_at(root, key)))
    lists = [arm.__args__[0] for arm in arms if typing.get_origin(arm) is tuple]
    items = _choices(item for listed in lists for item in _arms(listed))
    if value in items:
        return f"write [{value}]"
    if items and isinstance(value, list):
        wrong = next((item for item in value if item not in items), None)
        return _meant(wrong, items) or f"choose from {', '.join(items)}"
    if near := _meant(value, _choices(arms)):
        return near
    if isinstance(value, str) and {int, float} & set(arms):
        return "write a number, without quotes"
    if isinstance(value, float) and not math.isfinite(value):
        return "write a finite number"
    if isinstance(value, float) and value.is_integer() and int in arms and float not in arms:
        return f"write {int(value)}"
    if bool in arms:
        return "write true or false"
    return "change the value"


# ---------------------------------------------------------------------------------- sections


def sections(root: type[BaseModel]) -> dict[type[BaseModel], list[str]]:
    """Every settings class and the dotted places where it occurs, in order of appearance."""
    found: dict[type[BaseModel], list[str]] = {}

    def visit(annotation: Any, place: str) -> None:
        for arm in _arms(annotation):
            origin, arguments = typing.get_origin(arm), typing.get_args(arm)
            if origin is tuple:
                visit(arguments[0], f"{place}.N")
            elif origin is dict:
                visit(arguments[1], f"{place}.NAME")
            elif _is_section(arm):
                found.setdefault(arm, []).append(place)
                for name, info in arm.model_fields.items():
                    visit(info.annotation, f"{place}.{name}".lstrip("."))

    visit(root, "")
    return found


def places_of(root: type[BaseModel], name: str) -> list[str]:
    """Dotted places of all settings called `name`."""
    return [
        f"{place}.{name}".lstrip(".")
        for section, places in sections(root).items()
        if name in section.model_fields
        for place in places
    ]


def _default(info: FieldInfo) -> str:
    """The default of a setting, in words."""
    if info.is_required():
        return "required"
    value = info.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return "see below"
    if isinstance(value, tuple):
        value = [v.model_dump(exclude_unset=True) if isinstance(v, BaseModel) else v for v in value]
    return f"default {json.dumps(value, ensure_ascii=False)}"


def help_text(root: type[BaseModel]) -> str:
    """All settings by section: name, type, default, description."""
    lines = []
    for section, places in sections(root).items():
        summary = (section.__doc__ or "").strip().split("\n\n")[0]
        title = ", ".join(places) if any(places) else "top level"
        lines += ["", f"{title}  ({section.__name__})"]
        lines += textwrap.wrap(summary, 96, initial_indent="  ", subsequent_indent="  ")
        for name, info in section.model_fields.items():
            lines.append(f"    {name}: {describe(info.rebuild_annotation())}; {_default(info)}")
            if info.description:
                lines += textwrap.wrap(
                    info.description, 96, initial_indent=" " * 8, subsequent_indent=" " * 8
                )
    return "\n".join(lines).lstrip("\n") + "\n"
