"""Compiled programs by name: compiled ahead, announced, and never compiled twice.

Shapes come from a short list of buckets, so that few programs serve all requests. Everything a
program touches lies on one mesh; its rows are cut over the data shards.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from unimoe_jax.sharding import data_shards, replicated, spec_for, use_mesh

PROMPT, RING = 64, 256
TOGETHER = 1024
"""Positions that prompts prefilled together may take on a data shard."""
Tell = Callable[[str], None]


def prompt_bucket(length: int, most: int) -> int:
    """The smallest of 64, 96, 128, 192, 256, … that holds a prompt; `most` ends the list."""
    power = PROMPT
    while power < length:
        power *= 2
    between = power * 3 // 4
    return min(between if power > PROMPT and between >= length else power, most)


def ring_bucket(tokens: int, most: int) -> int:
    """The smallest of 256, 1024, 4096, … that holds a sequence; `most` ends the list."""
    slots = RING
    while slots < tokens:
        slots *= 4
    return min(slots, most)


def rows_together(length: int, rows: int, shards: int) -> int:
    """How many prompts of a bucket are prefilled together for a batch of `rows`."""
    each = max(1, rows // shards)
    while each > 1 and each * length > TOGETHER:
        each //= 2
    return each * shards


def next_group(lengths: Sequence[int], rows: int, shards: int, most: int) -> tuple[int, int]:
    """How many of the waiting prompts to prefill next, in order, and the rows of their program:
    one per data shard, or as many as go together if they fill at least half of the rows."""
    count, together = 0, shards
    for number in range(1, len(lengths) + 1):
        fits = rows_together(prompt_bucket(max(lengths[:number]), most), rows, shards)
        if number > fits:
            break
        count, together = number, fits
    if 2 * count >= together:
        return count, together
    return min(count, shards), shards


class Programs:
    """Programs of one model on one mesh.

    Attributes:
        rows: how many rows a batch is a multiple of: the data shards.
        compiled: name -> seconds, in the order of compilation.
    """

    def __init__(self, mesh: Mesh, rules: dict | None = None, tell: Tell | None = None):
        self.mesh, self.rules, self.tell = mesh, rules, tell
        self.compiled: dict[str, float] = {}
        self._programs: dict[str, Any] = {}
        with use_mesh(mesh, rules):
            self.rows = data_shards(mesh)

    def get(
        self,
        name: str,
        function: Callable,
        inputs: tuple,
        *,
        donate: tuple[int, ...] = (),
        outputs: Any = None,
    ) -> Any:
        """`function` compiled for `inputs` (arrays or structs with shardings); `name` says it all.

        outputs: shardings of the result, a prefix tree; default: replicated.
        """
        if name not in self._programs:
            started = time.monotonic()
            with use_mesh(self.mesh, self.rules):
                jitted = jax.jit(
                    function,
                    donate_argnums=donate,
                    out_shardings=replicated(self.mesh) if outputs is None else outputs,
                )
                self._programs[name] = jitted.lower(*inputs).compile()
            self.compiled[name] = time.monotonic() - started
            if self.tell:
                self.tell(f"compiled {name} in {self.compiled[name]:.1f} s")
        return self._programs[name]

    # ------------------------------------------------------------------------- placement

    def sharding(self, *axes: str | None) -> NamedSharding:
        """Of an array with these logical axes."""
        with use_mesh(self.mesh, self.rules):
            return NamedSharding(self.mesh, spec_for(axes))

    def put_batch(self, arrays: Any) -> Any:
        """Host arrays, cut over the data shards along their first axis."""
        return jax.tree.map(lambda a: jax.device_put(a, self._by_row(a.ndim)), arrays)

    def put(self, arrays: Any) -> Any:
        """Host arrays or numbers, whole on every device."""
        return jax.tree.map(lambda a: jax.device_put(a, replicated(self.mesh)), arrays)

    def batch_structs(self, arrays: Any) -> Any:
        """What `put_batch` would give, as shape structs."""
        return jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=self._by_row(np.ndim(a))),
            arrays,
        )

    def structs(self, arrays: Any) -> Any:
        """What `put` would give, as shape structs."""
        same = replicated(self.mesh)
        return jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(np.shape(a), np.asarray(a).dtype, sharding=same), arrays
        )

    def _by_row(self, rank: int) -> NamedSharding:
        return self.sharding("batch", *[None] * (rank - 1))
