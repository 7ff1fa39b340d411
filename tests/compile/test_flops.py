"""FLOPs that the mathematics of a training step needs."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unimoe_jax.compile.flops import jaxpr_flops, step_flops
from unimoe_jax.compile.hlo import read
from unimoe_jax.compile.measure import assumed_batch
from unimoe_jax.config.load import load_config
from unimoe_jax.config.stage_settings import resolve_stage
from unimoe_jax.nn.attention.packed import attend_packed, tiles_of

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "tests/parallel/multihost.yaml"


def test_scans_and_rematerialised_layers_are_counted():
    def layers(x, w_L):
        def one(x, w):
            return jax.checkpoint(lambda x: jnp.einsum("bd,df->bf", x, w))(x), None

        return jax.lax.scan(one, x, w_L)[0]

    x, w = jnp.ones((4, 8)), jnp.ones((3, 8, 8))
    assert jaxpr_flops(jax.make_jaxpr(layers)(x, w)) == 3 * 2 * 4 * 8 * 8


def test_neither_count_includes_packed_attention():
    def attended(q, k, v, mask):
        tiles = tiles_of(mask, jnp.ones(mask.shape[:2], bool))
        return attend_packed(q, k, v, tiles, scale=1.0) @ jnp.eye(8)[None, None]

    heads = ((2, 100, 1, 8),) * 3
    structs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in heads]
    mask = jax.ShapeDtypeStruct((2, 100, 100), bool)
    needed = jaxpr_flops(jax.make_jaxpr(attended)(*structs, mask))
    assert needed == 2 * 200 * 8 * 8
    stats = read(jax.jit(attended).lower(*structs, mask).compile().as_text())
    # Two tiles of queries. A trip has two products of 64 positions with 64, for two rows.
    assert (stats.flops, stats.loops_unknown) == (needed, 1)
    assert stats.flops_unknown == 2 * (2 * 2 * (2 * 64 * 64 * 8))


def test_experts_need_top_k_times_a_layer():
    run = load_config(CONFIG)
    stage = run.stages[0].model_copy(update={"lora": ()})
    spec, _ = assumed_batch(resolve_stage(run, stage), 1, None)
    total, experts, head = step_flops(resolve_stage(run, stage), spec)
    decoder, tokens = run.model.decoder, np.prod(spec.token_id_BT.shape)
    kernels = 3 * decoder.hidden_size * decoder.mlp_dim
    # Experts are frozen: the forward pass and the gradient of their input count, and there is no
    # gradient of their weights.
    assert experts == decoder.moe.top_k * 2 * (2 * tokens * kernels)
    assert head == 2 * (2 * tokens * decoder.hidden_size * decoder.vocab_size)
    three = decoder.model_copy(update={"moe": decoder.moe.model_copy(update={"top_k": 3})})
    more = run.model_copy(update={"model": run.model.model_copy(update={"decoder": three})})
    assert step_flops(resolve_stage(more, stage), spec).total - total == pytest.approx(experts / 2)
