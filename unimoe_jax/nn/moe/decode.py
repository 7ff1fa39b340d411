"""Experts held as separate arrays, for decoding on one device.

Decoding spends its time on reading weights. XLA copies a slice of stacked experts before it uses
it, while a separate array is read where it is stored, and an expert that no token chose is not read
at all. Activations are feature-major, x_DX, and kernels are [out, in], because on a CPU that
product is the fastest for few tokens. `apply` gives the same results as `moe_ffn` for the same
experts stacked.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

FEW = 64
"""With at most so many tokens, every expert is applied once. With more tokens, it is applied in
blocks of the rows that were routed to it."""
MIN_COLUMNS = 4
"""A product with fewer columns takes as long as one with so many."""
BLOCK, TAILS = 128, (64, 96)
"""Rows of a block, and the sizes for the rows that are left after whole blocks: they take the
smallest of these sizes that holds them, or a whole block."""


class Expert(NamedTuple):
    """The weights of one SwiGLU expert: gate and up [F,D], down [D,F]."""

    gate: jax.Array
    up: jax.Array
    down: jax.Array


def product(w_OI: jax.Array, x_IX: jax.Array) -> jax.Array:
    """Return w x in float32, with float32 sums."""
    return jax.lax.dot_general(
        w_OI, x_IX.astype(w_OI.dtype), (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32
    )


def swiglu(expert: Expert, x_DX: jax.Array) -> jax.Array:
    """Return down(silu(gate x) · up x), [D,X].

    Results are rounded to the kernels' dtype in the same places as in `nn.mlp.SwiGLU`.
    """
    dtype = expert.down.dtype
    gate, up = (product(w, x_DX).astype(dtype) for w in (expert.gate, expert.up))
    return product(expert.down, jax.nn.silu(gate) * up).astype(dtype)


def _swiglu_rows(expert: Expert, x_XD: jax.Array) -> jax.Array:
    """Return `swiglu` for tokens in rows, [X,D], so that gathered rows need no transposition."""

    def rows(x_XI: jax.Array, w_OI: jax.Array) -> jax.Array:
        return jax.lax.dot_general(
            x_XI, w_OI, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
        ).astype(w_OI.dtype)

    gate, up = rows(x_XD, expert.gate), rows(x_XD, expert.up)
    return rows(jax.nn.silu(gate) * up, expert.down)


def apply(
    experts: Sequence[Expert], x_DX: jax.Array, expert_XK: jax.Array, weight_XK: jax.Array
) -> jax.Array:
    """Return y[:,x] = Σ_k weight[x,k] · experts[expert[x,k]](x[:,x]), [D,X] like x.

    Args:
        x_DX: tokens in columns.
        expert_XK: int32 in [0, E]; E means "no expert" and costs nothing.
        weight_XK: float32.
    """
    if x_DX.shape[1] <= FEW:
        return _apply_once(experts, x_DX, expert_XK, weight_XK)
    return _apply_in_blocks(experts, x_DX, expert_XK, weight_XK)


# ------------------------------------------------------------------------------ few tokens


def _apply_once(
    experts: Sequence[Expert], x_DX: jax.Array, expert_XK: jax.Array, weight_XK: jax.Array
) -> jax.Array:
    """Apply each expert once: to all tokens, or to a quarter or a half if these hold its tokens.

    Example: of 16 tokens, an expert with 0 tokens is skipped, one with 1 to 4 tokens multiplies 4
    columns, one with 5 to 8 multiplies 8 columns, and one with more multiplies all 16.
    """
    tokens = x_DX.shape[1]
    y_DX = jnp.zeros(x_DX.shape, jnp.float32)
    for number, expert in enumerate(experts):
        chosen_XK = expert_XK == number
        weight_X = jnp.sum(jnp.where(chosen_XK, weight_XK, 0.0), axis=1)
        chosen_X = chosen_XK.any(axis=1)
        count = jnp.sum(chosen_X, dtype=jnp.int32)
        # Round the number of tokens up to a power of two: on CPUs a product with 8 columns is
        # faster than one with 5 to 7, and one with 16 is faster than one with 9 to 15. The number
        # of tokens in a batch is a power of two, so its half and its quarter are too.
        sizes = [size for size in (tokens // 4, tokens // 2) if size >= MIN_COLUMNS]
        order = jnp.argsort(~chosen_X, stable=True) if sizes else None
        branches = [
            _skip,
            *(partial(_add_some, expert, size) for size in sizes),
            partial(_add_all, expert),
        ]
        # Branch 0 if nobody chose the expert, then one branch per size, and all tokens at the end.
        branch = jnp.sum(count > jnp.array([0, *sizes], jnp.int32), dtype=jnp.int32)
        y_DX = jax.lax.switch(branch, branches, y_DX, x_DX, weight_X, order)
    return y_DX.astype(x_DX.dtype)


def _skip(y_DX, x_DX, weight_X, order) -> jax.Array:
    """Return y unchanged: no token chose the expert."""
    del x_DX, weight_X, order
    return y_DX


def _add_some(expert: Expert, size: int, y_DX, x_DX, weight_X, order) -> jax.Array:
    """Add the expert's results for the first `size` tokens of `order`.

    These are all tokens that chose the expert, and some others, whose weight is 0.
    """
    token = order[:size]
    out = swiglu(expert, x_DX[:, token]).astype(jnp.float32)
    return y_DX.at[:, token].add(out * weight_X[token][None])


def _add_all(expert: Expert, y_DX, x_DX, weight_X, order) -> jax.Array:
    """Add the expert's results for all tokens; the weight of tokens that did not choose it is 0."""
    del order
    return y_DX + swiglu(expert, x_DX).astype(jnp.float32) * weight_X[None]


