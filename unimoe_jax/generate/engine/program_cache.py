"""Compiled programs by name: compiled ahead, announced, and never compiled twice.

Shapes come from a short list of buckets, so that few programs serve all requests. Everything a
program touches lies on one mesh; its rows are cut over the data shards.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from unimoe_jax.parallel.sharding import data_shards, replicated, spec_for, use_mesh

"""Positions that prompts prefilled together may take on a data shard."""
Tell = Callable[[str], None]


class ProgramCache:
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
