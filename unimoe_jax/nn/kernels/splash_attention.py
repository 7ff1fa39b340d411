"""Attention on TPUs: the kernel that comes with jax, on the array layout of this package.

XLA sends the scores, which are between the two products of attention, through a TPU's memory
several times. The kernel ("splash", sparse flash attention, after arXiv 2205.14135) keeps them on
the core. Under a causal mask it skips tiles that no query sees. It does not skip the tiles between
the samples of a packed row.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import PartitionSpec

from unimoe_jax.config import AttentionProgram
from unimoe_jax.parallel.sharding import current_mesh, current_platform, spec_for

LANES = 128
"""The width of a TPU's vector registers, and the smallest tile."""
BLOCKS = (640, 512, 384, 256)
"""Sizes of a tile, in queries or keys. A row uses the size that needs the least padding, and the
largest of these sizes if several need equally little."""
MIN_POSITIONS = {"causal": 256, "all": 1024}
"""The number of positions from which on the kernel is faster than XLA, by the kind of mask. Without
a mask, as in encoders, it is larger: heads of encoders are half as wide as a tile, and at CLIP's
577 positions, converting them to the kernel's layout takes as long as XLA's whole attention."""

Visible = Literal["causal", "all"]
"""The keys that a query sees: those of its segment that are not later, or all keys."""


class Segments(NamedTuple):
    """The samples of packed rows.

    segment_BT: int32. A position sees itself and the earlier positions of its segment.
    """

    segment_BT: jax.Array


def suits(setting: AttentionProgram, visible: Visible, positions: int) -> bool:
    """Return whether to use the kernel: the setting allows it, the platform has it, and it pays.

    Args:
        positions: the number of queries or of keys, whichever is smaller.
    """
    return setting == "auto" and current_platform() == "tpu" and positions >= MIN_POSITIONS[visible]


