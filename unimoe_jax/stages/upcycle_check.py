"""Compare an upcycled model with the dense model at step 0; a stage starts only if they agree.

Every expert is a copy of the dense layer, and the weights that combine experts sum to one, so the
outputs are equal whatever the routers choose (arXiv 2405.05949, section 3.3). The comparison runs
in float32 and without capacities, so a difference is either rounding or a mistake in `init`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from unimoe_jax.checkpoints.origins import origin_of, start_of
from unimoe_jax.checkpoints.sources import ParamSource
from unimoe_jax.config import MODULES, MediaName, ModelConfig, ModuleName, Take
from unimoe_jax.config.media import MODALITY
from unimoe_jax.data.batch import Batch, batch_spec
from unimoe_jax.models.declare import full_batch
from unimoe_jax.models.unimoe import UniMoE
from unimoe_jax.nn.linear import LayerOptions
from unimoe_jax.parallel.placement import place
from unimoe_jax.parallel.sharding import batch_sharding, data_shards, param_sharding, replicated
from unimoe_jax.params.layer_parts import LayerPart, layer_parts, locate_part
from unimoe_jax.params.paths import Flat, ParamError, nest
from unimoe_jax.params.table import declared
from unimoe_jax.stages.initial_params import read_start
from unimoe_jax.stages.stage import Stage

ROUNDING = 1e-4
"""Largest difference in float32, relative to the largest value. Recorded dense and upcycled models
of a few layers differ by 1e-6; a wrong expert makes a difference of the order of 1."""
TEXT_TOKENS = 16


@dataclass(frozen=True)
class Comparison:
    """The outcome of a comparison.

    what: "logits", or "soft tokens" if the dense model has experts in its decoder.
    difference, largest: the largest difference, and the largest value that was compared.
    modules, sources: which modules were upcycled, and from which sources.
    """

    what: str
    difference: float
    largest: float
    modules: tuple[ModuleName, ...]
    sources: tuple[str, ...]

    @property
    def is_rounding(self) -> bool:
        """Whether the difference is no more than rounding; NaN is more."""
        return self.difference <= ROUNDING * self.largest

    def __str__(self) -> str:
        return (
            f"{', '.join(self.modules)} upcycled from {', '.join(self.sources)}: largest "
            f"difference from the dense model {self.difference:.2e}, in {self.what} of up to "
            f"{self.largest:.3g}"
        )


def check_upcycled(
    stage: Stage, params: Flat, sources: Mapping[str, ParamSource], mesh: Mesh
) -> Comparison | None:
    """Compare the model of `params` with the dense model that its experts were copied from.

    Must run inside `use_mesh`. Returns None if the stage upcycles nothing.

    Raises:
        ParamError: the models differ by more than rounding.
    """
    takes = _upcycled(stage)
    if not takes:
        return None
    parts = [part for path in takes for _, part in _parts(stage, path)]
    modules: set[ModuleName] = {part.module for part in parts if part.module is not None}
    _check_complete(stage, takes, modules)
    dense_config = stage.settings.model.with_experts(
        stage.settings.model.experts().keys() - modules
    )
    dense_config = dense_config.model_copy(update={"lora": ()})
    dense_layers = _dense_layers(stage, takes, dense_config, sources, mesh)
    batch = _on(mesh, probe(stage.settings.model, data_shards(mesh), modules != {"decoder"}))
    run = partial(_compare, stage, dense_config)
    what = "logits" if dense_config.decoder.moe is None else "soft tokens"
    with jax.default_matmul_precision("highest"):
        found = jax.jit(run, out_shardings=replicated(mesh))(params, dense_layers, batch)
    difference, largest = (float(value) for value in found[what])
    names = tuple(dict.fromkeys(take.upcycle for take in takes.values() if take.upcycle))
    comparison = Comparison(
        what, difference, largest, tuple(name for name in sorted(MODULES) if name in modules), names
    )
    if not comparison.is_rounding:
        raise ParamError(
            f"init of stage {stage.settings.name}: {comparison}: this is more than rounding "
            f"({ROUNDING:g} of the largest value). Are the other parameters taken from the same "
            "checkpoint, and is every expert upcycled?"
        )
    return comparison


def _upcycled(stage: Stage) -> dict[str, Take]:
    """The upcycled parameters and their rules."""
    takes = {path: origin_of(path, stage.settings.config.init) for path in stage.infos}
    return {path: take for path, take in takes.items() if take.upcycle}


def _check_complete(stage: Stage, takes: Mapping[str, Take], modules: set[ModuleName]) -> None:
    """All parameters of a module's experts must be upcycled, or none of them."""
    for path in stage.infos.keys() - takes.keys():
        _, part = _parts(stage, path)[0]
        if part.module in modules and part.expert is not None:
            raise ParamError(
                f"init of stage {stage.settings.name}: {path!r} is not upcycled, other parameters "
                f"of the {part.module}'s experts are; let one rule match them all"
            )