# ----------------------------------------------------------------------------- many tokens


def _apply_in_blocks(
    experts: Sequence[Expert], x_DX: jax.Array, expert_XK: jax.Array, weight_XK: jax.Array
) -> jax.Array:
    """Apply each expert to blocks of the tokens that chose it.

    Example: an expert with 300 tokens takes 2 whole blocks of 128, and a tail of 64 rows for the 44
    tokens that are left. With 370 tokens, 114 are left, which is more than the largest tail, so
    they take a third block.
    """
    tokens, x_XD = x_DX.shape[1], x_DX.T
    # The additional row at the end receives the results of padding.
    y_XD = jnp.zeros((tokens + 1, x_XD.shape[1]), jnp.float32)
    for number, expert in enumerate(experts):
        # List the tokens that chose the expert, followed by the number of the additional row.
        chosen_XK = expert_XK == number
        weight_X = jnp.sum(jnp.where(chosen_XK, weight_XK, 0.0), axis=1)
        (token_of,) = jnp.nonzero(chosen_XK.any(axis=1), size=tokens + BLOCK, fill_value=tokens)
        add = partial(_add_block, expert, x_XD, jnp.append(weight_X, 0.0), token_of)
        # Whole blocks; the rest takes one more block if it is larger than the largest tail.
        count = jnp.sum(token_of < tokens, dtype=jnp.int32)
        whole, rest = count // BLOCK, count % BLOCK
        blocks = whole + (rest > TAILS[-1])
        y_XD = jax.lax.fori_loop(0, blocks, lambda n, y, add=add: add(BLOCK, n * BLOCK, y), y_XD)
        # Otherwise the rest takes the smallest tail that holds it, and an empty rest takes none.
        tails = [lambda y: y, *(partial(add, size, whole * BLOCK) for size in TAILS)]
        tail = jnp.sum(rest > jnp.array([0, *TAILS[:-1]], jnp.int32), dtype=jnp.int32)
        y_XD = jax.lax.switch(jnp.where(blocks > whole, 0, tail), tails, y_XD)
    return y_XD[:tokens].T.astype(x_DX.dtype)


def _add_block(expert: Expert, x_XD, weight_X, token_of, size: int, start, y_XD) -> jax.Array:
    """Return y with the expert's results added for `size` tokens of `token_of` from `start` on."""
    token = jax.lax.dynamic_slice_in_dim(token_of, start, size)
    rows = jnp.take(x_XD, token, axis=0, mode="clip")
    out = _swiglu_rows(expert, rows).astype(jnp.float32)
    return y_XD.at[token].add(out * weight_X[token][:, None], mode="drop")