def attend_segments(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segment_BT: jax.Array,
    *,
    scale: float,
    interpret: bool = False,
) -> jax.Array:
    """Return softmax(scale · q kᵀ, masked) v, causal within segments, with N over K heads.

    Scores and softmax are float32 (arXiv 1706.03762, eq. 1). Queries are scaled before the product,
    in their dtype.

    Args:
        q_BTNH: queries of N heads; K divides N.
        k_BTKH, v_BTKH: keys and values of K heads.
        segment_BT: int32, see `Segments`.
        interpret: whether the kernel is interpreted step by step, which works on any platform.

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
    """Return softmax(scale · q kᵀ) v, where every query sees every key; see `attend_segments`."""
    return _on_mesh(partial(_attend, scale, False, interpret), q_BTNH, k_BSKH, v_BSKH)


# ------------------------------------------------------------------------------ on a mesh


def _on_mesh(
    body: Callable,
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    segment_BT: jax.Array | None = None,
) -> jax.Array:
    """Run `body` on every device's rows and heads; without a mesh, on the whole arrays.

    Example: two data shards and two devices for heads, q [4,200,4,128] and k, v [4,200,2,128].
    Every device runs `body` on q [2,200,2,128] and k, v [2,200,1,128]. With q of 3 heads and k, v
    of 3 heads, the two devices do not divide the heads, so both compute all of them.
    """
    segments = () if segment_BT is None else (segment_BT,)
    if (mesh := current_mesh()) is not None:
        # Cut heads only if queries and keys are cut over the same mesh axes, because every device
        # needs the key heads that belong to its query heads.
        same_axes = spec_for(("heads",)) == spec_for(("kv_heads",))
        heads = "heads" if same_axes and _divides(mesh, "heads", k_BSKH.shape[2]) else None
        rows = "batch" if _divides(mesh, "batch", q_BTNH.shape[0]) else None
        spec = _spec(mesh, rows, None, heads, None)
        in_specs = (spec, spec, spec, *(_spec(mesh, rows, None) for _ in segments))
        body = jax.shard_map(body, mesh=mesh, in_specs=in_specs, out_specs=spec, check_vma=False)
    return body(q_BTNH, k_BSKH, v_BSKH, *segments)


def _divides(mesh: jax.sharding.AbstractMesh, axis: str, size: int) -> bool:
    """Return whether the devices of logical axis `axis` divide an array axis of that size."""
    (names,) = spec_for((axis,))
    names = (names,) if isinstance(names, str) else (names or ())
    return size % math.prod(mesh.shape[name] for name in names) == 0


def _spec(mesh: jax.sharding.AbstractMesh, *axes: str | None) -> PartitionSpec:
    """Return `spec_for(axes)`, with the mesh axes of size 1 added to the first dimension.

    Gradients are summed over the mesh axes that a spec leaves out. XLA carries out such a sum as an
    exchange and a copy even if there is only one device to sum over, so no axis is left out that
    need not be.
    """
    first, *others = spec_for(axes)
    first = (first,) if isinstance(first, str) else (first or ())
    single = (name for name, size in mesh.shape.items() if size == 1)
    return PartitionSpec((*first, *single), *others)


# ------------------------------------------------------------------------------ the kernel


def _attend(
    scale: float,
    causal: bool,
    interpret: bool,
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    segment_BT: jax.Array | None = None,
) -> jax.Array:
    """Run the kernel on one device: pad rows to whole tiles, and put heads before positions."""
    queries, keys = q_BTNH.shape[1], k_BSKH.shape[1]
    q_tile, k_tile = tile_of(queries), tile_of(keys)
    if segment_BT is None:
        segment_BT, segment_BS = (jnp.zeros(x.shape[:2], jnp.int32) for x in (q_BTNH, k_BSKH))
    else:
        segment_BS = segment_BT
    # Padded keys get the segment −1, so that no real query sees them. Padded queries need to see at
    # least one key, because otherwise their sum of weights would be empty. Under a causal mask they
    # get the segment −1 and see themselves; without a mask they get the segment 0 of all real keys.
    padded_query = -1 if causal else 0
    segments = kernels.SegmentIds(
        _pad_to_tiles(segment_BT, q_tile, padded_query), _pad_to_tiles(segment_BS, k_tile, -1)
    )
    # The kernel has no factor for the scores, so the queries are scaled.
    q_BTNH = (q_BTNH.astype(jnp.float32) * scale).astype(q_BTNH.dtype)
    q_BNTH = jnp.swapaxes(_pad_to_tiles(q_BTNH, q_tile), 1, 2)
    k_BKSH, v_BKSH = (jnp.swapaxes(_pad_to_tiles(x, k_tile), 1, 2) for x in (k_BSKH, v_BSKH))
    _, heads, padded_queries, _ = q_BNTH.shape
    kernel = _kernel(heads, (padded_queries, q_tile), (k_BKSH.shape[2], k_tile), causal, interpret)
    out_BNTH: Any = jax.vmap(kernel)(q_BNTH, k_BKSH, v_BKSH, segments)
    return jnp.swapaxes(out_BNTH, 1, 2)[:, :queries]


def tile_of(length: int) -> int:
    """Return the number of queries or keys in a tile, for a row of that length.

    Example: 700 positions need 580 positions of padding with tiles of 640, 324 with tiles of 512,
    and 68 with tiles of 384 or 256. The tile is therefore 384.
    """
    if length <= LANES:
        return LANES
    return min(BLOCKS, key=lambda size: (-length % size, -size))


def _pad_to_tiles(x_BT: jax.Array, tile: int, value: int = 0) -> jax.Array:
    """Return x [B,T,…] with positions of that value added until the row is whole tiles."""
    widths = [(0, 0), (0, -x_BT.shape[1] % tile)] + [(0, 0)] * (x_BT.ndim - 2)
    return jnp.pad(x_BT, widths, constant_values=value)


def _kernel(
    heads: int, queries: tuple[int, int], keys: tuple[int, int], causal: bool, interpret: bool
) -> kernels.SplashAttentionKernel:
    """Return the kernel of one row: (q [N,T,H], k and v [K,S,H], segments) -> [N,T,H].

    Args:
        heads: N.
        queries: T and the number of queries in a tile.
        keys: S and the number of keys in a tile.
    """
    (length, q_tile), (key_length, k_tile) = queries, keys
    shape = (length, key_length)
    mask = masks.CausalMask(shape) if causal else masks.FullMask(shape)
    # The same tiles in the forward pass and in both parts of the backward pass (dkv and dq).
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
