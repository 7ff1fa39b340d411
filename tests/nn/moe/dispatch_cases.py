"""Experts, routings and inputs for the tests of dispatch.

Arrays are numpy arrays, so that tests can change them; they are typed Any, because functions of
this package take jax arrays.
"""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from unimoe_jax.config import LoRARule
from unimoe_jax.nn.moe.dispatch import moe_ffn
from unimoe_jax.nn.moe.experts import ExpertFunction, MlpExpert, SwiGLUExpert
from unimoe_jax.nn.moe.mesh_layout import ExchangeSetting

EXPERTS, WIDTH, HIDDEN, RANK = 4, 6, 10, 2
LORA = LoRARule(match=".*", rank=RANK, alpha=3.0, dropout=0.3)
MLP = MlpExpert(jnp.float32, (("fc1", LORA), ("fc2", LORA)))
SWIGLU = SwiGLUExpert(jnp.float32, (("gate_proj", LORA), ("down_proj", LORA)))
ROUTINGS = ("balanced", "skewed", "one", "empty", "none", "some_none")


def weights_of(expert_fn: ExpertFunction, seed: int = 0) -> dict[str, dict[str, Any]]:
    """Return random weights: kernels, biases of MLP experts, and both halves of every adapter."""
    rng = np.random.default_rng(seed)
    wide, narrow = (WIDTH, HIDDEN), (HIDDEN, WIDTH)
    if isinstance(expert_fn, SwiGLUExpert):
        sizes = {"gate_proj": wide, "up_proj": wide, "down_proj": narrow}
    else:
        sizes = {"fc1": wide, "fc2": narrow}
    weights = {}
    for name, (inputs, features) in sizes.items():
        shapes: dict[str, tuple[int, ...]] = {"kernel": (EXPERTS, inputs, features)}
        if isinstance(expert_fn, MlpExpert):
            shapes["bias"] = (EXPERTS, features)
        if name in dict(expert_fn.adapters):
            shapes |= {"lora_a": (EXPERTS, inputs, RANK), "lora_b": (EXPERTS, RANK, features)}
        weights[name] = {
            key: 0.5 * rng.standard_normal(shape, np.float32) for key, shape in shapes.items()
        }
    return weights


def routing(name: str, rows: int, length: int, top_k: int, seed: int = 0) -> tuple[Any, Any]:
    """Return (expert_BTK int32, weight_BTK float32) of a named distribution of first choices.

    balanced: experts in turn. skewed: geometric, expert 0 is the most frequent. one: all choices
    are expert 2. none: no token has an expert. empty: the experts 1 and 3 get nothing. some_none:
    random, and some tokens have no expert.
    """
    rng = np.random.default_rng(seed)
    slots = rows * length
    if name == "balanced":
        first = np.arange(slots) % EXPERTS
    elif name == "skewed":
        first = np.minimum(rng.geometric(0.6, slots) - 1, EXPERTS - 1)
    elif name in ("one", "none"):
        first = np.full(slots, 2 if name == "one" else EXPERTS)
    elif name == "empty":
        first = 2 * rng.integers(0, EXPERTS // 2, slots)
    else:
        first = rng.integers(0, EXPERTS + 1, slots)
    # Further choices follow the first at this distance.
    step = {"one": 0, "none": 0, "empty": 2}.get(name, 1)
    expert = (first[:, None] + step * np.arange(top_k)) % EXPERTS
    expert = np.where(first[:, None] == EXPERTS, EXPERTS, expert)
    weight = rng.uniform(0.1, 1.0, expert.shape)
    shape = (rows, length, top_k)
    return expert.reshape(shape).astype(np.int32), weight.reshape(shape).astype(np.float32)


def inputs_of(rows: int, length: int, seed: int = 1) -> Any:
    """Return random tokens [B,T,D]."""
    shape = (rows, length, WIDTH)
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def values_and_gradients(
    expert_fn: ExpertFunction,
    method: Literal["grouped", "dense"],
    form: ExchangeSetting = "auto",
    keep: bool = False,
):
    """Return a jitted f(weights, x, expert, weight, seed) -> (y, gradients).

    The gradients are those of weights, x and weight.
    """

    def loss(weights, x, weight, expert, seed):
        y = moe_ffn(expert_fn, weights, x, expert, weight, seed, method, form, keep)
        # A weighted sum: every element of the output has another gradient.
        pull = jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)
        return jnp.sum(pull * y.astype(jnp.float32)), y

    grad = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)

    @jax.jit
    def run(weights, x, expert, weight, seed=np.uint32(7)):
        gradients, y = grad(weights, x, weight, expert, seed)
        return y, gradients

    return run
