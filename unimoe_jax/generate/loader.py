"""A run directory, a finished stage or a converted checkpoint -> a model that answers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from unimoe_jax.checkpoints.checksums import SUMS
from unimoe_jax.checkpoints.final import load_final
from unimoe_jax.config import MeshConfig, ModelConfig
from unimoe_jax.data.conversation import TEMPLATES
from unimoe_jax.generate.engine.engine import Engine
from unimoe_jax.generate.engine.program_cache import ProgramCache, Tell
from unimoe_jax.generate.errors import GenerationError
from unimoe_jax.generate.found import Found, find
from unimoe_jax.generate.generation_config import generation_settings
from unimoe_jax.generate.media_encoder import MediaEncoder
from unimoe_jax.generate.model import Model
from unimoe_jax.models.declare import full_batch
from unimoe_jax.models.inference_decoder import (
    ExpertLayout,
    InferenceDecoder,
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
"""Keys of a generation_config.json that change no answer."""
"""Values by which keys that are not implemented ask nothing; by others it is 0, false or empty."""


@dataclass(frozen=True)
class LoadOptions:
    """How a model is held.

    precision: computations, kernels and cache; None: float32 on a CPU, bfloat16 elsewhere. mesh:
    sizes of its axes; None: one device. template: None: the run's, or the checkpoint's family's.
    experts: None: separate arrays on one CPU, else stacked. trace: see `Engine`.
    """

    precision: Literal["float32", "bfloat16"] | None = None
    mesh: MeshConfig | None = None
    template: str | None = None
    experts: ExpertLayout | None = None
    trace: frozenset[str] = frozenset()

    def __post_init__(self):
        for name, given, allowed in (
            ("precision", {self.precision} - {None}, ("float32", "bfloat16")),
            ("template", {self.template} - {None}, sorted(TEMPLATES)),
            ("experts", {self.experts} - {None}, get_args(ExpertLayout)),
            ("trace", {self.trace} if isinstance(self.trace, str) else self.trace, TRACES),
        ):
            if strange := [value for value in given if value not in allowed]:
                raise GenerationError(f"{name} = {strange[0]!r}; allowed: {', '.join(allowed)}")


def load(
    path: str | Path, settings: LoadOptions = LoadOptions(), tell: Tell | None = None
) -> Model:
    """The model at `path`: a run directory (its last stage that leaves a whole model), a stage's
    `final` folder, or what `unimoe_jax.convert import` wrote.

    Raises:
        GenerationError: it is no model that can answer; what is missing is named.
        CheckpointError: it is damaged.
    """
    if jax.process_count() > 1:
        raise GenerationError("generation runs in one process; start it without a coordinator")
    found = find(Path(path).expanduser(), settings.template)
    params = _parameters(found)
    try:
        return _build(found, params, settings, tell)
    except ValueError as error:
        if isinstance(error, GenerationError):
            raise
        raise GenerationError(f"{path}: {error}") from error


def _build(
    found: Found, params: dict[str, np.ndarray], settings: LoadOptions, tell: Tell | None
) -> Model:
    config, mesh_config = found.config, settings.mesh or MeshConfig(data=1)
    devices = jax.devices() if settings.mesh else jax.devices()[:1]
    mesh = make_mesh(mesh_config, devices)
    on_cpu = devices[0].platform == "cpu"
    dtype = jnp.dtype(settings.precision or ("float32" if on_cpu else "bfloat16"))
    layout = settings.experts or ("separate" if on_cpu and mesh.size == 1 else "stacked")
    if layout == "separate" and mesh.size > 1:
        raise GenerationError("experts = separate: only on one device")
    options = LayerOptions(dtype=dtype)
    axes = logical_axes(config)
    with use_mesh(mesh, mesh_config.rules):

        def place(path: str, value: np.ndarray, names: tuple[str | None, ...]) -> jax.Array:
            value = np.asarray(value, held_dtype(path, dtype))
            return jax.device_put(value, param_sharding(mesh, path, value.shape, names))

        weights = inference_weights(config.decoder, params, axes, layout, place)
        encoders = {
            path: place(path, params[path], axes[path])
            for path in params
            if path.split("/")[0] not in ("decoder", "embed", "lm_head")
        }
    programs = ProgramCache(mesh, mesh_config.rules, tell)
    eos, defaults, notes = generation_settings(found)
    engine = Engine(
        InferenceDecoder(config.decoder, dtype, config.attention),
        weights,
        programs,
        eos,
        settings.trace,
    )
    media = MediaEncoder(config, options, nest(encoders), programs)
    sums = (found.folder / SUMS).read_text()
    return Model(config, found.tokenizer, found.template, defaults, engine, media, notes, sums)


# ---------------------------------------------------------------------------------- finding it


# ---------------------------------------------------------------------------------- parameters


def _declared(config: ModelConfig) -> dict[str, tuple[tuple[int, ...], tuple]]:
    """{path: (shape, logical axes)} of the model, its adapters merged."""
    bare = config.model_copy(update={"lora": ()})
    return declared(UniMoE(bare, LayerOptions()), full_batch(bare))


def logical_axes(config: ModelConfig) -> dict[str, tuple[str | None, ...]]:
    """Of every parameter of the model without adapters."""
    return {path: names for path, (_, names) in _declared(config).items()}


def _parameters(found: Found) -> dict[str, np.ndarray]:
    """Every parameter, adapters merged into their kernels in float32."""
    host = load_final(found.folder)
    if any(lora.is_adapter(path) for path in host):
        adapted = {path.rsplit("/", 1)[0] + "/kernel" for path in host if lora.is_adapter(path)}
        host = {
            path: np.asarray(value, np.float32) if path in adapted else value
            for path, value in host.items()
        }
        host = lora.merge(host, found.config.lora)
    expected = {path: shape for path, (shape, _) in _declared(found.config).items()}
    missing, strange = sorted(set(expected) - set(host)), sorted(set(host) - set(expected))
    if missing or strange:
        what = "lacks" if missing else "has parameters that its model does not know:"
        names = missing or strange
        raise GenerationError(
            f"{found.folder}: {what} {len(names)} of {len(expected)} parameters, e.g. {names[0]}; "
            "it is a part of a model, or of another family"
        )
    for path, shape in expected.items():
        if host[path].shape != shape:
            raise GenerationError(
                f"{found.folder}: {path} has shape {host[path].shape}, its model needs {shape}"
            )
    return host


# --------------------------------------------------------------------------- generation_config
