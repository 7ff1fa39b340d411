"""Functions compiled ahead of time, each once, and arrays placed on the mesh that they run on.

Sizes come from a short list of buckets, so that few programs serve all requests. All arrays of a
program are on one mesh; the rows of a batch are split over its data shards.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from unimoe_jax.parallel.sharding import data_shards, replicated, spec_for, use_mesh

Log = Callable[[str], None]
"""Receives one line of text for people."""


class ProgramCache:
    """Compiled programs of one model on one mesh, by name.

    log: receives a line for every compilation.

    Attributes:
        data_shards: the number of rows of every batch is a multiple of it.
        compiled: {name: seconds that the compilation took}, in the order of compilation.
    """

    def __init__(self, mesh: Mesh, rules: dict | None = None, log: Log | None = None):
        self.mesh, self.rules, self.log = mesh, rules, log
        self.compiled: dict[str, float] = {}
        self._programs: dict[str, Any] = {}
        with use_mesh(mesh, rules):
            self.data_shards = data_shards(mesh)

    def get(
        self,
        name: str,
        function: Callable,
        inputs: tuple,
        *,
        donate: tuple[int, ...] = (),
        outputs: Any = None,
    ) -> Any:
        """`function` compiled for `inputs`; compiled only if no program has this name yet.

        name: identifies the function together with all sizes of its inputs. inputs: arrays, or
        shape structs with shardings. donate: numbers of the arguments whose memory the result may
        reuse. outputs: shardings of the result, a prefix of its tree; None replicates everything.
        """
        if name not in self._programs:
            started = time.monotonic()
            # Functions name logical axes, which are resolved while they are traced.
            with use_mesh(self.mesh, self.rules):
                jitted = jax.jit(
                    function,
                    donate_argnums=donate,
                    out_shardings=replicated(self.mesh) if outputs is None else outputs,
                )
                self._programs[name] = jitted.lower(*inputs).compile()
            self.compiled[name] = time.monotonic() - started
            if self.log:
                self.log(f"compiled {name} in {self.compiled[name]:.1f} s")
        return self._programs[name]

    # ------------------------------------------------------------------------- placement

    def sharding(self, *axes: str | None) -> NamedSharding:
        """The sharding of an array with these logical axes."""
        with use_mesh(self.mesh, self.rules):
            return NamedSharding(self.mesh, spec_for(axes))

    def put_batch(self, arrays: Any) -> Any:
        """Place a tree of host arrays, each split over the data shards along its first axis."""
        return jax.tree.map(lambda a: jax.device_put(a, self._by_row(a.ndim)), arrays)

    def put(self, arrays: Any) -> Any:
        """Place a tree of host arrays or numbers, each whole on every device."""
        return jax.tree.map(lambda a: jax.device_put(a, replicated(self.mesh)), arrays)

    def batch_structs(self, arrays: Any) -> Any:
        """Shape structs, with shardings, of the arrays that `put_batch` would return."""
        return jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=self._by_row(np.ndim(a))),
            arrays,
        )

    def structs(self, arrays: Any) -> Any:
        """Shape structs, with shardings, of the arrays that `put` would return."""
        same = replicated(self.mesh)
        return jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(np.shape(a), np.asarray(a).dtype, sharding=same), arrays
        )

    def _by_row(self, rank: int) -> NamedSharding:
        return self.sharding("batch", *[None] * (rank - 1))