def _parts(stage: Stage, path: str) -> list[tuple[tuple[int, ...], LayerPart]]:
    """The layers' parts of a parameter of the upcycled model."""
    kinds = stage.settings.model.decoder.moe_layers()
    return layer_parts(path, stage.infos[path].shape, kinds)


def _shapes(model: ModelConfig) -> dict:
    """(shape, logical axes) of every parameter of a model, by path."""
    return declared(UniMoE(model, LayerOptions()), full_batch(model))


# ---------------------------------------------------------------------------- the dense model


def _dense_layers(
    stage: Stage,
    takes: Mapping[str, Take],
    dense_config: ModelConfig,
    sources: Mapping[str, ParamSource],
    mesh: Mesh,
) -> Flat:
    """The dense layers that the experts replace, on the mesh, in the dtype of the experts."""
    wanted = {
        part.dense: (take, stage.infos[path].dtype)
        for path, take in takes.items()
        for _, part in _parts(stage, path)
    }
    kinds, layers = dense_config.decoder.moe_layers(), {}
    for path, (shape, axes) in _shapes(dense_config).items():
        replaced = [m for _, m in layer_parts(path, shape, kinds) if m in wanted]
        if replaced:
            take, dtype = wanted[replaced[0]]
            source = Take(match=".*", source=take.upcycle)
            start = start_of(path, shape, source, sources, kinds)
            layers[path] = read_start(start, dtype, param_sharding(mesh, path, shape, axes))
    return layers


def _shared(
    stage: Stage, dense_config: ModelConfig, path: str, shape: tuple[int, ...], params: Flat
) -> jax.Array:
    """A parameter that both models have, stacked as in the dense model."""
    kinds = stage.settings.model.decoder.moe_layers()
    parts = layer_parts(path, shape, dense_config.decoder.moe_layers())
    places = [locate_part(part, kinds) for _, part in parts]
    if all(place == (path, index) for place, (index, _) in zip(places, parts, strict=True)):
        return params[path]
    return jnp.stack([params[stacked_path][index] for stacked_path, index in places])


# -------------------------------------------------------------------------------- comparison


def _compare(
    stage: Stage, dense_config: ModelConfig, params: Flat, dense_layers: Flat, batch: Batch
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """(largest difference, largest value) of the models' logits and soft tokens on `batch`."""
    dense = {
        path: _shared(stage, dense_config, path, shape, params)
        for path, (shape, _) in _shapes(dense_config).items()
        if path not in dense_layers
    }
    ours = _outputs(stage.settings.model, params, batch)
    theirs = _outputs(dense_config, dense | dense_layers, batch)
    return {
        what: (jnp.max(jnp.abs(ours[what] - theirs[what])), jnp.max(jnp.abs(theirs[what])))
        for what in ours
    }


def _unlimited(model: ModelConfig) -> ModelConfig:
    """The model without capacities, because dropped slots would differ from the dense layer however
    the experts start."""

    def part(config: Any) -> Any:
        return config.model_copy(update={"moe": config.moe and config.moe.unlimited})

    vision = model.vision
    if vision:
        parts = {"encoder": part(vision.encoder), "connector": part(vision.connector)}
        vision = vision.model_copy(update=parts)
    return model.model_copy(update={"decoder": part(model.decoder), "vision": vision})


def _outputs(config: ModelConfig, params: Flat, batch: Batch) -> dict[str, jax.Array]:
    """Logits and token stream of a model in float32."""
    options = LayerOptions(dtype=jnp.float32, lora=config.lora)
    model = UniMoE(_unlimited(config), options)
    out: Any = model.apply({"params": nest(params)}, batch, rngs={"router": jax.random.key(0)})
    return {"logits": out.logits_BTV, "soft tokens": out.stream_BTD}


def probe(model: ModelConfig, shards: int, image: bool) -> Batch:
    """A batch of one row of random ids per shard; with `image`, a random image is in the middle."""
    generator = np.random.default_rng(0)
    pools: dict[MediaName, int] = {"image": 1} if image else {}
    soft = model.tokens_per_medium()["image"] if image else 0
    length = TEXT_TOKENS + soft
    batch = Batch(
        *(
            None if spec is None else np.zeros(spec.shape, spec.dtype)
            for spec in batch_spec(model, shards, length, shards, pools)
        )
    )
    batch.token_id_BT[:] = generator.integers(0, model.decoder.vocab_size, (shards, length))
    batch.segment_BT[:] = 1
    batch.position_BT[:] = np.arange(length)
    batch.slot_BT[:] = -1
    if image:
        middle = slice(TEXT_TOKENS // 2, TEXT_TOKENS // 2 + soft)
        batch.token_id_BT[:, middle] = 0
        batch.modality_BT[:, middle] = MODALITY["image"]
        batch.slot_BT[:, middle] = np.arange(soft)
        batch.image_GIHWC[:] = generator.standard_normal(batch.image_GIHWC.shape)
    return batch


def _on(mesh: Mesh, batch: Batch) -> Batch:
    return jax.tree.map(lambda array: place(array, batch_sharding(mesh, array.ndim)), batch)
