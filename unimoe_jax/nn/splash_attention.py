"""Attention over packed rows on TPUs: the kernel that comes with jax, on this package's layout.

Between the two products of attention lie scores that XLA sends through a TPU's memory several
times; the kernel ("splash", sparse flash attention, after arXiv 2205.14135) keeps them on the core.
It visits every tile that a causal mask leaves, also those between samples of a packed row.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import PartitionSpec

from unimoe_jax.sharding import current_mesh, current_platform, spec_for

LANES = 128
BLOCKS = (512, 256, 128)
"""Queries and keys of a tile: the largest that divides the row."""


class Segments(NamedTuple):
    """segment_BT int32: positions of one segment see each other and themselves, not later ones."""

    segment_BT: jax.Array


def suits(head_size: int) -> bool:
    """Whether the kernel runs where programs will run, on heads of this size."""
    return current_platform() == "tpu" and head_size % LANES == 0


def attend_segments(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segment_BT: jax.Array,
    *,
    scale: float,
    interpret: bool = False,
) -> jax.Array:
    """softmax(scale · q kᵀ, masked) v within segments, with N query heads over K key heads.

    H must be a multiple of 128. Scores and softmax are float32 (arXiv 1706.03762, eq. 1); queries
    are scaled before the product, in their dtype. interpret: run the kernel on any platform, step
    by step.

    Returns:
        [B,T,N,H] in the dtype of q.
    """
    body = partial(_attend, scale, interpret)
    if (mesh := current_mesh()) is not None:
        q_spec, k_spec = (_spec(mesh, "batch", None, n, None) for n in ("heads", "kv_heads"))
        specs = (q_spec, k_spec, k_spec, _spec(mesh, "batch", None))
        body = jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=q_spec, check_vma=False)
    return body(q_BTNH, k_BTKH, v_BTKH, segment_BT)


def _spec(mesh: jax.sharding.AbstractMesh, *axes: str | None) -> PartitionSpec:
    """`spec_for`, with the mesh axes of one device as well: gradients are summed over those that a
    spec leaves out, and a sum over one device is an exchange and a copy all the same."""
    first, *others = spec_for(axes)
    first = (first,) if isinstance(first, str) else (first or ())
    alone = (name for name, size in mesh.shape.items() if size == 1)
    return PartitionSpec((*first, *alone), *others)


def _attend(scale, interpret, q_BTNH, k_BTKH, v_BTKH, segment_BT) -> jax.Array:
    length = q_BTNH.shape[1]
    more = -length % LANES
    # Positions that make up a row see themselves, so that no sum of weights is empty.
    segment_BT = jnp.pad(segment_BT, ((0, 0), (0, more)), constant_values=-1)
    q_BTNH = (q_BTNH.astype(jnp.float32) * scale).astype(q_BTNH.dtype)
    q, k, v = (
        jnp.swapaxes(jnp.pad(x, ((0, 0), (0, more), (0, 0), (0, 0))), 1, 2)
        for x in (q_BTNH, k_BTKH, v_BTKH)
    )
    kernel = _kernel(q.shape[1], length + more, interpret)
    out_BNTH = jax.vmap(kernel)(q, k, v, kernels.SegmentIds(segment_BT, segment_BT))
    return jnp.swapaxes(out_BNTH, 1, 2)[:, :length]


def _kernel(heads: int, length: int, interpret: bool) -> kernels.SplashAttentionKernel:
    """Of one row: (q [N,T,H], k and v [K,T,H], segments) -> [N,T,H]."""
    block = next(size for size in BLOCKS if length % size == 0)
    causal = masks.MultiHeadMask([masks.CausalMask((length, length))] * heads)
    sizes = kernels.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    return kernels.make_splash_mha(
        causal, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret
    )
