"""The programs of generation, compiled for devices that are not here; see compile.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from unimoe_jax.config import RunConfig, StageConfig
from unimoe_jax.generation.decoding_programs import DecodingPrograms
from unimoe_jax.generation.programs import Programs, prompt_bucket, ring_bucket
from unimoe_jax.models.served import ServedDecoder, Weights, serve
from unimoe_jax.models.unimoe import UniMoE
from unimoe_jax.nn.linear import LayerOptions
from unimoe_jax.params import declared
from unimoe_jax.sharding import data_shards, param_sharding
from unimoe_jax.stage import full_batch


def serving_program(
    run: RunConfig, stage: StageConfig, mesh: Mesh, program: str, rows: int, length: int
) -> tuple[dict[str, int], Callable[[], jax.stages.Compiled]]:
    """(bytes per device of weights and cache, what compiles `prefill` or `decode`).

    rows: side by side in decoding; length: positions of a prompt, or of the cache. Adapters are
    merged, experts lie stacked, everything is in `precision.compute`. Must run inside `use_mesh`.
    """
    config = run.stage_model(stage).model_copy(update={"lora": ()})
    dtype = jnp.dtype(run.precision.compute)
    decoder = ServedDecoder(config.decoder, dtype, config.attention)
    weights = _weights(run, stage, mesh, dtype)
    programs = DecodingPrograms(decoder, weights, Programs(mesh, run.mesh.rules), eos=(0,))
    rows = programs.round_rows(rows)
    if program == "prefill":
        bucket = prompt_bucket(length, programs.most)
        return {"weights": _size(weights)}, lambda: programs.prefill_program(
            programs.programs.rows, bucket
        )
    slots = ring_bucket(length, programs.most)
    memory = {"weights": _size(weights), "cache": _size(programs.state_structs(rows, slots))}
    return memory, lambda: programs.advance_program(rows, slots, greedy=True)


def _weights(run: RunConfig, stage: StageConfig, mesh: Mesh, dtype: Any) -> Weights:
    """Shape structs of the decoder as generation holds it."""
    config = run.stage_model(stage).model_copy(update={"lora": ()})
    infos = declared(
        UniMoE(config, LayerOptions(dtype=dtype)), full_batch(config, data_shards(mesh))
    )
    # One number seen as an array of any shape: it can be cut and transposed, and takes no memory.
    params = {path: np.broadcast_to(np.float32(0), info[0]) for path, info in infos.items()}
    axes = {path: info[1] for path, info in infos.items()}

    def place(path: str, value: np.ndarray, names: tuple[str | None, ...]) -> jax.ShapeDtypeStruct:
        keep = "/router/" in path or path.endswith("/scale")
        sharding = param_sharding(mesh, path, value.shape, names)
        return jax.ShapeDtypeStruct(value.shape, np.float32 if keep else dtype, sharding=sharding)

    return serve(config.decoder, params, axes, "stacked", place)


def _size(tree: Any) -> int:
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape), dtype=np.int64))
        * jnp.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(tree)
    )
