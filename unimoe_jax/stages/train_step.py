"""One jitted, sharded train step for every stage.

Gradients and optimizer state exist for the trained parameters only, because the parameters are
split before the gradient is taken. A step whose loss or gradient is not finite changes neither
parameters nor optimizer, and is counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from unimoe_jax.config import AuxLossConfig, ModelConfig
from unimoe_jax.config.media import MODALITY
from unimoe_jax.data.batch import Batch
from unimoe_jax.metrics.series import metric_name
from unimoe_jax.models.unimoe import UniMoE
from unimoe_jax.nn.moe.layer import MoEAux
from unimoe_jax.params.paths import Flat, nest
from unimoe_jax.stages.losses import modality_losses, modality_sums, router_losses
from unimoe_jax.stages.optim import Schedule, steps_made


class TrainState(NamedTuple):
    """What a step changes; also a tree of its shapes or shardings.

    step: int32, steps done. trained: float32 by path. optimizer: its state.
    seed: uint32, of dropout and of sampled experts.
    bad_steps: int32, how many steps in a row were skipped because they were not finite.
    """

    step: Any
    trained: Flat
    optimizer: Any
    seed: Any
    bad_steps: Any


def init_state(trained: Flat, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    """State at step 0."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        trained=trained,
        optimizer=optimizer.init(trained),
        seed=jnp.asarray(seed, jnp.uint32),
        bad_steps=jnp.zeros((), jnp.int32),
    )


def make_train_step(
    model: UniMoE,
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
    aux_config: AuxLossConfig,
    accumulate: int,
    groups: int,
):
    """Make `step(state, frozen, batch) -> (state, metrics)`, a pure function that the caller jits.

    The batch holds `accumulate` micro-batches: rows and pools are grouped by pool group, and
    within a group by micro-batch. The loss is the mean over all target tokens of the whole batch,
    however they are spread over micro-batches. Statistics and losses of routers are means over
    micro-batches, weighted by the number of tokens or images that a micro-batch routes (`routed`).

    Metrics: loss, aux, grad_norm, lr, tokens (positions that are not padding), targets,
    nll_by_modality and targets_by_modality (see `modality_sums`), bad (1 if the step was skipped),
    bad_steps, and modality_experts and modality_kl if they have a coefficient. With experts also
    balance, router_z, entropy [L], load [L, modalities, E] and, if experts have a capacity,
    dropped (slots in all layers) of the decoder's routers; metrics of other modules have the
    module's name in front, such as encoder_load.
    """
    grad_fn = jax.value_and_grad(partial(_micro_loss, model, aux_config, accumulate), has_aux=True)

    def step(state: TrainState, frozen: Flat, batch: Batch):
        total = jnp.maximum(jnp.sum(batch.weight_BT), 1.0)
        all_routed = routed(model.config, batch)
        key = jax.random.fold_in(jax.random.key(state.seed), state.step)
        # One micro-batch needs no loop. Several are scanned over, and their metrics and gradients
        # are sums of shares (see `_micro_loss`), so adding them up gives those of the whole batch.
        if accumulate == 1:
            (_, metrics), grads = grad_fn(state.trained, frozen, batch, total, all_routed, key)
        else:

            def add_micro_batch(carry, item):
                micro, index = item
                micro_key = jax.random.fold_in(key, index)
                shared = (total, all_routed, micro_key)
                (_, metrics), grads = grad_fn(state.trained, frozen, micro, *shared)
                return jax.tree.map(jnp.add, carry, (metrics, grads)), None

            micros = jax.tree.map(lambda a: _micro_batches(a, groups, accumulate), batch)
            first = jax.tree.map(lambda a: a[0], micros)
            shared = (total, all_routed, key)
            shapes = jax.eval_shape(grad_fn, state.trained, frozen, first, *shared)
            zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
            carry = (zeros[0][1], zeros[1])
            (metrics, grads), _ = jax.lax.scan(
                add_micro_batch, carry, (micros, jnp.arange(accumulate))
            )
        metrics |= {
            "lr": schedule(steps_made(state.optimizer)),
            "tokens": jnp.sum(batch.segment_BT > 0),
            "targets": jnp.sum(batch.weight_BT),
        }
        return _update(optimizer, state, grads, metrics)

    return step


