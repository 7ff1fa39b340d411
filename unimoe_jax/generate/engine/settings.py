"""How the tokens of an answer are chosen: the settings as a user gives them, and checked."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from typing import Any

from unimoe_jax.generate.errors import GenerationError

MAX_NEW_TOKENS, TOP_K = 1024, 50
"""Defaults if neither the user nor generation_config.json sets a value."""
FLOAT32, INT32 = 3.4e38, 2**31 - 1
"""The largest settings that the arrays of a batch can hold."""


@dataclass(frozen=True)
class CheckedSampling:
    """Complete and valid settings of one sequence, as plain Python numbers.

    temperature: 0 is greedy decoding. top_p, top_k (0 is off) and seed only matter above 0.
    """

    temperature: float
    top_p: float
    top_k: int
    seed: int
    max_new_tokens: int

    @property
    def greedy(self) -> bool:
        """Whether every token is the one with the largest logit."""
        return self.temperature == 0


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. None takes the value of generation_config.json, else the default.

    temperature 0 is greedy decoding. top_p, top_k (0 is off) and seed only matter above 0. The
    tokens of a request depend on its settings and its seed alone, not on the other requests of the
    batch. (In bfloat16, batches of another size round differently, which may change a choice
    between two tokens that are almost equally likely.)
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int = 0
    max_new_tokens: int | None = None

    def over(self, defaults: Sampling) -> Sampling:
        """These settings, with the values of `defaults` where a setting is None."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(defaults, **{k: value for k, value in values.items() if value is not None})

    def checked(self) -> CheckedSampling:
        """The settings with all defaults filled in.

        Raises:
            GenerationError: a value is not allowed; the message names the setting and the value.
        """
        full = self.over(Sampling(0.0, 1.0, TOP_K, 0, MAX_NEW_TOKENS))
        # Limits come from the dtypes of `RowSampling` and `DecodingRows`.
        rules = {
            "temperature": (_as_float(full.temperature) >= 0, f"a number from 0 to {FLOAT32}"),
            "top_p": (0 < _as_float(full.top_p) <= 1, "a number above 0, at most 1"),
            "top_k": (0 <= _as_int(full.top_k) <= INT32, "a whole number from 0 to 2^31 - 1"),
            "seed": (0 <= _as_int(full.seed) < 2**32, "a whole number from 0 to 2^32 - 1"),
            "max_new_tokens": (
                1 <= _as_int(full.max_new_tokens) <= INT32,
                "a whole number from 1 to 2^31 - 1",
            ),
        }
        for name, (is_valid, allowed) in rules.items():
            if not is_valid:
                raise GenerationError(f"{name} = {getattr(full, name)!r:.60}; allowed: {allowed}")
        return CheckedSampling(
            temperature=_plain(full.temperature),
            top_p=_plain(full.top_p),
            top_k=_as_int(full.top_k),
            seed=_as_int(full.seed),
            max_new_tokens=_as_int(full.max_new_tokens),
        )


def _as_float(value: Any) -> float:
    """The value as a float; NaN, which fails every comparison, if it is no number of float32."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return math.nan
    # Compare before converting: a Python int may be too large for any float.
    return float(value) if abs(_plain(value)) <= FLOAT32 else math.nan


def _as_int(value: Any) -> int:
    """The value as an int; -1, which no setting allows, if it is no whole number."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        return -1
    return int(value)


def _plain(value: Any) -> int | float:
    """A Python number. Seeds often come from numpy, whose numbers JSON cannot write."""
    if isinstance(value, int | float):
        return value
    return int(value) if isinstance(value, Integral) else float(value)
