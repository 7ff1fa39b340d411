"""Experts, routings and inputs for the tests of dispatch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from unimoe_jax.config import LoRARule
from unimoe_jax.nn.moe.dispatch import moe_ffn
from unimoe_jax.nn.moe.experts import ExpertFunction, MlpExpert, SwiGLUExpert

EXPERTS, WIDTH, HIDDEN, RANK = 4, 6, 10, 2
LORA = LoRARule(match=".*", rank=RANK, alpha=3.0, dropout=0.3)
MLP = MlpExpert(jnp.float32, (("fc1", LORA), ("fc2", LORA)))
SWIGLU = SwiGLUExpert(jnp.float32, (("gate_proj", LORA), ("down_proj", LORA)))
ROUTINGS = ("balanced", "skewed", "one", "empty", "none", "some_none")


def weights_of(expert_fn: ExpertFunction, seed: int = 0) -> dict[str, dict[str, np.ndarray]]:
    """Random weights, biases for MLP experts, both halves of every adapter."""
    rng = np.random.default_rng(seed)
    if isinstance(expert_fn, SwiGLUExpert):
        sizes = dict.fromkeys(("gate_proj", "up_proj"), (WIDTH, HIDDEN))
        sizes["down_proj"] = (HIDDEN, WIDTH)
    else:
        sizes = {"fc1": (WIDTH, HIDDEN), "fc2": (HIDDEN, WIDTH)}
    weights = {}
    for name, (inputs, features) in sizes.items():
        shapes = {"kernel": (EXPERTS, inputs, features)}
        if isinstance(expert_fn, MlpExpert):
            shapes["bias"] = (EXPERTS, features)
        if name in dict(expert_fn.adapters):
            shapes |= {"lora_a": (EXPERTS, inputs, RANK), "lora_b": (EXPERTS, RANK, features)}
        weights[name] = {
            key: 0.5 * rng.standard_normal(shape, np.float32) for key, shape in shapes.items()
        }
    return weights


def routing(name: str, rows: int, length: int, top_k: int, seed: int = 0):
    """(expert_BTK int32, weight_BTK float32) of a named distribution."""
    rng = np.random.default_rng(seed)
    slots = rows * length
    if name == "balanced":
        first = np.arange(slots) % EXPERTS
    elif name == "skewed":
        first = np.minimum(rng.geometric(0.6, slots) - 1, EXPERTS - 1)
    elif name in ("one", "none"):
        first = np.full(slots, 2 if name == "one" else EXPERTS)
    elif name == "empty":  # experts 1 and 3 get nothing
        first = 2 * rng.integers(0, EXPERTS // 2, slots)
    else:
        first = rng.integers(0, EXPERTS + 1, slots)
    step = {"one": 0, "none": 0, "empty": 2}.get(name, 1)
    expert = (first[:, None] + step * np.arange(top_k)) % EXPERTS
    expert = np.where(first[:, None] == EXPERTS, EXPERTS, expert)
    weight = rng.uniform(0.1, 1.0, expert.shape)
    shape = (rows, length, top_k)
    return expert.reshape(shape).astype(np.int32), weight.reshape(shape).astype(np.float32)


def inputs_of(rows: int, length: int, seed: int = 1) -> np.ndarray:
    """Random tokens [B,T,D]."""
    shape = (rows, length, WIDTH)
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def values_and_gradients(
    expert_fn: ExpertFunction, method: str, form: str = "auto", keep: bool = False
):
    """f(weights, x, expert, weight, seed) -> (y, gradients of weights, x and weight)."""

    def loss(weights, x, weight, expert, seed):
        y = moe_ffn(expert_fn, weights, x, expert, weight, seed, method, form, keep)
        # Not a plain sum: every output element pulls differently.
        pull = jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)
        return jnp.sum(pull * y.astype(jnp.float32)), y

    grad = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)

    @jax.jit
    def run(weights, x, expert, weight, seed=np.uint32(7)):
        gradients, y = grad(weights, x, weight, expert, seed)
        return y, gradients

    return run