def _micro_loss(
    model: UniMoE,
    aux_config: AuxLossConfig,
    accumulate: int,
    trained: Flat,
    frozen: Flat,
    batch: Batch,
    total: jax.Array,
    all_routed: Mapping[str, jax.Array],
    key: jax.Array,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """This micro-batch's share of the loss over the whole batch, and its share of the metrics.

    total: target tokens of the whole batch. all_routed: `routed` of the whole batch.
    """
    rngs = {"dropout": jax.random.fold_in(key, 0), "router": jax.random.fold_in(key, 1)}
    out: Any = model.apply({"params": nest({**frozen, **trained})}, batch, "loss", rngs=rngs)
    ce = out.loss.total / total
    here = routed(model.config, batch)
    share = {name: here[name] / jnp.maximum(all_routed[name], 1.0) for name in out.aux}
    routers = {name: _times(found, share[name]) for name, found in out.aux.items()}
    aux = router_losses(routers, aux_config)
    metrics = {"loss": ce, **_moe_metrics(routers)}
    for name, value in modality_losses(out.aux, batch.modality_BT, aux_config.modality).items():
        aux += getattr(aux_config.modality, name) * value / accumulate
        metrics[f"modality_{name}"] = value / accumulate
    metrics["aux"] = aux
    sums = {"nll_by_modality": out.loss.nll_BT, "targets_by_modality": batch.weight_BT}
    for name, value_BT in sums.items():
        metrics[name] = modality_sums(value_BT, batch.segment_BT, batch.modality_BT)
    return ce + aux, metrics


def routed(config: ModelConfig, batch: Batch) -> dict[str, jax.Array]:
    """How much each module's routers have to route in a batch, float32, up to a constant factor.

    The decoder routes tokens; the vision encoder and connector route images and frames of videos.
    """
    found = {"decoder": jnp.sum(batch.segment_BT > 0)}
    if config.vision is not None:
        frames = config.vision.frames
        if config.vision.unused_images == "count":
            pools = (batch.image_GIHWC, 1), (batch.video_GIFHWC, frames)
            counts = [n * pool.shape[0] * pool.shape[1] for pool, n in pools if pool is not None]
        else:
            # Every image that a token refers to has the same number of soft tokens, so the number
            # of soft tokens is proportional to the number of images.
            kinds = (MODALITY["image"], 1), (MODALITY["video"], frames)
            counts = [n * jnp.sum(batch.modality_BT == kind) for kind, n in kinds]
        found |= dict.fromkeys(("encoder", "connector"), sum(counts))
    return {name: jnp.asarray(number, jnp.float32) for name, number in found.items()}


def _times(moe: MoEAux, share: jax.Array) -> MoEAux:
    """Scale the router statistics that are means by this micro-batch's share."""
    means = {name: share * getattr(moe, name) for name in ("balance", "router_z", "entropy")}
    return moe._replace(**means)


def _update(
    optimizer: optax.GradientTransformation, state: TrainState, grads: Flat, metrics: dict
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Apply the optimizer, unless loss or gradient is not finite."""
    norm = optax.tree.norm(grads)
    good = jnp.isfinite(norm) & jnp.isfinite(metrics["loss"])
    updates, new_optimizer = optimizer.update(grads, state.optimizer, state.trained)
    new_trained = optax.apply_updates(state.trained, updates)

    def keep(new, old):
        # An elementwise `where` reuses the donated buffers; `cond` would copy them.
        return jnp.where(good, new, old)

    bad_steps = jnp.where(good, 0, state.bad_steps + 1)
    metrics |= {"grad_norm": norm, "bad": 1 - good.astype(jnp.int32), "bad_steps": bad_steps}
    state = TrainState(
        step=state.step + 1,
        trained=jax.tree.map(keep, new_trained, state.trained),
        optimizer=jax.tree.map(keep, new_optimizer, state.optimizer),
        seed=state.seed,
        bad_steps=bad_steps,
    )
    return state, metrics


def _moe_metrics(aux: Mapping[str, MoEAux]) -> dict[str, jax.Array]:
    """Router statistics of all modules as metrics."""
    metrics = {}
    for module, moe in aux.items():
        found = {
            "balance": jnp.mean(moe.balance),
            "router_z": jnp.mean(moe.router_z),
            "entropy": moe.entropy,
            "load": moe.load_ME,
        }
        if moe.dropped is not None:
            found["dropped"] = jnp.sum(moe.dropped)
        metrics |= {metric_name(module, name): value for name, value in found.items()}
    return metrics


def _micro_batches(a: jax.Array, groups: int, accumulate: int) -> jax.Array:
    """[groups·accumulate·n, …] -> [accumulate, groups·n, …].

    With 2 groups (one per device), accumulate = 2 and n = 1, rows 0 1 | 2 3 become the
    micro-batches (0, 2) and (1, 3), so every row stays on its device.
    """
    a = a.reshape(groups, accumulate, -1, *a.shape[1:])
    return jnp.moveaxis(a, 1, 0).reshape(accumulate, -1, *a.shape[3:])
