"""The compiled program of a layer of eight experts: its exchanges, gathers and products."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.nn.compiled import flops_of, text_of
from unimoe_jax.compile.hlo import group_size
from unimoe_jax.config import MeshConfig
from unimoe_jax.nn.moe import grouped
from unimoe_jax.nn.moe.dispatch import moe_ffn
from unimoe_jax.nn.moe.exchange import cheapest_form, pair_capacity
from unimoe_jax.nn.moe.experts import MlpExpert, SwiGLUExpert
from unimoe_jax.nn.moe.mesh_layout import ExchangeSetting
from unimoe_jax.parallel.sharding import (
    MESH_AXES,
    batch_sharding,
    make_mesh,
    param_sharding,
    use_mesh,
)

EXPERTS, TOP_K, WIDTH, HIDDEN = 8, 2, 128, 192
TOKENS = 2048  # on a device
ITEM = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "pred": 1}


@dataclass(frozen=True)
class Collective:
    """A collective operation in the program of one device.

    size: bytes of its result. sent: bytes that leave the device. large: whether it moves tokens,
    not only the numbers that accompany them.
    """

    kind: str
    size: int
    sent: float
    large: bool


def collectives(text: str) -> list[Collective]:
    """Read the collectives of an optimised program; the line of each has its shape and group."""
    kinds = "all-to-all|all-gather|reduce-scatter|all-reduce|collective-permute"
    collected = []
    for line in text.splitlines():
        match = re.search(rf" = (.*?) ({kinds})(?:-start)?\(", line)
        if match is None:
            continue
        shapes, kind = re.sub(r"/\*.*?\*/", "", match[1]), match[2]
        size = sum(
            ITEM[dtype] * math.prod(int(n) for n in dims.split(",") if n)
            for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", shapes)
        )
        shards = group_size(line)
        share = {"all-to-all": (shards - 1) / shards, "all-gather": (shards - 1) / shards}
        sent = size * share.get(kind, shards - 1 if kind == "reduce-scatter" else 1)
        large = f",{WIDTH}]" in shapes or f",{2 * WIDTH}]" in shapes
        collected.append(Collective(kind, size, sent, large))
    return collected


def compiled_layer(
    devices,
    expert_fn,
    sizes,
    form: ExchangeSetting,
    argnums=None,
    wide: bool = True,
    keep: bool = False,
) -> jax.stages.Compiled:
    """Compile the layer on a mesh (data, fsdp, expert, tensor), or its gradient by `argnums`.

    With `wide` there is a row of the batch for every device, otherwise there is a single row.
    """
    count = math.prod(sizes)
    mesh = make_mesh(MeshConfig(**dict(zip(MESH_AXES, sizes, strict=False))), devices[:count])
    rows = count if wide else 1
    with use_mesh(mesh):
        weights = {}
        for name, axes in expert_fn.axes().items():
            shape = (EXPERTS, *({"expert_embed": WIDTH, "mlp": HIDDEN}[axis] for axis in axes))
            sharding = param_sharding(mesh, name, shape, ("expert", *axes))
            weights[name] = {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)}
        by_rows = batch_sharding(mesh, 3)
        x, expert, weight = (
            jax.ShapeDtypeStruct((rows, TOKENS, last), dtype, sharding=by_rows)
            for last, dtype in ((WIDTH, jnp.float32), (TOP_K, jnp.int32), (TOP_K, jnp.float32))
        )

        def layer(weights, x, weight, expert):
            seed = jnp.uint32(0)
            return moe_ffn(expert_fn, weights, x, expert, weight, seed, "grouped", form, keep)

        def loss(*args):
            return jnp.sum(jnp.sin(layer(*args)))

        function: Any = layer if argnums is None else jax.grad(loss, argnums)
        return jax.jit(function).lower(weights, x, weight, expert).compile()


PLAIN = MlpExpert(jnp.float32)
SWIGLU = SwiGLUExpert(jnp.float32)


@pytest.mark.parametrize("shards", [4, 8])
def test_bounded_exchange_moves_little_more_than_the_minimum(devices, shards: int):
    """There are two large exchanges in the forward pass.

    The minimum sends each token once to every other device that holds one of its experts, and back.
    """
    program = compiled_layer(devices, PLAIN, (8 // shards, 1, shards, 1), "all_to_all")
    exchanges = collectives(text_of(program))
    assert [c.kind for c in exchanges if c.large] == ["all-to-all"] * 2
    assert {c.kind for c in exchanges} == {"all-to-all", "all-reduce"}
    assert all(c.size == 4 for c in exchanges if c.kind == "all-reduce")  # the number of rounds

    here = EXPERTS // shards
    reached = 1 - math.comb(EXPERTS - here, TOP_K) / math.comb(EXPERTS, TOP_K)
    minimum = 2 * (shards - 1) * reached * TOKENS * WIDTH * 4
    sent = sum(c.sent for c in exchanges)
    assert minimum <= sent <= 1.3 * minimum


@pytest.mark.parametrize("shards", [2, 4, 8])
def test_one_round_for_balanced_routing(shards: int):
    """The loads between all pairs of devices fit the buffers, for 32 random balanced batches."""
    rng, here = np.random.default_rng(0), EXPERTS // shards
    capacity = pair_capacity(TOKENS, shards, here, TOP_K)
    scores = rng.random((32, TOKENS, EXPERTS))
    expert = np.argsort(scores, axis=-1)[..., :TOP_K]
    loads = [((expert // here) == shard).any(-1).sum(-1) for shard in range(shards)]
    assert np.max(loads) <= capacity


def test_tokens_are_gathered_where_that_is_cheaper():
    """It is cheaper on two devices, for few tokens, and where choices cover most devices anyway."""
    forms = {
        (2, TOKENS, 2): "gather",
        (4, TOKENS, 2): "all_to_all",
        (8, TOKENS, 2): "all_to_all",
        (8, 16, 2): "gather",
        (8, TOKENS, 6): "gather",
        (2, TOKENS, 1): "all_to_all",
    }
    for (shards, tokens, top_k), form in forms.items():
        capacity = pair_capacity(tokens, shards, EXPERTS // shards, top_k)
        assert cheapest_form(tokens, capacity) == form, (shards, tokens, top_k)


def test_weights_are_gathered_over_fsdp_alone(devices):
    """Every kernel is gathered once, and its gradient goes straight to the shards that hold it.

    Experts and their hidden width stay cut.
    """
    program = compiled_layer(devices, SWIGLU, (1, 2, 2, 2), "all_to_all", argnums=(0, 1))
    exchanges = collectives(text_of(program))
    shard = (EXPERTS // 2) * WIDTH * (HIDDEN // 2) * 4  # whole in width, cut by expert and tensor
    gathered = [c.size for c in exchanges if c.kind == "all-gather"]
    assert gathered == [shard] * 3
    scattered = [c.size for c in exchanges if c.kind == "reduce-scatter"]
    assert scattered == [shard // 2] * 3


def test_frozen_weights_have_no_gradient_in_the_program(devices):
    """This holds also where the rounds of an exchange would carry the gradient."""
    whole = compiled_layer(devices, PLAIN, (1, 1, 4, 1), "all_to_all", argnums=(0, 1))
    frozen = compiled_layer(devices, PLAIN, (1, 1, 4, 1), "all_to_all", argnums=(1, 2))
    pattern = r" (?:dot|custom-call)\("
    products = [len(re.findall(pattern, text_of(program))) for program in (frozen, whole)]
    # Every size of block has 7 products: forward (2), forward again (1), dx (2) and dW (2). Frozen
    # weights need no dW.
    assert products[0] * 7 == products[1] * 5


@pytest.mark.parametrize(("expert_fn", "products"), [(SWIGLU, 3), (PLAIN, 2)])
def test_products_are_of_rows_routed(devices, expert_fn, products: int):
    """The FLOPs of a program are those of its blocks; the body of every loop counts once.

    The forward pass sends blocks of 512, 256, … rows through all products. The backward pass
    computes all products but the last again, and two gradients of each.
    """
    sizes = grouped.blocks_for(TOKENS * TOP_K // EXPERTS, "cpu").sizes
    once = sum(sizes) * 2 * WIDTH * HIDDEN
    forward = compiled_layer(devices, expert_fn, (1, 1, 1, 1), "auto", wide=False)
    assert flops_of(forward) <= 1.05 * products * once
    # With frozen weights there is one gradient per product, with trained weights there are two.
    for argnums, needed in (((1, 2), 3 * products - 1), ((0, 1, 2), 4 * products - 1)):
        program = compiled_layer(devices, expert_fn, (1, 1, 1, 1), "auto", argnums, wide=False)
        assert flops_of(program) <= 1.05 * needed * once
        kept = compiled_layer(
            devices, expert_fn, (1, 1, 1, 1), "auto", argnums, wide=False, keep=True
        )
        saved = flops_of(program) - flops_of(kept)
        assert saved >= 0.99 * (products - 1) * once


@pytest.mark.parametrize("tokens", [TOKENS, 4 * TOKENS])
def test_blocks_hold_few_rows_more_than_were_routed(tokens: int):
    """This holds for random balanced loads and for skewed loads."""
    rng = np.random.default_rng(0)
    slots = tokens * TOP_K
    sizes = grouped.blocks_for(slots // EXPERTS, "cpu").sizes

    def add_rows(rows, offset, size):
        del offset
        return rows + size

    fold = jax.jit(lambda count: grouped._over_blocks(sizes, 0, count, add_rows, 0))
    skewed = np.array([0.34, 0.27, 0.17, 0.11, 0.06, 0.03, 0.015, 0.005])
    for share in (np.full(EXPERTS, 1 / EXPERTS), skewed):
        loads = rng.multinomial(slots, share)
        multiplied = [int(fold(load)) for load in loads]
        assert all(rows >= load for rows, load in zip(multiplied, loads, strict=True))
        assert sum(multiplied) <= 1.05 * slots
