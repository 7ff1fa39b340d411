"""A helper for the tests of attention over packed rows on a mesh."""

from __future__ import annotations

from collections.abc import Sequence

import jax
from jax.sharding import Mesh, NamedSharding

from unimoe_jax.parallel.sharding import spec_for


def placed(mesh: Mesh, arguments: Sequence[jax.Array]) -> list[jax.Array]:
    """Return arguments on the mesh: tensors [B,T,N,H] cut by rows and heads, others by rows."""
    heads, rows = spec_for(("batch", None, "heads", None)), spec_for(("batch",))
    return [
        jax.device_put(x, NamedSharding(mesh, heads if x.ndim == 4 else rows)) for x in arguments
    ]
