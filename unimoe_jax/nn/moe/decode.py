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
FEWEST = 4
"""A product of fewer columns takes as long."""
BLOCK, TAILS = 128, (64, 96)
"""Rows of a block; what is left after whole blocks takes the smallest of these that holds it."""


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


def _swiglu_rows(expert: Expert, x_XD: jax.Array) -> jax.Array:
    """`swiglu` of rows, [X,D]: what was gathered is multiplied as it lies."""

    def rows(x_XI: jax.Array, w_OI: jax.Array) -> jax.Array:
        return jax.lax.dot_general(
            x_XI, w_OI, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
        ).astype(w_OI.dtype)

    gate, up = rows(x_XD, expert.gate), rows(x_XD, expert.up)
    return rows(jax.nn.silu(gate) * up, expert.down)


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
        # Of a batch, which is a power of two, these are other powers of two: CPUs multiply by 8
        # columns faster than by 5 to 7, by 16 faster than by 9 to 15.
        sizes = [size for size in (tokens // 4, tokens // 2) if size >= FEWEST]
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
        (at,) = jnp.nonzero(chosen_XK.any(axis=1), size=tokens + BLOCK, fill_value=tokens)
        add = partial(_add_block, expert, x_XD, jnp.append(weight_X, 0.0), at)
        count = jnp.sum(at < tokens, dtype=jnp.int32)
        whole, rest = count // BLOCK, count % BLOCK
        blocks = whole + (rest > TAILS[-1])
        y_XD = jax.lax.fori_loop(0, blocks, lambda n, y, add=add: add(BLOCK, n * BLOCK, y), y_XD)
        tails = [lambda y: y, *(partial(add, size, whole * BLOCK) for size in TAILS)]
        tail = jnp.sum(rest > jnp.array([0, *TAILS[:-1]], jnp.int32), dtype=jnp.int32)
        y_XD = jax.lax.switch(jnp.where(blocks > whole, 0, tail), tails, y_XD)
    return y_XD[:tokens].T.astype(x_DX.dtype)


def _add_block(expert: Expert, x_XD, weight_X, at, size: int, first, y_XD) -> Any:
    """y with the expert's results for `size` tokens of `at`, from `first` on."""
    token = jax.lax.dynamic_slice_in_dim(at, first, size)
    rows = jnp.take(x_XD, token, axis=0, mode="clip")
    out = _swiglu_rows(expert, rows).astype(jnp.float32)
    return y_XD.at[token].add(out * weight_X[token][:, None], mode="drop")
