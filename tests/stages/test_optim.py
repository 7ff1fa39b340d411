"""Schedules, AdamW, multipliers, weight decay."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from unimoe_jax.config import OptimConfig
from unimoe_jax.params.table import ParamInfo
from unimoe_jax.stages.optim import learning_rate, make_optimizer

PEAK, STEPS = 2.0, 100


def rates(schedule: str, steps, **fields):
    """The learning rates at some steps."""
    config = OptimConfig(learning_rate=PEAK, steps=STEPS, schedule=schedule, **fields)
    return [float(learning_rate(config, STEPS)(step)) for step in steps]


def test_warm_up_is_linear_from_zero():
    values = rates("constant", (0, 1, 5, 10, 11, 99), warmup_ratio=0.1)
    np.testing.assert_allclose(values, [0, 0.2, 1, 2, 2, 2], rtol=1e-6)
    # A warm-up of a part of a step is rounded up to one step, as in the originals.
    np.testing.assert_allclose(rates("constant", (0, 1), warmup_ratio=0.001), [0, 2])
    np.testing.assert_allclose(rates("constant", (0,), warmup_ratio=0), [2])


@pytest.mark.parametrize(
    ("schedule", "middle", "quarter"),
    [("cosine", 1.1, 1.1 + 0.9 / np.sqrt(2)), ("linear", 1.1, 1.55), ("constant", 2, 2)],
)
def test_after_warm_up(schedule: str, middle: float, quarter: float):
    """After 20 steps of warm-up the rate falls for 80 steps to a tenth, and stays there."""
    end = PEAK if schedule == "constant" else 0.2
    fields = dict(warmup_ratio=0.2, final_ratio=0.1)
    values = rates(schedule, (20, 40, 60, 100, 150), **fields)
    np.testing.assert_allclose(values, [2, quarter, middle, end, end], rtol=1e-5)


INFOS = {
    "a": ParamInfo("a", (3,), (None,), 1.0, True, "float32"),
    "b": ParamInfo("b", (3,), (None,), 0.5, True, "float32"),
    "c": ParamInfo("c", (3,), (None,), 1.0, False, "float32"),
    "frozen": ParamInfo("frozen", (3,), (None,), None, True, "bfloat16"),
}
PARAMS = {name: jnp.array([1.0, -2.0, 3.0]) for name in "abc"}
GRADS = {name: jnp.array([0.1, 0.2, -3.0]) for name in "abc"}


def update(steps: int = 3, infos=INFOS, **fields) -> dict[str, np.ndarray]:
    """The parameters after some steps with the same gradients."""
    config = OptimConfig(learning_rate=0.1, steps=10, schedule="constant", warmup_ratio=0, **fields)
    optimizer = make_optimizer(config, learning_rate(config, 10), infos)
    params, state = PARAMS, optimizer.init(PARAMS)
    for _ in range(steps):
        updates, state = optimizer.update(GRADS, state, params)
        params = optax.apply_updates(params, updates)
    return {name: np.asarray(leaf) for name, leaf in params.items()}


def adamw(multiplier: float, decay: float, steps: int = 3) -> np.ndarray:
    """The parameters after some steps of AdamW: arXiv 1711.05101, algorithm 2, in float64."""
    x, g = np.array([1.0, -2.0, 3.0]), np.array([0.1, 0.2, -3.0])
    m, v = np.zeros(3), np.zeros(3)
    for t in range(1, steps + 1):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        step = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        x = x - 0.1 * multiplier * (step + decay * x)
    return x


def test_adamw_with_multipliers_and_decay_mask():
    params = update(weight_decay=0.3)
    np.testing.assert_allclose(params["a"], adamw(1.0, 0.3), rtol=1e-5)
    np.testing.assert_allclose(params["b"], adamw(0.5, 0.3), rtol=1e-5)
    np.testing.assert_allclose(params["c"], adamw(1.0, 0.0), rtol=1e-5)
    np.testing.assert_allclose(update()["a"], adamw(1.0, 0.0), rtol=1e-5)


def test_clipping_is_by_the_norm_of_all_gradients():
    """With eps far above the gradient, an update is a multiple of the gradient.

    Otherwise AdamW would hide the clipping, because it divides the gradient by its size.
    """
    plain = update(1, eps=1e3, clip_norm=None)["a"] - np.asarray(PARAMS["a"])
    clipped = update(1, eps=1e3, clip_norm=1.0)["a"] - np.asarray(PARAMS["a"])
    norm = float(optax.tree.norm(GRADS))
    assert norm > 1
    np.testing.assert_allclose(clipped, plain / norm, rtol=2e-2)


def test_only_trained_parameters_have_optimizer_state():
    config = OptimConfig(learning_rate=0.1, steps=10, weight_decay=0.1, clip_norm=1)
    optimizer = make_optimizer(config, learning_rate(config, 10), INFOS)
    paths = jax.tree_util.tree_leaves_with_path(optimizer.init(PARAMS))
    named = [keys[-1].key for keys, leaf in paths if leaf.ndim]
    assert sorted(named) == ["a", "a", "b", "b", "c", "c"]  # two moments each
