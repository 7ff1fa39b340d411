"""The base class of all settings, and the types that several of them share."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
FloatType = Literal["float32", "bfloat16", "float16"]
AttentionProgram = Literal["auto", "xla"]
ModuleName = Literal["encoder", "connector", "decoder"]
MODULES: tuple[ModuleName, ...] = ("encoder", "connector", "decoder")
"""The modules of a model that may carry experts."""
INVALID = "invalid_setting"
"""Type of the validation errors that `invalid` makes."""


class Config(BaseModel):
    """Base of every settings class: immutable, unknown keys are errors, numbers are finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def invalid(reason: str, *keys: str | tuple[str | int, ...]) -> PydanticCustomError:
    """The error that a validator raises about settings that do not fit each other.

    reason: a sentence that names the settings, their values and what is allowed.
    keys: where these settings are, below the section that is validated: `"moe.layers"`, or a tuple
        such as `("stages", 2, "mixture", "my.source")`. The message will name the file in which
        one of them was set last, because that is where the contradiction was made.
    """
    paths = [list(key) if isinstance(key, tuple) else key.split(".") for key in keys]
    return PydanticCustomError(INVALID, "{reason}", {"reason": reason, "keys": paths})


def compiles(pattern: str) -> str:
    """The pattern, if it is a regular expression; ValueError otherwise."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"not a regular expression: {error}") from error
    return pattern


Regex = Annotated[str, Field(min_length=1)]
