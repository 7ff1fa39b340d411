"""Dispatch on meshes of eight devices gives the values, gradients and dropout of one device."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from tests.close import assert_close
from tests.nn.moe.dispatch_cases import (
    MLP,
    SWIGLU,
    inputs_of,
    routing,
    values_and_gradients,
    weights_of,
)
from unimoe_jax.config import MeshConfig
from unimoe_jax.nn.moe import exchange, grouped
from unimoe_jax.nn.moe.dispatch import moe_ffn
from unimoe_jax.nn.moe.mesh_layout import ExchangeSetting
from unimoe_jax.parallel.sharding import make_mesh, use_mesh

FUNCTIONS = {"swiglu": replace(SWIGLU, train=True), "mlp": replace(MLP, train=True)}  # dropout
ROWS, LENGTH = 8, 3
ROUTINGS = ("skewed", "some_none", "one", "none")
DATA_ONLY = {"batch": ("data",)}
TOLERANCE = 2e-6


@pytest.fixture(scope="module", autouse=True)
def small_blocks():
    """Use blocks of 8 and 4 rows, and exchanges of two tokens a round."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(grouped.BLOCKS, "cpu", (8, 4))
        patch.setattr(exchange, "pair_capacity", lambda *sizes: 2)
        yield


@pytest.fixture(scope="module")
def expected(small_blocks):
    """Return the results of one device, by form of expert and by routing."""
    results = {}
    for kind, expert_fn in FUNCTIONS.items():
        run = values_and_gradients(expert_fn, "grouped")
        results[kind] = {name: run(*_arguments(kind, name)) for name in ROUTINGS}
    return results


def _arguments(kind: str, name: str):
    weights = weights_of(FUNCTIONS[kind])
    return weights, inputs_of(ROWS, LENGTH), *routing(name, ROWS, LENGTH, 2)


def _mesh(devices, data: int, fsdp: int, expert: int, tensor: int):
    config = MeshConfig(data=data, fsdp=fsdp, expert=expert, tensor=tensor)
    return make_mesh(config, devices[: data * fsdp * expert * tensor])


@pytest.mark.parametrize(
    ("sizes", "kind", "form", "rules"),
    [
        ((8, 1, 1, 1), "swiglu", "kept", None),
        ((1, 2, 1, 2), "mlp", "kept", None),
        ((2, 1, 2, 2), "swiglu", "kept", DATA_ONLY),
        ((1, 1, 4, 1), "swiglu", "gather", None),
        ((1, 1, 4, 1), "mlp", "all_to_all", None),
        ((1, 2, 2, 2), "mlp", "gather", None),
        ((1, 2, 2, 2), "swiglu", "all_to_all", None),
        ((2, 1, 4, 1), "swiglu", "auto", DATA_ONLY),
        ((2, 1, 1, 2), "mlp", "auto", {"mlp": ("data",)}),
        ((2, 1, 4, 1), "swiglu", "ragged", None),
    ],
)
def test_equals_one_device(devices, expected, monkeypatch, sizes, kind, form, rules):
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", ragged_all_to_all)
    keep, form = form == "kept", "auto" if form == "kept" else form
    with use_mesh(_mesh(devices, *sizes), rules):
        run = values_and_gradients(FUNCTIONS[kind], "grouped", form, keep)
        for name, value in expected[kind].items():
            assert_close(run(*_arguments(kind, name)), value, TOLERANCE)


@pytest.mark.parametrize("form", ["gather", "all_to_all"])
def test_bfloat16_tokens_and_frozen_experts(devices, expected, form: ExchangeSetting):
    """Train the adapters of frozen experts: kernels are bfloat16 without a gradient, adapters are
    float32.
    """
    expert_fn = replace(FUNCTIONS["swiglu"], dtype=jnp.bfloat16)
    weights, x, expert, weight = _arguments("swiglu", "skewed")
    frozen = {name: {"kernel": w["kernel"].astype(jnp.bfloat16)} for name, w in weights.items()}
    adapters = {
        name: {key: value for key, value in w.items() if key != "kernel"}
        for name, w in weights.items()
    }

    @jax.jit
    def run(adapters, x):
        def loss(adapters, x):
            both = {name: frozen[name] | adapters[name] for name in frozen}
            y = moe_ffn(expert_fn, both, x, expert, weight, jnp.uint32(7), "grouped", form)
            pull = jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)
            return jnp.sum(pull * y.astype(jnp.float32)), y

        return jax.grad(loss, (0, 1), has_aux=True)(adapters, x)

    with use_mesh(_mesh(devices, 1, 2, 2, 1)):
        (dadapters, dx), y = run(adapters, x.astype(jnp.bfloat16))
    expected_y, (dweights, expected_dx, _) = expected["swiglu"]["skewed"]
    trained = {name: {key: dweights[name][key] for key in w} for name, w in adapters.items()}
    assert_close((y, dx, dadapters), (expected_y, expected_dx, trained), 3e-2)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(dadapters))


def test_dense_equals_one_device(devices, expected):
    with use_mesh(_mesh(devices, 2, 2, 2, 1)):
        run = values_and_gradients(FUNCTIONS["swiglu"], "dense")
        value = expected["swiglu"]["skewed"]
        assert_close(run(*_arguments("swiglu", "skewed")), value, TOLERANCE)


def ragged_all_to_all(
    operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name
):
    """Do what the documentation says of `jax.lax.ragged_all_to_all`, by gathering everything.

    CPUs do not have this collective.
    """
    here = jax.lax.axis_index(axis_name)
    operand, input_offsets, send_sizes, output_offsets = (
        jax.lax.all_gather(a, axis_name)
        for a in (operand, input_offsets, send_sizes, output_offsets)
    )
    place = jnp.arange(output.shape[0])
    for source in range(operand.shape[0]):
        start, size = output_offsets[source, here], send_sizes[source, here]
        # Sender and receiver must agree on the size; otherwise nothing arrives.
        size = jnp.where(size == recv_sizes[source], size, -1)
        inside = (place >= start) & (place < start + size)
        taken = operand[source][jnp.where(inside, input_offsets[source, here] + place - start, 0)]
        output = jnp.where(inside[:, None], taken, output)
    return output
