"""The head of the language model: logits, or the loss of a batch without its logits.

In training most positions have no target, and the logits of all others would be the largest array
of a step. Therefore positions with a target are sorted to the front and processed in blocks. Each
block reduces its logits to the loss and, if a gradient is wanted, to the gradients of the loss with
respect to hidden states and weights. Both can be computed as soon as the logits of the block are
there, so the logits are never kept (Liger kernels, arXiv 2410.10989, section 3.2).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from unimoe_jax.config import LoRARule
from unimoe_jax.nn.linear import (
    LayerOptions,
    LinearParameters,
    adapter_seed,
    apply_linear,
    row_dropout,
)
from unimoe_jax.parallel.sharding import current_mesh, current_platform, data_shards, shard

# Positions per block and data shard. On CPUs the logits of a block have to fit the caches. On other
# platforms every block reads the whole kernel from memory, which pays only for a large block.
BLOCKS = {"cpu": 256}
ACCELERATOR_BLOCK = 2048

Weights = Mapping[str, jax.Array]


def block_size(positions: int) -> int:
    """Return the number of positions in a block, for a data shard that holds `positions`."""
    return min(BLOCKS.get(current_platform(), ACCELERATOR_BLOCK), positions)


@dataclass(frozen=True)
class Head:
    """The static part of a head; calling it computes logits with `nn.linear.apply_linear`.

    Attributes:
        dtype: the dtype of the factors of the products, and to which logits are rounded.
        rule: the adapter rule of the head, or None if it has no adapter.
    """

    dtype: Any
    rule: LoRARule | None = None

    def __call__(
        self, weights: Weights, x_RD: jax.Array, row_R: jax.Array, seed: jax.Array | None
    ) -> jax.Array:
        """Return logits [R,V] in float32, rounded to `dtype`.

        Args:
            weights: the arrays that `apply_linear` takes.
            x_RD: hidden states of R positions.
            row_R: uint32, the number of each position in the batch; adapter dropout depends on it.
            seed: uint32 seed of the adapter's dropout, or None if nothing is dropped.
        """
        drop = None
        if self.rule is not None and seed is not None:
            drop = partial(row_dropout, row_R=row_R, seed=seed, rate=self.rule.dropout)
        y = apply_linear(weights, x_RD, self.dtype, self.rule, drop)
        return y.astype(self.dtype).astype(jnp.float32)


class HeadWeights(LinearParameters):
    """Declares the parameters of a linear head, without applying it; `token_loss` does that.

    Calling it with the width of the hidden states returns the head, its weights, and the seed of
    the adapter's dropout (None if nothing is dropped).
    """

    @nn.compact
    def __call__(self, inputs: int) -> tuple[Head, Weights, jax.Array | None]:
        rule = self.options.adapter(self.path)
        head = Head(self.options.dtype, rule)
        return head, self.weights(inputs, rule), adapter_seed(self, self.options, rule)


def tied_head(embedding_VD: jax.Array, options: LayerOptions) -> tuple[Head, Weights, None]:
    """Return what `HeadWeights` returns, for a head that shares the embedding table."""
    return Head(options.dtype), {"kernel": embedding_VD.T}, None


class TokenLoss(NamedTuple):
    """The loss of a batch.

    total: float32 scalar, the sum of weight · −log p(target). Only this part has a gradient.
    nll_BT: float32, the terms of that sum.
    exact_BT: bool, True where the most likely token is the target and where there is no target.
        None unless it was asked for. Greedy decoding reproduces a segment exactly if this is True
        in the whole segment: by induction each greedy token equals the reference, so that the next
        token is predicted from the prefix of the reference.
    """

    total: jax.Array
    nll_BT: jax.Array
    exact_BT: jax.Array | None


def token_loss(
    head: Head,
    weights: Weights,
    hidden_BTD: jax.Array,
    target_BT: jax.Array,
    weight_BT: jax.Array,
    seed: jax.Array | None = None,
    exact: bool = False,
) -> TokenLoss:
    """Return the cross-entropy of `target_BT` under the logits of `head(weights, hidden_BTD)`.

    The loss is differentiable in the weights and in the hidden states, but not in `weight_BT`.
    Positions without a target cost nothing, apart from those that fill the last block of a data
    shard.

    Args:
        target_BT: int32, the token to predict at each position.
        weight_BT: float32, the weight of each position; 0 means that it has no target.
        seed: uint32 seed of the adapter's dropout, or None if nothing is dropped.
        exact: whether `TokenLoss.exact_BT` is computed.
    """
    row_BT = jnp.arange(target_BT.size, dtype=jnp.uint32).reshape(target_BT.shape)
    mesh = current_mesh()
    groups = data_shards(mesh) if mesh else 1
    rows = _Rows(hidden_BTD, target_BT, weight_BT, row_BT)
    # Give every data shard its positions on one axis, so that each sorts and walks its positions
    # without exchanging any with the others.
    rows = jax.tree.map(lambda a: _over_shards(a.reshape(groups, -1, *a.shape[2:])), rows)
    loss = _loss(_LossSettings(head, exact), dict(weights), rows, seed)
    total, nll_GN, exact_GN = cast(_Loss, loss)  # pyright does not see through custom_vjp
    nll_BT = jax.lax.stop_gradient(nll_GN).reshape(target_BT.shape)
    exact_BT = None if exact_GN is None else exact_GN.reshape(target_BT.shape)
    return TokenLoss(total, nll_BT, exact_BT)


# ---------------------------------------------------------------------------- the custom gradient


class _Rows(NamedTuple):
    """The positions of a batch, every array [G data shards, N positions, …].

    x_GND: hidden states. target_GN: int32. weight_GN: float32, 0 without a target.
    row_GN: uint32, the number of the position in the batch.
    """

    x_GND: jax.Array
    target_GN: jax.Array
    weight_GN: jax.Array
    row_GN: jax.Array


@dataclass(frozen=True)
class _LossSettings:
    """The static arguments of a loss: the head, and whether `exact` results are wanted."""

    head: Head
    exact: bool


class _Results(NamedTuple):
    """The results of blocks, with the positions that have a target first.

    nll_GN: float32. exact_GN: bool, or None if it is not wanted.
    dx_GND: the gradient of the total with respect to hidden states, or None if it is not wanted.
    dweights: the gradients of the total with respect to the trained weights, float32 [G,…].
    """

    nll_GN: jax.Array
    exact_GN: jax.Array | None
    dx_GND: jax.Array | None
    dweights: list[jax.Array]


_Loss = tuple[jax.Array, jax.Array, jax.Array | None]
"""(total, its terms [G,N], exact [G,N] or None)."""


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(settings: _LossSettings, weights: Weights, rows: _Rows, seed: jax.Array | None) -> _Loss:
    """Return the loss in blocks; if it is differentiated, the forward pass computes the gradients.

    The total is a scalar, so the backward pass only has to multiply these gradients by the gradient
    g of the total.

    Example: one position with x = 1, kernel [[ln 3, 0]], target 1 and weight 2. The logits (1.1, 0)
    give the probabilities (0.75, 0.25) and the loss 2 · ln 4 = 2.77. The gradient of the logits is
    2 · (0.75, 0.25 − 1) = (1.5, −1.5), hence dkernel = [[1.5, −1.5]] and dx = 1.5 · ln 3 = 1.65.
    """
    results, place_GN = _walk_blocks(settings, weights, rows, seed, None)
    return _in_batch_order(results, rows, place_GN)


def _loss_fwd(settings: _LossSettings, weights, rows, seed):
    trained = [name for name, weight in weights.items() if weight.perturbed]
    weights, rows, seed = jax.tree.map(lambda a: a.value, (weights, rows, seed))
    results, place_GN = _walk_blocks(settings, weights, rows, seed, trained)
    assert results.dx_GND is not None  # because `trained` is not None
    dx_GND = _zero_without_target(_take_positions(results.dx_GND, place_GN), rows)
    dweights = dict.fromkeys(weights)
    for name, dw in zip(trained, results.dweights, strict=True):
        # Sum over data shards once, after all blocks, and straight into the shards of the weights.
        dw = shard(jnp.sum(dw, axis=0), *_AXES[name])
        dweights[name] = dw.astype(weights[name].dtype)
    return _in_batch_order(results, rows, place_GN), (dweights, dx_GND)


def _loss_bwd(settings: _LossSettings, residuals, cotangents):
    del settings
    g = cotangents[0]
    g = jnp.zeros(()) if isinstance(g, SymbolicZero) else g
    dweights, dx_GND = jax.tree.map(lambda a: (g * a).astype(a.dtype), residuals)
    # None stands for a gradient of zero: targets, loss weights and row numbers have none.
    no_gradient: Any = None
    drows = _Rows(dx_GND, no_gradient, no_gradient, no_gradient)
    return dweights, drows, None


_loss.defvjp(_loss_fwd, _loss_bwd, symbolic_zeros=True)


# ------------------------------------------------------------------------------ in blocks

# Logical axes of the weights as they are stored.
_AXES = {
    "kernel": ("embed", "vocab"),
    "bias": ("vocab",),
    "lora_a": ("embed", "rank"),
    "lora_b": ("rank", "vocab"),
}


def _axes_in_use(name: str) -> list[str | None]:
    """Return the logical axes of a weight as blocks use it: gathered along what fsdp cuts."""
    return [None if axis == "embed" else axis for axis in _AXES[name]]


def _gather_weight(name: str, weight: jax.Array, dtype: Any) -> jax.Array:
    """Cast a weight to the dtype of the head and gather it; a bias is added in float32."""
    return shard(weight.astype(jnp.float32 if name == "bias" else dtype), *_axes_in_use(name))


def _over_shards(a: jax.Array) -> jax.Array:
    """Constrain a [G,…] so that every data shard holds its part of the first axis."""
    return shard(a, "batch", *[None] * (a.ndim - 1))


def _with_shardings(results: _Results, trained: Sequence[str] | None) -> _Results:
    """Constrain the results that a loop carries, so that no trip exchanges them between devices.

    Every data shard keeps its own rows and sums, and the vocabulary stays cut.
    """
    named = zip(trained or (), results.dweights, strict=True)
    dweights = [shard(dw, "batch", *_axes_in_use(name)) for name, dw in named]
    per_position = jax.tree.map(_over_shards, results._replace(dweights=[]))
    return per_position._replace(dweights=dweights)


def _walk_blocks(
    settings: _LossSettings,
    weights: Weights,
    rows: _Rows,
    seed: jax.Array | None,
    trained: Sequence[str] | None,
) -> tuple[_Results, jax.Array]:
    """Return the results of all blocks, and the place of every position in them, int32 [G,N].

    Example: a shard has five positions with the weights (0, 1, 0, 2, 1), and blocks of two. The
    order is (1, 3, 4, 0, 2, 0) with padding at the end, and count is 3. Two blocks are computed,
    of the positions (1, 3) and (4, 0); position 0 is there to fill the block, so its weight is set
    to 0. The places are (−1, 0, 0, 1, 2), of which those of positions without a target are ignored.

    Args:
        trained: names of the weights whose gradients are wanted. None means that no gradient at all
            is wanted, not even that of the hidden states.
    """
    weights = {
        name: _gather_weight(name, weight, settings.head.dtype) for name, weight in weights.items()
    }
    length = rows.x_GND.shape[1]
    size = block_size(length)

    # Sort positions with a target to the front, and pad the order to whole blocks.
    has_target_GN = rows.weight_GN > 0
    count_G = jnp.sum(has_target_GN, axis=1)
    order_GN = jnp.argsort(~has_target_GN, axis=1, stable=True).astype(jnp.int32)
    order_GN = jnp.pad(order_GN, ((0, 0), (0, -length % size)))
    one_block = jax.vmap(partial(_one_block, settings, weights, seed, trained))

    def step(i, results: _Results) -> _Results:
        start = i * size
        index_GC = jax.lax.dynamic_slice_in_dim(order_GN, start, size, axis=1)
        # Positions behind the last target only fill the block: their weight becomes 0.
        in_use_GC = start + jnp.arange(size)[None] < count_G[:, None]
        block = jax.tree.map(lambda a: _take_positions(a, index_GC), rows)
        new = one_block(block._replace(weight_GN=jnp.where(in_use_GC, block.weight_GN, 0.0)))
        # Write the results of positions to their places, and add up the gradients of weights.
        write = partial(jax.lax.dynamic_update_slice_in_dim, start_index=start, axis=1)
        written = jax.tree.map(write, results._replace(dweights=[]), new._replace(dweights=[]))
        dweights = [a + b for a, b in zip(results.dweights, new.dweights, strict=True)]
        return _with_shardings(written._replace(dweights=dweights), trained)

    empty = _empty_results(settings, weights, rows, order_GN.shape[1], trained)
    # All data shards take as many trips as the shard with the most targets.
    trips = -(-jnp.max(count_G) // size)
    results = jax.lax.fori_loop(0, trips, step, _with_shardings(empty, trained))
    return results, jnp.cumsum(has_target_GN, axis=1, dtype=jnp.int32) - 1


def _empty_results(
    settings: _LossSettings,
    weights: Weights,
    rows: _Rows,
    places: int,
    trained: Sequence[str] | None,
) -> _Results:
    """Return zeros for the results of `places` positions per data shard."""
    groups, _, width = rows.x_GND.shape
    nll_GN = jnp.zeros((groups, places))
    exact_GN = jnp.zeros((groups, places), bool) if settings.exact else None
    dx_GND = None if trained is None else jnp.zeros((groups, places, width), rows.x_GND.dtype)
    dweights = [jnp.zeros((groups, *weights[name].shape)) for name in trained or ()]
    return _Results(nll_GN, exact_GN, dx_GND, dweights)


def _one_block(
    settings: _LossSettings,
    weights: Weights,
    seed: jax.Array | None,
    trained: Sequence[str] | None,
    rows: _Rows,
) -> _Results:
    """Return the results of one block of C positions of one data shard; rows are [C,…]."""
    x_CD, target_C, weight_C, row_C = rows

    def logits_of(trained_weights: Weights, x_CD: jax.Array) -> jax.Array:
        return settings.head({**weights, **trained_weights}, x_CD, row_C, seed)

    if trained is None:
        logits_CV, pull = logits_of({}, x_CD), None
    else:
        logits_CV, pull = jax.vjp(logits_of, {name: weights[name] for name in trained}, x_CD)

    log_z_C = jax.nn.logsumexp(logits_CV, axis=-1)
    # Find the target's logit by a comparison. A gather would collect all logits on one device where
    # a mesh axis cuts the vocabulary.
    hit_CV = jnp.arange(logits_CV.shape[1])[None] == target_C[:, None]
    nll_C = weight_C * (log_z_C - jnp.sum(jnp.where(hit_CV, logits_CV, 0.0), axis=-1))
    exact_C = jnp.argmax(logits_CV, axis=-1) == target_C if settings.exact else None
    if trained is None or pull is None:
        return _Results(nll_C, exact_C, None, [])

    # The gradient of −log p(target) with respect to the logits is probabilities − one-hot target.
    probs_CV = jnp.exp(logits_CV - log_z_C[:, None])
    dtrained, dx_CD = pull(weight_C[:, None] * (probs_CV - hit_CV))
    dweights = [dtrained[name].astype(jnp.float32) for name in trained]
    return _Results(nll_C, exact_C, dx_CD, dweights)


def _take_positions(a_GN: jax.Array, index_GC: jax.Array) -> jax.Array:
    """Return a[g, index[g, c]], with all axes of a behind the second kept."""
    index = index_GC.reshape(*index_GC.shape, *[1] * (a_GN.ndim - 2))
    return jnp.take_along_axis(a_GN, index, axis=1)


def _zero_without_target(a_GN: jax.Array, rows: _Rows) -> jax.Array:
    """Return a [G,N,…] with zeros at positions that have no target."""
    has_target = (rows.weight_GN > 0).reshape(*rows.weight_GN.shape, *[1] * (a_GN.ndim - 2))
    return jnp.where(has_target, a_GN, 0)


def _in_batch_order(results: _Results, rows: _Rows, place_GN: jax.Array) -> _Loss:
    """Return the loss with its terms at the positions of the batch instead of their sorted places.

    Positions without a target get the term 0 and count as exact.
    """
    nll_GN = _zero_without_target(_take_positions(results.nll_GN, place_GN), rows)
    exact_GN = results.exact_GN
    if exact_GN is not None:
        exact_GN = _take_positions(exact_GN, place_GN) | (rows.weight_GN == 0)
    return jnp.sum(nll_GN), nll_GN, exact_GN
