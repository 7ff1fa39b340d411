"""One prompt on its way through the engine."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from unimoe_jax.generate.engine.settings import Sampling


@dataclass
class Sequence:
    """One prompt and what has come of it.

    token_id, modality, slot: int32 [T] as in `Batch`; soft: [P,D] soft tokens that slots refer to.
    sampling: complete (`Sampling.checked`). tokens: generated so far. experts: traced, [L,n,K] for
    the prompt and then for every token fed; logits: traced, [V] per token.
    """

    token_id: np.ndarray
    modality: np.ndarray
    slot: np.ndarray
    soft: np.ndarray
    sampling: Sampling
    tokens: list[int] = field(default_factory=list)
    stop: Literal["eos", "length"] | None = None
    experts: list[np.ndarray] = field(default_factory=list)
    logits: list[np.ndarray] = field(default_factory=list)

    @property
    def prompt_length(self) -> int:
        return len(self.token_id)

    @property
    def full_length(self) -> int:
        """Positions it may come to take."""
        return self.prompt_length + self.sampling.max_new_tokens

    @property
    def cached(self) -> int:
        """Positions in the cache: all but the newest token."""
        return self.prompt_length + len(self.tokens) - 1


@dataclass(frozen=True)
class ProgramSize:
    """What of a sequence decides which programs it needs."""

    prompt: int
    full: int
    greedy: bool
