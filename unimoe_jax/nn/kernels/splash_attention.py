"""Attention on TPUs: the kernel that comes with jax, on this package's layout.

Between the two products of attention lie scores that XLA sends through a TPU's memory several
times; the kernel ("splash", sparse flash attention, after arXiv 2205.14135) keeps them on the core.
Under a causal mask it leaves out tiles that no query sees, but not those between samples of a
packed row.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import PartitionSpec

from unimoe_jax.config import AttentionProgram
from unimoe_jax.parallel.sharding import current_mesh, current_platform, spec_for

LANES = 128
BLOCKS = (640, 512, 384, 256)
"""Queries or keys of a tile: what makes up the row with the fewest positions more, the largest of
those."""
FEWEST = {"causal": 256, "all": 1024}
"""Positions from which on the kernel pays, by what is seen. Encoders' heads are half as wide as a
tile: at CLIP's 577, bringing them into the kernel's layout takes as long as XLA's attention."""


class Segments(NamedTuple):
    """segment_BT int32: positions of one segment see each other and themselves, not later ones."""

    segment_BT: jax.Array


def suits(setting: AttentionProgram, seen: Literal["causal", "all"], positions: int) -> bool:
    """Whether the kernel is wanted, runs where programs will run, and pays there. positions: of
    queries or keys, the fewer."""
    return setting == "auto" and current_platform() == "tpu" and positions >= FEWEST[seen]


def attend_segments(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segment_BT: jax.Array,
    *,
    scale: float,
    interpret: bool = False,
) -> jax.Array:
    """softmax(scale · q kᵀ, masked) v, causal within segments, with N query heads over K key heads.

    Scores and softmax are float32 (arXiv 1706.03762, eq. 1); queries are scaled before the product,
    in their dtype. interpret: run the kernel on any platform, step by step.

    Returns:
        [B,T,N,H] in the dtype of q.
    """
    return _on_mesh(partial(_attend, scale, True, interpret), q_BTNH, k_BTKH, v_BTKH, segment_BT)


def attend_all(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    scale: float,
    interpret: bool = False,
) -> jax.Array:
    """softmax(scale · q kᵀ) v, every query to every key; otherwise as `attend_segments`."""
    return _on_mesh(partial(_attend, scale, False, interpret), q_BTNH, k_BSKH, v_BSKH)


def _on_mesh(body: Callable, q, k, v, *more: jax.Array) -> jax.Array:
    """`body` on every device's rows and heads, if there are several."""
    if (mesh := current_mesh()) is not None:
        # Heads are cut only where a part of the queries meets its own part of the keys.
        alike = spec_for(("heads",)) == spec_for(("kv_heads",))
        heads = "heads" if alike and _divides(mesh, "heads", k.shape[2]) else None
        rows = "batch" if _divides(mesh, "batch", q.shape[0]) else None
        spec = _spec(mesh, rows, None, heads, None)
        specs = (spec, spec, spec, *(_spec(mesh, rows, None) for _ in more))
        body = jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=spec, check_vma=False)
    return body(q, k, v, *more)


def _divides(mesh: jax.sharding.AbstractMesh, axis: str, size: int) -> bool:
    (names,) = spec_for((axis,))
    names = (names,) if isinstance(names, str) else (names or ())
    return size % math.prod(mesh.shape[name] for name in names) == 0


def _spec(mesh: jax.sharding.AbstractMesh, *axes: str | None) -> PartitionSpec:
    """`spec_for`, with the mesh axes of one device as well: gradients are summed over those that a
    spec leaves out, and a sum over one device is an exchange and a copy all the same."""
    first, *others = spec_for(axes)
    first = (first,) if isinstance(first, str) else (first or ())
    alone = (name for name, size in mesh.shape.items() if size == 1)
    return PartitionSpec((*first, *alone), *others)


def _attend(scale, causal, interpret, q_BTNH, k_BSKH, v_BSKH, segment_BT=None) -> jax.Array:
    queries, keys = q_BTNH.shape[1], k_BSKH.shape[1]
    q_tile, k_tile = tile_of(queries), tile_of(keys)
    if segment_BT is None:
        segment_BT, segment_BS = (jnp.zeros(x.shape[:2], jnp.int32) for x in (q_BTNH, k_BSKH))
    else:
        segment_BS = segment_BT
    # No query sees the positions that make up the keys. Queries that are made up see something, so
    # that no sum of weights is empty: themselves, or where nothing is causal, all keys.
    more = -1 if causal else 0
    segments = kernels.SegmentIds(
        _made_up(segment_BT, q_tile, more), _made_up(segment_BS, k_tile, -1)
    )
    q_BTNH = (q_BTNH.astype(jnp.float32) * scale).astype(q_BTNH.dtype)
    q = jnp.swapaxes(_made_up(q_BTNH, q_tile), 1, 2)
    k, v = (jnp.swapaxes(_made_up(x, k_tile), 1, 2) for x in (k_BSKH, v_BSKH))
    kernel = _kernel(q.shape[1:3], k.shape[2], (q_tile, k_tile), causal, interpret)
    out_BNTH = jax.vmap(kernel)(q, k, v, segments)
    return jnp.swapaxes(out_BNTH, 1, 2)[:, :queries]


def tile_of(length: int) -> int:
    """Queries or keys of a tile, in a row of so many."""
    if length <= LANES:
        return LANES
    return min(BLOCKS, key=lambda size: (-length % size, -size))


def _made_up(x_BT: jax.Array, tile: int, value: int = 0) -> jax.Array:
    """Positions added until tiles make up the row."""
    widths = [(0, 0), (0, -x_BT.shape[1] % tile)] + [(0, 0)] * (x_BT.ndim - 2)
    return jnp.pad(x_BT, widths, constant_values=value)


def _kernel(
    queries: tuple[int, int], keys: int, tiles: tuple[int, int], causal: bool, interpret: bool
) -> kernels.SplashAttentionKernel:
    """Of one row: (q [N,T,H], k and v [K,S,H], segments) -> [N,T,H]; queries: N and T."""
    (heads, length), (q_tile, k_tile) = queries, tiles
    shape = (length, keys)
    mask = masks.CausalMask(shape) if causal else masks.FullMask(shape)
    sizes = kernels.BlockSizes(
        block_q=q_tile,
        block_kv=k_tile,
        block_q_dkv=q_tile,
        block_kv_dkv=k_tile,
        block_kv_dkv_compute=k_tile,
        block_q_dq=q_tile,
        block_kv_dq=k_tile,
    )
    return kernels.make_splash_mha(
        masks.MultiHeadMask([mask] * heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
