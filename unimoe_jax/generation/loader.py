"""A run directory, a finished stage or a converted checkpoint -> a model that answers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import ValidationError

from unimoe_jax import config_io, lora
from unimoe_jax.checkpoint import MANIFEST, load_final, read_manifest, read_settings, run_file_of
from unimoe_jax.config import MeshConfig, ModelConfig, RunConfig, StageConfig
from unimoe_jax.config_yaml import ConfigError
from unimoe_jax.data.conversation import TEMPLATES
from unimoe_jax.data.tokenizer import Tokenizer
from unimoe_jax.generation.engine import Engine
from unimoe_jax.generation.errors import GenerationError
from unimoe_jax.generation.media import MediaEncoder
from unimoe_jax.generation.model import Model
from unimoe_jax.generation.programs import Programs, Tell
from unimoe_jax.generation.request import Sampling
from unimoe_jax.integrity import SUMS, check_files
from unimoe_jax.models.served import ExpertLayout, ServedDecoder, serve
from unimoe_jax.models.unimoe import UniMoE
from unimoe_jax.nn.linear import LayerOptions
from unimoe_jax.params import declared, nest
from unimoe_jax.setup_data import load_tokenizer
from unimoe_jax.sharding import make_mesh, param_sharding, use_mesh
from unimoe_jax.stage import full_batch

MODEL_FILE, GENERATION_FILE = "model.yaml", "generation_config.json"
TEMPLATE_OF_FAMILY = (("unimoe", "vicuna_v1"), ("cumo", "mistral_instruct_system"))
TRACES = ("experts", "logits")
FOLLOWED = {"eos_token_id", "do_sample", "temperature", "top_p", "top_k", "max_new_tokens"}
SILENT = {
    "bos_token_id",
    "pad_token_id",
    "decoder_start_token_id",
    "max_length",  # where max_new_tokens is known, transformers does not follow it either
    "transformers_version",
    "early_stopping",
    "renormalize_logits",
    "return_dict_in_generate",
    "use_cache",
    "cache_implementation",
}
"""Keys of a generation_config.json that change no answer."""
NEUTRAL = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "length_penalty": 1.0,
    "typical_p": 1.0,
    "guidance_scale": 1.0,
    "num_return_sequences": 1,
}
"""Values by which keys that are not implemented ask nothing; by others it is 0, false or empty."""


@dataclass(frozen=True)
class Settings:
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


@dataclass(frozen=True)
class Found:
    """A checkpoint and what belongs to it. folder: with params and manifest."""

    folder: Path
    config: ModelConfig
    tokenizer: Tokenizer
    template: str
    generation: Mapping[str, Any]


def load(path: str | Path, settings: Settings = Settings(), tell: Tell | None = None) -> Model:
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
    found: Found, params: dict[str, np.ndarray], settings: Settings, tell: Tell | None
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
            # Routers compute in float32 and scales are small: they keep what they were saved in.
            keep = "/router/" in path or path.endswith("/scale")
            value = np.asarray(value, np.float32 if keep else dtype)
            return jax.device_put(value, param_sharding(mesh, path, value.shape, names))

        weights = serve(config.decoder, params, axes, layout, place)
        encoders = {
            path: place(path, params[path], axes[path])
            for path in params
            if path.split("/")[0] not in ("decoder", "embed", "lm_head")
        }
    programs = Programs(mesh, mesh_config.rules, tell)
    eos, defaults, notes = generation_settings(found)
    engine = Engine(
        ServedDecoder(config.decoder, dtype, config.attention),
        weights,
        programs,
        eos,
        settings.trace,
    )
    media = MediaEncoder(config, options, nest(encoders), programs)
    sums = (found.folder / SUMS).read_text()
    return Model(config, found.tokenizer, found.template, defaults, engine, media, notes, sums)


# ---------------------------------------------------------------------------------- finding it


def find(path: Path, template: str | None) -> Found:
    """What lies at `path`, parameters not read yet."""
    if not path.is_dir():
        raise GenerationError(f"{path}: no such folder; give a run directory or a checkpoint")
    run_file = path / "config.yaml"
    if run_file.is_file():
        run = _run(run_file)
        stage = _last_whole_stage(run, path)
        return _of_run(run, stage, path / "checkpoints" / stage.name / "final", template)
    if not (path / MANIFEST).is_file():
        inside = path / "final"
        if (inside / MANIFEST).is_file():
            return find(inside, template)
        raise GenerationError(
            f"{path}: neither config.yaml of a run nor {MANIFEST} of a checkpoint; PyTorch folders "
            "are converted first: python -m unimoe_jax.convert import --from … --to …"
        )
    if (path / MODEL_FILE).is_file():
        return _of_import(path, template)
    run_file = run_file_of(path)
    if run_file is None:
        raise GenerationError(
            f"{path}: no {MODEL_FILE}, and no run's config.yaml three folders up; the model's "
            "settings are unknown"
        )
    run, name = _run(run_file), read_manifest(path).get("stage")
    stage = next((stage for stage in run.stages if stage.name == name), None)
    if stage is None:
        raise GenerationError(f"{path}: {run_file} has no stage {name}")
    return _of_run(run, stage, path, template)


def _run(file: Path) -> RunConfig:
    try:
        return config_io.load(file)
    except ConfigError as error:
        raise GenerationError(str(error)) from error


def _last_whole_stage(run: RunConfig, folder: Path) -> StageConfig:
    for stage in reversed(run.stages):
        final = folder / "checkpoints" / stage.name / "final"
        if stage.leaves == "all" and (final / MANIFEST).is_file():
            return stage
    raise GenerationError(f"{folder}: no finished stage that leaves a whole model")


def _of_run(run: RunConfig, stage: StageConfig, folder: Path, template: str | None) -> Found:
    config = run.stage_model(stage)
    tokenizer, file = load_tokenizer(run)
    own = getattr(stage, "template", None) or run.data.template
    if template is None and own == "plain":
        raise GenerationError(
            f"{folder}: stage {stage.name} learned captions (template plain), not conversations; "
            "choose a template, e.g. --template vicuna_v1"
        )
    side = file.parent / GENERATION_FILE
    generation = _json(side) if side.is_file() else {}
    return Found(folder, config, tokenizer, template or own, generation)


def _of_import(folder: Path, template: str | None) -> Found:
    check_files(folder)  # before any of them is parsed
    manifest = read_manifest(folder)
    try:
        config = ModelConfig.model_validate(read_settings(folder / MODEL_FILE))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise GenerationError(
            f"{folder / MODEL_FILE}: not a whole model: {where}: {first['msg']}; generation needs "
            "embedding, decoder and head"
        ) from error
    family = str(manifest.get("family", ""))
    known = next((name for start, name in TEMPLATE_OF_FAMILY if family.startswith(start)), None)
    known = manifest.get("template") or known
    if template is None and known not in TEMPLATES:
        raise GenerationError(
            f"{folder}: no template is known for family {family!r}; choose one with --template"
        )
    tokenizer, rows = _tokenizer(folder), config.decoder.vocab_size
    if tokenizer.vocab_size > rows:  # looked up, the rest would all be the last row
        raise GenerationError(
            f"{folder}: tokenizer.model has {tokenizer.vocab_size} pieces, but the model's "
            f"vocab_size is {rows}; copy the tokenizer.model that belongs to it there"
        )
    side = folder / GENERATION_FILE
    generation = _json(side) if side.is_file() else {}
    return Found(folder, config, tokenizer, template or known, generation)


def _tokenizer(folder: Path) -> Tokenizer:
    try:
        return Tokenizer.load(folder)
    except FileNotFoundError as error:
        raise GenerationError(f"{folder}: {error}; copy tokenizer.model there") from error
    except (RuntimeError, ValueError, AttributeError) as error:  # SentencePiece's, then JSON's
        raise GenerationError(
            f"{folder}: its tokenizer cannot be read: {' '.join(str(error).split())}; copy "
            "tokenizer.model and tokenizer_config.json again from the source"
        ) from error


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except ValueError as error:
        raise GenerationError(f"{file}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise GenerationError(f"{file}: expected an object")
    return content


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


def generation_settings(found: Found) -> tuple[tuple[int, ...], Sampling, tuple[str, ...]]:
    """(end tokens, default sampling, notes on keys that are not followed).

    Raises:
        GenerationError: a value in generation_config.json that makes no sense.
    """
    # transformers writes null for what nobody set.
    given = {key: value for key, value in found.generation.items() if value is not None}
    eos = given.get("eos_token_id", found.tokenizer.eos_id)
    eos = tuple(eos) if isinstance(eos, list) else (eos,)
    # In Python true is 1, which is a token of every vocabulary.
    if not all(type(token) is int and abs(token) < 2**31 for token in eos):
        raise GenerationError(
            f"{GENERATION_FILE}: eos_token_id = {given['eos_token_id']!r}; allowed: the id of a "
            "token, or a list of ids"
        )
    drawn = given.get("do_sample", False)
    if not isinstance(drawn, bool):
        raise GenerationError(f"{GENERATION_FILE}: do_sample = {drawn!r}; allowed: true or false")
    defaults = Sampling(
        # transformers draws with temperature 1 and the best 50 unless it is told otherwise.
        temperature=given.get("temperature", 1.0) if drawn else 0.0,
        top_p=given.get("top_p"),
        top_k=given.get("top_k"),
        max_new_tokens=given.get("max_new_tokens"),
    )
    try:
        defaults.checked()
    except GenerationError as error:
        raise GenerationError(f"{found.folder / GENERATION_FILE}: {error}") from error
    notes = [
        f"{GENERATION_FILE}: {key} = {given[key]!r:.60} is not followed"
        for key in sorted(set(given) - FOLLOWED - SILENT)
        if not key.startswith("_") and _asks(key, given[key])
    ]
    if not drawn and given.get("temperature", 1) not in (0, 1):
        hot = given["temperature"]
        notes.append(f"{GENERATION_FILE}: temperature = {hot!r:.60} says nothing without do_sample")
    return eos, defaults, tuple(notes)


def _asks(key: str, value: Any) -> bool:
    return value != NEUTRAL[key] if key in NEUTRAL else bool(value)
