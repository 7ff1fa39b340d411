"""Sampling settings of a request."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from typing import Any

from unimoe_jax.generate.errors import GenerationError

MAX_NEW_TOKENS, TOP_K = 1024, 50
FLOAT32, INT32 = 3.4e38, 2**31 - 1


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. None: what the model's generation_config.json says, else the default.

    temperature 0 is greedy decoding. top_p, top_k (0: off) and seed matter only above it. The
    tokens of a request depend on its own settings and seed, not on what else is in the batch (in
    bfloat16 but for rounding, which may tip the balance between two tokens).
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int = 0
    max_new_tokens: int | None = None

    def over(self, defaults: Sampling) -> Sampling:
        """These settings where they are set, else those of `defaults`."""
        given = {
            f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None
        }
        return replace(defaults, **given)

    def checked(self) -> Sampling:
        """Itself, complete and valid, of plain numbers.

        Raises:
            GenerationError: the setting and its value are named.
        """
        full = self.over(Sampling(0.0, 1.0, TOP_K, 0, MAX_NEW_TOKENS))
        for name, allowed, good in (
            ("temperature", f"a number from 0 to {FLOAT32}", _number(full.temperature) >= 0),
            ("top_p", "a number above 0, at most 1", 0 < _number(full.top_p) <= 1),
            ("top_k", "a whole number from 0 to 2^31 - 1", 0 <= _whole(full.top_k) <= INT32),
            ("seed", "a whole number from 0 to 2^32 - 1", 0 <= _whole(full.seed) < 2**32),
            (
                "max_new_tokens",
                "a whole number from 1 to 2^31 - 1",
                1 <= _whole(full.max_new_tokens) <= INT32,
            ),
        ):
            if not good:
                raise GenerationError(f"{name} = {getattr(full, name)!r:.60}; allowed: {allowed}")
        return Sampling(**{f.name: _plain(getattr(full, f.name)) for f in fields(full)})


def _number(value: Any) -> float:
    good = isinstance(value, Real) and not isinstance(value, bool)
    # Compared before it is converted: a whole number may be too large for any float.
    return float(value) if good and abs(_plain(value)) <= FLOAT32 else math.nan


def _whole(value: Any) -> int:
    return _plain(value) if isinstance(value, Integral) and not isinstance(value, bool) else -1


def _plain(value: Real) -> int | float:
    """Python's own number for one of numpy, whose generators often give the seeds."""
    if isinstance(value, int | float):
        return value
    return int(value) if isinstance(value, Integral) else float(value)
