"""The language model's head: logits, or the loss of a batch without its logits.

In training most positions ask for nothing, and the logits of all the others would be the largest
array of a step. So positions with a target are put first and walked in blocks; of a block's logits
remain the loss and, where a gradient will be asked for, what the loss passes down: both are known
as soon as the logits are (Liger kernels, arXiv 2410.10989, section 3.2).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from unimoe_jax.config import LoRARule
from unimoe_jax.nn.linear import LayerOptions, Linear, adapter_seed, apply_linear, row_dropout
from unimoe_jax.parallel.sharding import current_mesh, current_platform, data_shards, shard

# Positions per block and data shard: a CPU's logits stay in its caches, elsewhere a block pays for
# reading the kernel.
BLOCKS = {"cpu": 256}
ACCELERATOR_BLOCK = 2048

Weights = Mapping[str, jax.Array]


def block_size(positions: int) -> int:
    """Positions per block, of as many on a data shard."""
    return min(BLOCKS.get(current_platform(), ACCELERATOR_BLOCK), positions)


@dataclass(frozen=True)
class Head:
    """What is static about a head: `logits(weights, x, …)` is `nn.linear.apply_linear`."""

    dtype: Any
    rule: LoRARule | None = None

    def __call__(
        self, weights: Weights, x_RD: jax.Array, row_R: jax.Array, seed: jax.Array | None
    ) -> jax.Array:
        """Logits [R,V] float32, rounded to `dtype`, of rows numbered `row_R` (uint32)."""
        drop = None
        if seed is not None:
            drop = partial(row_dropout, row_R=row_R, seed=seed, rate=self.rule.dropout)
        y = apply_linear(weights, x_RD, self.dtype, self.rule, drop)
        return y.astype(self.dtype).astype(jnp.float32)


class HeadWeights(Linear):
    """Declares a head as the linear layer it is, for `token_loss` to apply.

    Returns (Head, weights, seed of the adapter's dropout or None).
    """

    @nn.compact
    def __call__(self, inputs: int) -> tuple[Head, Weights, jax.Array | None]:
        rule = self.options.adapter(self.path)
        head = Head(self.options.dtype, rule)
        return head, self.weights(inputs, rule), adapter_seed(self, self.options, rule)


def tied_head(embedding_VD: jax.Array, options: LayerOptions) -> tuple[Head, Weights, None]:
    """The same of a head that shares the embedding's table."""
    return Head(options.dtype), {"kernel": embedding_VD.T}, None


class TokenLoss(NamedTuple):
    """total: float32 scalar Σ weight · −log p(target), the only part with a gradient.

    nll_BT: float32, its summands. exact_BT: bool, the most likely token is the target, or there is
    no target here; None unless asked for. A segment that is exact throughout is answered exactly by
    greedy decoding: by induction each greedy token equals the reference, so the next one is
    predicted from the reference prefix.
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
    """Cross-entropy of `target_BT` (int32, where it is predicted) under `head(weights, hidden)`.

    Differentiable in the weights and hidden states, not in `weight_BT` (float32, 0: no target).
    Positions without target cost nothing, but for those that fill a data shard's last block.
    """
    row_BT = jnp.arange(target_BT.size, dtype=jnp.uint32).reshape(target_BT.shape)
    mesh = current_mesh()
    groups = data_shards(mesh) if mesh else 1
    rows = _Rows(hidden_BTD, target_BT, weight_BT, row_BT)
    rows = jax.tree.map(lambda a: _grouped(a.reshape(groups, -1, *a.shape[2:])), rows)
    total, nll_GN, exact_GN = _loss(_Job(head, exact), dict(weights), rows, seed)
    nll_BT = jax.lax.stop_gradient(nll_GN).reshape(target_BT.shape)
    return TokenLoss(total, nll_BT, exact_GN.reshape(target_BT.shape) if exact else None)


# --------------------------------------------------------------------------------- in blocks


class _Rows(NamedTuple):
    """[G data shards, N positions, …]: hidden states, targets, weights, numbers in the batch."""

    x_GND: jax.Array
    target_GN: jax.Array
    weight_GN: jax.Array
    row_GN: jax.Array


@dataclass(frozen=True)
class _Job:
    """head; exact: whether the most likely tokens are wanted."""

    head: Head
    exact: bool


class _Found(NamedTuple):
    """What blocks leave, positions with a target first; None where it is not wanted. dx_GND and
    dweights (a list, [G,…] float32, of the trained weights) are gradients of the total."""

    nll_GN: jax.Array
    exact_GN: jax.Array | None
    dx_GND: jax.Array | None
    dweights: list[jax.Array]


def _grouped(a: jax.Array) -> jax.Array:
    return shard(a, "batch", *[None] * (a.ndim - 1))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(job: _Job, weights: Weights, rows: _Rows, seed: jax.Array | None):
    """(total, summands [G,N], exact [G,N] or None)."""
    found, place_GN = _walk(job, weights, rows, seed, None)
    return _in_place(found, rows, place_GN)


def _loss_fwd(job: _Job, weights, rows, seed):
    trained = [name for name, weight in weights.items() if weight.perturbed]
    weights, rows, seed = jax.tree.map(lambda a: a.value, (weights, rows, seed))
    found, place_GN = _walk(job, weights, rows, seed, trained)
    dx_GND = _wanted(_taken(found.dx_GND, place_GN), rows)
    dweights = dict.fromkeys(weights)
    for name, dw in zip(trained, found.dweights, strict=True):
        # Summed over data shards once, straight into the shards of the weights.
        dw = shard(jnp.sum(dw, axis=0), *_AXES[name])
        dweights[name] = dw.astype(weights[name].dtype)
    return _in_place(found, rows, place_GN), (dweights, dx_GND)


def _loss_bwd(job: _Job, kept, cotangents):
    del job
    g = cotangents[0]
    g = jnp.zeros(()) if isinstance(g, SymbolicZero) else g
    dweights, dx_GND = jax.tree.map(lambda a: (g * a).astype(a.dtype), kept)
    return dweights, _Rows(dx_GND, None, None, None), None


_loss.defvjp(_loss_fwd, _loss_bwd, symbolic_zeros=True)

# Logical axes of the weights as they lie, and as blocks use them: put together from what fsdp cut.
_AXES = {
    "kernel": ("embed", "vocab"),
    "bias": ("vocab",),
    "lora_a": ("embed", "rank"),
    "lora_b": ("rank", "vocab"),
}


def _used(name: str) -> list[str | None]:
    return [None if axis == "embed" else axis for axis in _AXES[name]]


def _laid_out(found: _Found, trained: Sequence[str] | None) -> _Found:
    """Every data shard has its own rows and sums; the vocabulary stays cut."""
    pairs = zip(trained or (), found.dweights, strict=True)
    sums = [shard(dw, "batch", *_used(name)) for name, dw in pairs]
    return _Found(*jax.tree.map(_grouped, tuple(found[:3])), sums)


def _whole(name: str, weight: jax.Array, dtype: Any) -> jax.Array:
    return shard(weight.astype(jnp.float32 if name == "bias" else dtype), *_used(name))


def _walk(
    job: _Job, weights: Weights, rows: _Rows, seed, trained: Sequence[str] | None
) -> tuple[_Found, jax.Array]:
    """(what blocks leave, the place of every position there: int32 [G,N]).

    trained: weights whose gradients are wanted; None: no gradient at all.
    """
    weights = {name: _whole(name, weight, job.head.dtype) for name, weight in weights.items()}
    groups, length, width = rows.x_GND.shape
    size = block_size(length)
    asked_GN = rows.weight_GN > 0
    count_G = jnp.sum(asked_GN, axis=1)
    order_GN = jnp.argsort(~asked_GN, axis=1, stable=True).astype(jnp.int32)
    order_GN = jnp.pad(order_GN, ((0, 0), (0, -length % size)))
    positions = order_GN.shape[1]
    empty = _Found(
        jnp.zeros((groups, positions)),
        jnp.zeros((groups, positions), bool) if job.exact else None,
        None if trained is None else jnp.zeros((groups, positions, width), rows.x_GND.dtype),
        [jnp.zeros((groups, *weights[name].shape)) for name in trained or ()],
    )
    of_block = jax.vmap(partial(_block, job, weights, seed, trained))

    def step(i, found: _Found) -> _Found:
        at = i * size
        index_GC = jax.lax.dynamic_slice_in_dim(order_GN, at, size, axis=1)
        here_GC = at + jnp.arange(size)[None] < count_G[:, None]
        block = jax.tree.map(lambda a: _taken(a, index_GC), rows)
        new = of_block(block._replace(weight_GN=jnp.where(here_GC, block.weight_GN, 0.0)))
        written = [
            None if a is None else jax.lax.dynamic_update_slice_in_dim(a, b, at, axis=1)
            for a, b in zip(found[:3], new[:3], strict=True)
        ]
        sums = [a + b for a, b in zip(found.dweights, new.dweights, strict=True)]
        return _laid_out(_Found(*written, sums), trained)

    trips = -(-jnp.max(count_G) // size)
    found = jax.lax.fori_loop(0, trips, step, _laid_out(empty, trained))
    return found, jnp.cumsum(asked_GN, axis=1, dtype=jnp.int32) - 1


def _block(job: _Job, weights: Weights, seed, trained, rows: _Rows) -> _Found:
    """One block of one data shard: rows [C,…]."""
    x_CD, target_C, weight_C, row_C = rows

    def logits_of(some: Mapping[str, jax.Array], x_CD: jax.Array) -> jax.Array:
        return job.head({**weights, **some}, x_CD, row_C, seed)

    if trained is None:
        logits_CV = logits_of({}, x_CD)
    else:
        some = {name: weights[name] for name in trained}
        logits_CV, pull = jax.vjp(logits_of, some, x_CD)
    log_z_C = jax.nn.logsumexp(logits_CV, axis=-1)
    # A comparison, not a gather, which would collect logits that a mesh axis cuts.
    hit_CV = jnp.arange(logits_CV.shape[1])[None] == target_C[:, None]
    nll_C = weight_C * (log_z_C - jnp.sum(jnp.where(hit_CV, logits_CV, 0.0), axis=-1))
    exact_C = jnp.argmax(logits_CV, axis=-1) == target_C if job.exact else None
    if trained is None:
        return _Found(nll_C, exact_C, None, [])
    probs_CV = jnp.exp(logits_CV - log_z_C[:, None])
    dsome, dx_CD = pull(weight_C[:, None] * (probs_CV - hit_CV))
    return _Found(nll_C, exact_C, dx_CD, [dsome[name].astype(jnp.float32) for name in trained])


def _taken(a_GN: jax.Array, index_GC: jax.Array) -> jax.Array:
    """a[g, index[g, c]], with whatever axes follow."""
    index = index_GC.reshape(*index_GC.shape, *[1] * (a_GN.ndim - 2))
    return jnp.take_along_axis(a_GN, index, axis=1)


def _wanted(a_GN: jax.Array, rows: _Rows) -> jax.Array:
    """a where there is a target, 0 elsewhere."""
    asked = (rows.weight_GN > 0).reshape(*rows.weight_GN.shape, *[1] * (a_GN.ndim - 2))
    return jnp.where(asked, a_GN, 0)


def _in_place(found: _Found, rows: _Rows, place_GN: jax.Array):
    nll_GN = _wanted(_taken(found.nll_GN, place_GN), rows)
    exact_GN = found.exact_GN
    if exact_GN is not None:
        exact_GN = _taken(exact_GN, place_GN) | (rows.weight_GN == 0)
    return jnp.sum(nll_GN), nll_GN, exact_GN
