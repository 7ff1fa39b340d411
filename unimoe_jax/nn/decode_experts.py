"""Experts held as separate arrays, for decoding on one device.

Decoding reads weights and little else. A slice of stacked experts is copied before it is used; an
array of its own is read in place, and an expert that no token chose is not read at all. Activations
are feature-major, x_DX, and kernels [out, in]: with few tokens that product is the fastest on a
CPU. `apply` agrees with `moe_ffn` on the same experts stacked.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

FEW = 64
"""Up to so many tokens an expert is applied once, with more in blocks of the rows routed to it."""
WHOLE, BLOCK = 8, 128


class Expert(NamedTuple):
    """One SwiGLU: gate and up [F,D], down [D,F]."""

    gate: jax.Array
    up: jax.Array
    down: jax.Array


def product(w_OI: jax.Array, x_IX: jax.Array) -> jax.Array:
    """w x, accumulated in float32 and returned in float32."""
    return jax.lax.dot_general(
        w_OI, x_IX.astype(w_OI.dtype), (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32
    )


def swiglu(expert: Expert, x_DX: jax.Array) -> jax.Array:
    """down(silu(gate x) · up x), [D,X]; rounded to the kernels' dtype where `SwiGLU` rounds."""
    dtype = expert.down.dtype
    gate, up = (product(w, x_DX).astype(dtype) for w in (expert.gate, expert.up))
    return product(expert.down, jax.nn.silu(gate) * up).astype(dtype)


def apply(
    experts: Sequence[Expert], x_DX: jax.Array, expert_XK: jax.Array, weight_XK: jax.Array
) -> jax.Array:
    """y[:,x] = Σ_k weight[x,k] · experts[expert[x,k]](x[:,x]), [D,X] like x.

    Args:
        expert_XK: int32 in [0, E]; E means "no expert" and costs nothing.
        weight_XK: float32.
    """
    if x_DX.shape[1] <= FEW:
        return _few(experts, x_DX, expert_XK, weight_XK)
    return _many(experts, x_DX, expert_XK, weight_XK)


def _few(experts, x_DX, expert_XK, weight_XK) -> jax.Array:
    """Each expert once: on all tokens, or on as many columns as its share of them needs."""
    tokens = x_DX.shape[1]
    y_DX = jnp.zeros(x_DX.shape, jnp.float32)
    for number, expert in enumerate(experts):
        chosen_XK = expert_XK == number
        weight_X = jnp.sum(jnp.where(chosen_XK, weight_XK, 0.0), axis=1)
        chosen_X = chosen_XK.any(axis=1)
        count = jnp.sum(chosen_X, dtype=jnp.int32)
        sizes = [size for size in (4, 16) if size < tokens and tokens > WHOLE]
        order = jnp.argsort(~chosen_X, stable=True) if sizes else None
        branches = [_skip, *(partial(_some, expert, size) for size in sizes), partial(_all, expert)]
        branch = jnp.sum(count > jnp.array([0, *sizes], jnp.int32), dtype=jnp.int32)
        y_DX = jax.lax.switch(branch, branches, y_DX, x_DX, weight_X, order)
    return y_DX.astype(x_DX.dtype)


def _skip(y_DX, x_DX, weight_X, order) -> jax.Array:
    del x_DX, weight_X, order
    return y_DX


def _some(expert: Expert, size: int, y_DX, x_DX, weight_X, order) -> jax.Array:
    at = order[:size]
    out = swiglu(expert, x_DX[:, at]).astype(jnp.float32)
    return y_DX.at[:, at].add(out * weight_X[at][None])


def _all(expert: Expert, y_DX, x_DX, weight_X, order) -> jax.Array:
    del order
    return y_DX + swiglu(expert, x_DX).astype(jnp.float32) * weight_X[None]


def _many(experts, x_DX, expert_XK, weight_XK) -> jax.Array:
    """Each expert on blocks of its tokens, as many as it has."""
    tokens, x_XD = x_DX.shape[1], x_DX.T
    # A row of its own takes what the padding of a last block adds.
    y_XD = jnp.zeros((tokens + 1, x_XD.shape[1]), jnp.float32)
    for number, expert in enumerate(experts):
        chosen_XK = expert_XK == number
        weight_X = jnp.sum(jnp.where(chosen_XK, weight_XK, 0.0), axis=1)
        chosen_X = chosen_XK.any(axis=1)
        (at,) = jnp.nonzero(chosen_X, size=tokens + BLOCK, fill_value=tokens)
        trips = -(-jnp.sum(chosen_X, dtype=jnp.int32) // BLOCK)
        block = partial(_add_block, expert, x_XD, jnp.append(weight_X, 0.0), at)
        y_XD = jax.lax.fori_loop(0, trips, block, y_XD)
    return y_XD[:tokens].T.astype(x_DX.dtype)


def _add_block(expert: Expert, x_XD, weight_X, at, number, y_XD) -> Any:
    token = jax.lax.dynamic_slice_in_dim(at, number * BLOCK, BLOCK)
    rows = jnp.take(x_XD, token, axis=0, mode="clip")
    out = swiglu(expert, rows.T).T.astype(jnp.float32)
    return y_XD.at[token].add(out * weight_X[token][:, None], mode="drop")
