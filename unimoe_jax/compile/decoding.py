"""The programs of generation, compiled for devices that are not here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from unimoe_jax.config import ModelConfig
from unimoe_jax.config.stage_settings import StageSettings
from unimoe_jax.generate.engine.buckets import prompt_bucket, ring_bucket, rows_together
from unimoe_jax.generate.engine.decoding_programs import DecodingPrograms
from unimoe_jax.generate.engine.program_cache import ProgramCache
from unimoe_jax.models.declare import full_batch
from unimoe_jax.models.inference_decoder import (
    InferenceDecoder,
    Weights,
    held_dtype,
    inference_weights,
)
from unimoe_jax.models.unimoe import UniMoE
from unimoe_jax.nn.linear import LayerOptions
from unimoe_jax.parallel.placement import bytes_per_device
from unimoe_jax.parallel.sharding import data_shards, param_sharding
from unimoe_jax.params.table import declared


class DecodingProgram(NamedTuple):
    """A program of generation that can be compiled.

    rows, length: the sizes that it is compiled for, which are the asked ones rounded up to a
    bucket.
    memory: bytes per device of weights and cache.
    compile: compiles it.
    """

    rows: int
    length: int
    memory: dict[str, int]
    compile: Callable[[], jax.stages.Compiled]


def decoding_program(
    settings: StageSettings,
    mesh: Mesh,
    mesh_rules: dict[str, Any],
    program: Literal["prefill", "decode"],
    *,
    rows: int,
    length: int,
) -> DecodingProgram:
    """The program that prefills prompts, or decodes a token for every row of a batch.

    Adapters are merged, experts are stacked, and weights have the dtype `precision.compute`. Must
    run inside `use_mesh`.

    rows: rows of the batch; prefill is compiled for as many prompts as are prefilled together.
    length: positions of a prompt, or of the cache.
    """
    model = settings.model.model_copy(update={"lora": ()})
    dtype = jnp.dtype(settings.precision.compute)
    decoder = InferenceDecoder(model.decoder, dtype, model.attention)
    weights = _weights(model, mesh, dtype)
    programs = DecodingPrograms(decoder, weights, ProgramCache(mesh, mesh_rules), eos=(0,))
    rows, memory = programs.round_rows(rows), {"weights": bytes_per_device(weights)}
    if program == "prefill":
        size = prompt_bucket(length, programs.max_length)
        rows = rows_together(size, rows, programs.program_cache.data_shards)
        return DecodingProgram(rows, size, memory, lambda: programs.prefill_program(rows, size))
    slots = ring_bucket(length, programs.max_length)
    memory["cache"] = bytes_per_device(programs.state_structs(rows, slots))
    return DecodingProgram(
        rows, slots, memory, lambda: programs.advance_program(rows, slots, greedy=True)
    )


def _weights(model: ModelConfig, mesh: Mesh, dtype: Any) -> Weights:
    """Shape structs of the decoder's weights as generation holds them."""
    infos = declared(UniMoE(model, LayerOptions(dtype=dtype)), full_batch(model, data_shards(mesh)))
    # np.broadcast_to gives arrays of the right shapes without allocating them.
    params = {path: np.broadcast_to(np.float32(0), info[0]) for path, info in infos.items()}
    axes = {path: info[1] for path, info in infos.items()}

    def place(path: str, value: np.ndarray, names: tuple[str | None, ...]) -> Any:
        sharding = param_sharding(mesh, path, value.shape, names)
        return jax.ShapeDtypeStruct(value.shape, held_dtype(path, dtype), sharding=sharding)

    return inference_weights(model.decoder, params, axes, "stacked", place)
