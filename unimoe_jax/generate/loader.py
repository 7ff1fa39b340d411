"""A run directory, a finished stage or a converted checkpoint -> a `Model` on the devices."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from unimoe_jax.checkpoints.checksums import SUMS
from unimoe_jax.checkpoints.final import load_final
from unimoe_jax.config import MeshConfig, ModelConfig
from unimoe_jax.data.conversation import TEMPLATES
from unimoe_jax.generate.engine.decoding_programs import DecodingPrograms
from unimoe_jax.generate.engine.engine import Engine
from unimoe_jax.generate.engine.program_cache import Log, ProgramCache
from unimoe_jax.generate.errors import GenerationError
from unimoe_jax.generate.found import Found, find
from unimoe_jax.generate.generation_config import generation_settings
from unimoe_jax.generate.media_encoder import MediaEncoder
from unimoe_jax.generate.model import Model
from unimoe_jax.models.declare import full_batch
from unimoe_jax.models.inference_decoder import (
    ExpertLayout,
    InferenceDecoder,
    Weights,
    held_dtype,
    inference_weights,
)
from unimoe_jax.models.unimoe import UniMoE
from unimoe_jax.nn.linear import LayerOptions
from unimoe_jax.parallel.sharding import make_mesh, param_sharding, use_mesh
from unimoe_jax.params import lora
from unimoe_jax.params.paths import nest
from unimoe_jax.params.table import declared

TRACES = ("experts", "logits")


@dataclass(frozen=True)
class LoadOptions:
    """How a model is loaded.

    precision: dtype of computations, kernels and cache; None is float32 on a CPU and bfloat16 on
        other devices.
    mesh: sizes of the mesh axes; None is one device.
    template: how conversations are written; None is the template of the run, or of the family of
        a converted checkpoint.
    experts: "separate" keeps one array per expert, which only works on one device; "stacked" keeps
        one array per layer; None is separate on one CPU device, else stacked.
    trace: "experts" and "logits" are kept for every answer, see `Answer`.
    """

    precision: Literal["float32", "bfloat16"] | None = None
    mesh: MeshConfig | None = None
    template: str | None = None
    experts: ExpertLayout | None = None
    trace: frozenset[str] = frozenset()

    def __post_init__(self):
        for name, values, allowed in (
            ("precision", {self.precision} - {None}, ("float32", "bfloat16")),
            ("template", {self.template} - {None}, sorted(TEMPLATES)),
            ("experts", {self.experts} - {None}, get_args(ExpertLayout)),
            ("trace", {self.trace} if isinstance(self.trace, str) else self.trace, TRACES),
        ):
            if unknown := [value for value in values if value not in allowed]:
                raise GenerationError(f"{name} = {unknown[0]!r}; allowed: {', '.join(allowed)}")


def load(path: str | Path, options: LoadOptions = LoadOptions(), log: Log | None = None) -> Model:
    """Load the model at `path`.

    path: a run directory (its last stage that leaves a whole model), a stage's `final` folder, or a
        folder that `unimoe_jax.convert import` wrote.
    log: receives one line for every program that is compiled.

    Raises:
        GenerationError: there is no model that can answer; the message says what is missing.
        CheckpointError: the checkpoint is damaged.
    """
    if jax.process_count() > 1:
        raise GenerationError("generation runs in one process; start it without a coordinator")
    found = find(Path(path).expanduser(), options.template)
    params = _read_params(found)
    try:
        return _build(found, params, options, log)
    except GenerationError:
        raise
    except ValueError as error:
        # Settings that do not suit each other, such as a mesh that does not divide the heads.
        raise GenerationError(f"{path}: {error}") from error


# ----------------------------------------------------------------------------------- building


def _build(
    found: Found, params: dict[str, np.ndarray], options: LoadOptions, log: Log | None
) -> Model:
    """Place the parameters on the devices and put the parts of the model together."""
    # Devices, dtype and layout of the experts, where the user has not chosen them.
    config, mesh_config = found.config, options.mesh or MeshConfig(data=1)
    devices = jax.devices() if options.mesh else jax.devices()[:1]
    mesh = make_mesh(mesh_config, devices)
    on_cpu = devices[0].platform == "cpu"
    dtype = jnp.dtype(options.precision or ("float32" if on_cpu else "bfloat16"))
    layout = options.experts or ("separate" if on_cpu and mesh.size == 1 else "stacked")
    if layout == "separate" and mesh.size > 1:
        raise GenerationError("experts = separate: only on one device")
    # Declare the parameters outside of the mesh: the shape-only batch has one row, which would not
    # divide by the data shards.
    axes = logical_axes(config)
    with use_mesh(mesh, mesh_config.rules):
        weights, encoders = _place_params(config, params, axes, mesh, dtype, layout)
    # All programs of the model, encoders included, share one cache.
    program_cache = ProgramCache(mesh, mesh_config.rules, log)
    eos, defaults, notes = generation_settings(found)
    decoder = InferenceDecoder(config.decoder, dtype, config.attention)
    programs = DecodingPrograms(decoder, weights, program_cache, eos, options.trace)
    return Model(
        config=config,
        tokenizer=found.tokenizer,
        template=found.template,
        defaults=defaults,
        engine=Engine(programs),
        media=MediaEncoder(config, LayerOptions(dtype=dtype), encoders, program_cache),
        notes=notes,
        checksums=(found.folder / SUMS).read_text(),
    )


def _place_params(
    config: ModelConfig,
    params: dict[str, np.ndarray],
    axes: dict[str, tuple[str | None, ...]],
    mesh: jax.sharding.Mesh,
    dtype: Any,
    layout: ExpertLayout,
) -> tuple[Weights, dict[str, Any]]:
    """(weights of the decoder, {branch: parameters} of encoders and connectors), on the devices."""

    def place(path: str, value: np.ndarray, names: tuple[str | None, ...]) -> jax.Array:
        value = np.asarray(value, held_dtype(path, dtype))
        return jax.device_put(value, param_sharding(mesh, path, value.shape, names))

    weights = inference_weights(config.decoder, params, axes, layout, place)
    encoders = {
        path: place(path, params[path], axes[path])
        for path in params
        if path.split("/")[0] not in ("decoder", "embed", "lm_head")
    }
    return weights, nest(encoders)


# --------------------------------------------------------------------------------- parameters


def _declared(config: ModelConfig) -> dict[str, tuple[tuple[int, ...], tuple]]:
    """{path: (shape, logical axes)} of the model after its adapters are merged."""
    merged = config.model_copy(update={"lora": ()})
    return declared(UniMoE(merged, LayerOptions()), full_batch(merged))


def logical_axes(config: ModelConfig) -> dict[str, tuple[str | None, ...]]:
    """{path: logical axes} of every parameter of the model after its adapters are merged."""
    return {path: names for path, (_, names) in _declared(config).items()}


def _read_params(found: Found) -> dict[str, np.ndarray]:
    """Read every parameter and check it against the settings. Adapters are merged in float32.

    Raises:
        GenerationError: parameters and settings belong to different models.
        CheckpointError: a file is damaged.
    """
    params = _merge_adapters(load_final(found.folder), found.config)
    expected = {path: shape for path, (shape, _) in _declared(found.config).items()}
    missing, unknown = sorted(set(expected) - set(params)), sorted(set(params) - set(expected))
    if missing or unknown:
        problem = "lacks" if missing else "has parameters that its model does not know:"
        names = missing or unknown
        raise GenerationError(
            f"{found.folder}: {problem} {len(names)} of {len(expected)} parameters, e.g. "
            f"{names[0]}; it is a part of a model, or of another family"
        )
    for path, shape in expected.items():
        if params[path].shape != shape:
            raise GenerationError(
                f"{found.folder}: {path} has shape {params[path].shape}, its model needs {shape}"
            )
    return params


def _merge_adapters(params: dict[str, np.ndarray], config: ModelConfig) -> dict[str, np.ndarray]:
    """The parameters with every LoRA adapter added to its kernel."""
    adapters = [path for path in params if lora.is_adapter(path)]
    if not adapters:
        return params
    # Convert the kernels to float32 first: `merge` rounds its sums to the dtype of the kernel.
    adapted = {path.rsplit("/", 1)[0] + "/kernel" for path in adapters}
    params = {
        path: np.asarray(value, np.float32) if path in adapted else value
        for path, value in params.items()
    }
    return lora.merge(params, config.lora)
