"""AdamW for the trained parameters only, with per-parameter multipliers from the rules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from unimoe_jax.config import OptimConfig
from unimoe_jax.params.table import ParamInfo

Schedule = Callable[[Any], jax.Array]
"""Optimizer step (an int or an int array) -> learning rate."""


def learning_rate(config: OptimConfig, steps: int) -> Schedule:
    """Learning rate at optimizer step n (from 0), before the multipliers of the rules.

    It rises linearly from 0 over ceil(warmup_ratio · steps), then follows the schedule down to
    final_ratio · learning_rate.
    """
    peak, floor = config.learning_rate, config.final_ratio * config.learning_rate
    warmup = int(-(-config.warmup_ratio * steps // 1))

    def schedule(step):
        step = jnp.asarray(step, jnp.float32)
        progress = jnp.clip((step - warmup) / max(1, steps - warmup), 0.0, 1.0)
        match config.schedule:
            case "cosine":
                after = floor + (peak - floor) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
            case "linear":
                after = peak + (floor - peak) * progress
            case "constant":
                after = jnp.full_like(progress, peak)
        return jnp.where(step < warmup, peak * step / max(1, warmup), after)

    return schedule


def make_optimizer(
    config: OptimConfig, schedule: Schedule, infos: Mapping[str, ParamInfo]
) -> optax.GradientTransformation:
    """Clip gradients, apply AdamW (arXiv 1711.05101), then the multiplier of each parameter's rule.

    The caller passes only trained parameters, so state exists for these only.
    """
    trained = {path: info for path, info in infos.items() if info.trained}

    def multiply(updates, state, params=None):
        del params
        return {path: u * trained[path].lr for path, u in updates.items()}, state

    decayed = {path: info.weight_decay for path, info in trained.items()}
    steps = [
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        optax.scale_by_adam(config.b1, config.b2, config.eps),
    ]
    if config.weight_decay:
        steps.append(optax.add_decayed_weights(config.weight_decay, mask=decayed))
    steps += [
        optax.GradientTransformation(lambda params: optax.EmptyState(), multiply),
        optax.scale_by_learning_rate(schedule),
    ]
    return optax.chain(*steps)


def steps_made(state: optax.OptState) -> jax.Array:
    """How many steps the schedule has made, read from the optimizer's state.

    A step that was skipped because it was not finite does not count.
    """

    def is_schedule(path, value) -> bool:
        del value
        return getattr(path[-1], "tuple_name", None) == optax.ScaleByScheduleState.__name__

    return optax.tree.get(state, "count", filtering=is_schedule)
