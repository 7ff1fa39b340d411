"""Tokens sent to the devices that hold their experts, and results sent back: inside `shard_map`.

There are three forms. They give the same values and gradients, and none drops a token:

- gather: every device of the group receives all tokens of the group, and partial sums are
  scattered back.
- all_to_all: a token goes once to every device that holds one of its experts, in buffers of a fixed
  size. Tokens that do not fit go in further rounds; the devices agree on the number at run time.
- ragged: the same without padding on the way, by `ragged_all_to_all`, which CPUs do not have. Here
  it is the receiver's buffer that can be full and makes further rounds necessary.

`forward` and `backward` wrap a function of the tokens that have arrived, in which experts have the
numbers that they have on this device. That function does not know of the mesh. The backward pass
sends the tokens again instead of keeping those that arrived; with rematerialised layers that is the
same traffic.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp

from unimoe_jax.nn.moe.exchange_rounds import (
    BoundedExchange,
    Group,
    RaggedExchange,
    on_shard,
    unpack_tokens,
)
from unimoe_jax.nn.moe.grouped import Routed

ExchangeForm = Literal["gather", "all_to_all", "ragged"]

SPARE = 0.15
"""A buffer holds this share of tokens more than balanced routing needs, or four standard deviations
of the load of a random balanced router more, whichever is larger."""

_EXCHANGES = {"all_to_all": BoundedExchange, "ragged": RaggedExchange}


def pair_capacity(tokens: int, shards: int, experts: int, top_k: int) -> int:
    """Return how many tokens a buffer between two devices holds.

    A balanced router sends a token to a given device with probability 1 − C(E−E_l, k) / C(E, k),
    where E_l of the E experts are on that device.

    Example: 2048 tokens, 4 devices with 2 experts each, and 2 experts per token. The probability is
    1 − C(6, 2) / C(8, 2) = 13/28, which makes 951 tokens on average. 15 % more are 1093, and 1096
    is the next multiple of 8.

    Args:
        tokens: the tokens on the sending device.
        shards: the number of devices.
        experts: E_l, the experts on each device.
        top_k: k, the experts per token.
    """
    total = shards * experts
    missed = math.comb(total - experts, top_k) / math.comb(total, top_k)
    mean = tokens * (1 - missed)
    capacity = max(mean * (1 + SPARE), mean + 4 * math.sqrt(mean))
    return min(tokens, 8 * math.ceil(capacity / 8))


def cheapest_form(tokens: int, capacity: int) -> ExchangeForm:
    """Return all_to_all if it moves at most 3/4 of the tokens that gathering would move.

    The margin pays for packing the buffers, and for a second round now and then.
    """
    return "all_to_all" if capacity <= 0.75 * tokens else "gather"


def forward(
    form: ExchangeForm, group: Group, apply: Callable[[Routed], jax.Array], rows: Routed, width: int
) -> jax.Array:
    """Return y[x] = Σ_k weight[x,k] · expert[x,k](x) for this device's tokens, [X,width] like x.

    Args:
        apply: computes this sum for the experts of this device, for tokens that have arrived.
        rows: the tokens of this device, with the experts' numbers in the whole layer.
        width: the width of y.
    """
    if form == "gather":
        y = apply(_gather_tokens(group, rows))
        return jax.lax.psum_scatter(y, group.axes, scatter_dimension=0, tiled=True)
    exchange = _EXCHANGES[form](group, rows)

    def one_round(index, y_XD):
        x_RD, numbers = exchange.send(index, rows.x_XD)
        arrived = unpack_tokens(x_RD, numbers)
        return y_XD + exchange.rows_back(index, apply(arrived))

    empty = jnp.zeros((rows.x_XD.shape[0], width), jnp.float32)
    y_XD = jax.lax.fori_loop(0, exchange.rounds(), one_round, empty)
    return y_XD.astype(rows.x_XD.dtype)


Pull = Callable[[Routed, jax.Array, list], tuple[list, jax.Array, jax.Array]]
"""`pull(rows, g, dtrained)` returns (dtrained, dx, dweight) for the experts of this device."""


def backward(
    form: ExchangeForm, group: Group, pull: Pull, rows: Routed, g_XD: jax.Array, dtrained: list
) -> tuple[list, jax.Array, jax.Array]:
    """Return (dtrained, dx, dweight) for this device's tokens and experts.

    Args:
        pull: computes the same for tokens that have arrived on this device.
        rows: the tokens of this device, as `forward` receives them.
        g_XD: the gradient of the y that `forward` returns.
        dtrained: float32, the gradients of this device's experts, which are added to.
    """
    if form == "gather":
        gather = partial(jax.lax.all_gather, axis_name=group.axes, axis=0, tiled=True)
        dtrained, dx, dweight = pull(_gather_tokens(group, rows), gather(g_XD), dtrained)
        scatter = partial(jax.lax.psum_scatter, scatter_dimension=0, tiled=True)
        return dtrained, scatter(dx, group.axes), scatter(dweight, group.axes)
    exchange, width = _EXCHANGES[form](group, rows), rows.x_XD.shape[1]

    def one_round(index, carry):
        dtrained, dx_XD, dweight_XK = carry
        # Send tokens and gradients side by side, so that it is one exchange.
        both = jnp.concatenate([rows.x_XD, g_XD.astype(rows.x_XD.dtype)], axis=1)
        both, numbers = exchange.send(index, both)
        arrived = unpack_tokens(both[:, :width], numbers)
        dtrained, dx, dweight = pull(arrived, both[:, width:], dtrained)
        # Return the gradients to the devices that sent the tokens, and add them up over rounds.
        dx, dweight = exchange.rows_back(index, dx), exchange.numbers_back(index, dweight)
        return dtrained, dx_XD + dx, dweight_XK + dweight

    dx_XD = jnp.zeros(rows.x_XD.shape, jnp.float32)
    dweight_XK = jnp.zeros(rows.weight_XK.shape, jnp.float32)
    start = (dtrained, dx_XD, dweight_XK)
    dtrained, dx_XD, dweight_XK = jax.lax.fori_loop(0, exchange.rounds(), one_round, start)
    return dtrained, dx_XD.astype(rows.x_XD.dtype), dweight_XK


def _gather_tokens(group: Group, rows: Routed) -> Routed:
    """Return the tokens of all devices of the group, with experts as numbered on this device."""
    gather = partial(jax.lax.all_gather, axis_name=group.axes, axis=0, tiled=True)
    here = jax.lax.axis_index(group.axes)
    rows = jax.tree.map(gather, rows)
    return rows._replace(expert_XK=on_shard(rows.expert_XK, here, group.experts))
