"""One prompt and its answer while the engine works on them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from unimoe_jax.generate.engine.settings import CheckedSampling


@dataclass
class Sequence:
    """One prompt, and everything that the engine has generated for it.

    The caller fills the first five fields and reads the others.

    token_id, modality, slot: int32 [T], one entry per position, as in `data.batch.Batch`: slot is
        the row of `soft` that replaces the position's embedding, or -1 where `token_id` counts.
    soft: [P,D] soft tokens of the prompt's media, in the compute dtype.
    sampling: how tokens are chosen, and how many at most.
    tokens: token ids generated so far; the last of them is the end token if `stop` is "eos".
    stop: why the sequence is finished, "eos" or "length" (max_new_tokens); None while it is not.
    experts: filled if traced: int32 [L,n,K] arrays of the experts chosen in L MoE layers, first for
        the n = T positions of the prompt, then for the tokens that were fed to the model.
    logits: filled if traced: for every generated token the float32 [V] that it was chosen from.
    """

    token_id: np.ndarray
    modality: np.ndarray
    slot: np.ndarray
    soft: np.ndarray
    sampling: CheckedSampling
    tokens: list[int] = field(default_factory=list)
    stop: Literal["eos", "length"] | None = None
    experts: list[np.ndarray] = field(default_factory=list)
    logits: list[np.ndarray] = field(default_factory=list)

    @property
    def prompt_length(self) -> int:
        """Positions of the prompt, soft tokens included."""
        return len(self.token_id)

    @property
    def full_length(self) -> int:
        """Positions of the prompt and of the longest answer that `sampling` allows."""
        return self.prompt_length + self.sampling.max_new_tokens

    @property
    def cached(self) -> int:
        """Positions in the cache. The newest token is not in it: the next step feeds it."""
        return self.prompt_length + len(self.tokens) - 1


@dataclass(frozen=True)
class ProgramSize:
    """The properties of a sequence that decide which compiled programs it needs.

    prompt_length, full_length: as in `Sequence`. greedy: whether it needs no sampling.
    """

    prompt_length: int
    full_length: int
    greedy: bool
