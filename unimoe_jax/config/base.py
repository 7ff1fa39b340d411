"""The base class of all settings, and the types that several of them share."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
FloatType = Literal["float32", "bfloat16", "float16"]
AttentionProgram = Literal["auto", "xla"]
ModuleName = Literal["encoder", "connector", "decoder"]
MODULES: tuple[ModuleName, ...] = ("encoder", "connector", "decoder")


class Config(BaseModel):
    """Base of every settings class: immutable, unknown keys are errors, numbers are finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def compiles(pattern: str) -> str:
    """The pattern, if it is a regular expression; ValueError otherwise."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"not a regular expression: {error}") from error
    return pattern


Regex = Annotated[str, Field(min_length=1)]
