"""What the tests of attention over packed rows share."""

from __future__ import annotations

import jax
from jax.sharding import Mesh, NamedSharding

from unimoe_jax.parallel.sharding import spec_for


def placed(mesh: Mesh, arguments: tuple[jax.Array, ...]) -> list[jax.Array]:
    """Arguments where the mesh in use wants them: tensors [B,T,N,H] cut by rows and heads, others
    by rows."""
    heads, rows = spec_for(("batch", None, "heads", None)), spec_for(("batch",))
    return [
        jax.device_put(x, NamedSharding(mesh, heads if x.ndim == 4 else rows)) for x in arguments
    ]
