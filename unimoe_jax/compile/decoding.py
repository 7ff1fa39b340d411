"""The programs of generation, compiled for devices that are not here; see compile.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from unimoe_jax.config import RunConfig, StageConfig
from unimoe_jax.generate.engine.buckets import prompt_bucket, ring_bucket, rows_together
from unimoe_jax.generate.engine.decoding_programs import DecodingPrograms
from unimoe_jax.generate.engine.program_cache import ProgramCache
from unimoe_jax.models.declare import full_batch
from unimoe_jax.models.inference_decoder import InferenceDecoder, Weights, inference_weights
from unimoe_jax.models.unimoe import UniMoE
from unimoe_jax.nn.linear import LayerOptions
from unimoe_jax.parallel.sharding import data_shards, param_sharding
from unimoe_jax.params.table import declared


class DecodingProgram(NamedTuple):
    """A program of generation. rows, length: what it is compiled for, the bucket of what was asked;
    memory: bytes per device of weights and cache; compile: does it."""

    rows: int
    length: int
    memory: dict[str, int]
    compile: Callable[[], jax.stages.Compiled]


def decoding_program(
    run: RunConfig, stage: StageConfig, mesh: Mesh, program: str, rows: int, length: int
) -> DecodingProgram:
    """`prefill` or `decode` of a batch of `rows`.

    length: positions of a prompt, or of the cache. Of prefill it is the program for as many prompts
    as go together. Adapters are merged, experts lie stacked, everything is in `precision.compute`.
    Must run inside `use_mesh`.
    """
    config = run.stage_model(stage).model_copy(update={"lora": ()})
    dtype = jnp.dtype(run.precision.compute)
    decoder = InferenceDecoder(config.decoder, dtype, config.attention)
    weights = _weights(run, stage, mesh, dtype)
    programs = DecodingPrograms(decoder, weights, ProgramCache(mesh, run.mesh.rules), eos=(0,))
    rows, memory = programs.round_rows(rows), {"weights": _size(weights)}
    if program == "prefill":
        size = prompt_bucket(length, programs.most)
        rows = rows_together(size, rows, programs.programs.rows)
        return DecodingProgram(rows, size, memory, lambda: programs.prefill_program(rows, size))
    slots = ring_bucket(length, programs.most)
    memory["cache"] = _size(programs.state_structs(rows, slots))
    return DecodingProgram(
        rows, slots, memory, lambda: programs.advance_program(rows, slots, greedy=True)
    )


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

    return inference_weights(config.decoder, params, axes, "stacked", place)


def _size(tree: Any) -> int:
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape), dtype=np.int64))
        * jnp.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(tree)
    )
