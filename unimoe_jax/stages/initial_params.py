"""The parameters of a stage at its start, read or drawn onto the mesh."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from unimoe_jax.checkpoints.final import open_source
from unimoe_jax.checkpoints.layout import RunLayout
from unimoe_jax.checkpoints.origins import CHECKPOINT, needed_sources, origin_of, start_of
from unimoe_jax.checkpoints.sources import ParamSource, Start
from unimoe_jax.config import StageConfig, Take
from unimoe_jax.models.declare import full_batch
from unimoe_jax.parallel.sharding import data_shards
from unimoe_jax.params.paths import Flat, flatten
from unimoe_jax.stages.stage import Stage


def open_sources(layout: RunLayout, stage: StageConfig) -> dict[str, ParamSource]:
    """Every earlier stage or checkpoint that the stage takes parameters from, by its name.

    Raises:
        CheckpointError: a source is not there or not finished.
    """
    return {
        name: open_source(name, source_folder(layout, name)) for name in needed_sources(stage.init)
    }


def source_folder(layout: RunLayout, name: str) -> Path:
    """Folder of `checkpoint:PATH`, or of what an earlier stage of this run left."""
    if name.startswith(CHECKPOINT):
        return Path(name.removeprefix(CHECKPOINT)).expanduser()
    return layout.stage(name).final


def initial_params(
    stage: Stage,
    sources: Mapping[str, ParamSource],
    mesh: Mesh,
    seed: int,
    only: set[str] | None = None,
) -> Flat:
    """Parameters at the start of the stage, on the mesh, with the table's dtypes and shardings.

    seed: draws the parameters that start fresh.
    only: paths to return; None returns all.
    """
    wanted = [path for path in stage.infos if only is None or path in only]
    takes = {path: origin_of(path, stage.settings.config.init) for path in wanted}
    fresh = [path for path, take in takes.items() if take.source == "fresh"]
    taken = {path: take for path, take in takes.items() if path not in fresh}
    params = _fresh(stage, fresh, mesh, seed) if fresh else {}
    return params | read_params(stage, taken, sources)


def read_params(
    stage: Stage, takes: Mapping[str, Take], sources: Mapping[str, ParamSource]
) -> Flat:
    """Read the parameters of `takes` from their sources, with the table's dtypes and shardings.

    Raises:
        ParamError: a source lacks a parameter or holds another shape.
        CheckpointError: a source is damaged.
    """
    moe_layers = stage.settings.model.decoder.moe_layers()
    # Find every parameter before reading any, and check the sources before using them, so that a
    # mistake or a damaged file costs seconds instead of the minutes that reading takes.
    starts = {
        path: start_of(path, stage.infos[path].shape, take, sources, moe_layers)
        for path, take in takes.items()
    }
    for name in needed_sources(list(takes.values())):
        sources[name].check()
    return {
        path: read_start(start, stage.infos[path].dtype, stage.shardings[path])
        for path, start in starts.items()
    }


def read_start(start: Start, dtype: str, sharding: NamedSharding) -> jax.Array:
    """Read one parameter onto the mesh.

    A process reads only what its own devices hold. A part that several devices hold is read once,
    and only one part at a time is in host memory.
    """
    # Devices that hold the same part of the array, by that part's (start, stop) on every axis.
    holders: dict[tuple, list[Any]] = {}
    indices: Mapping[Any, Any] = sharding.addressable_devices_indices_map(start.shape)
    for device, index in indices.items():
        bounds = tuple(cut.indices(n)[:2] for cut, n in zip(index, start.shape, strict=True))
        holders.setdefault(bounds, []).append(device)
    arrays = []
    for bounds, devices in holders.items():
        value = start.read(tuple(slice(*ends) for ends in bounds), jnp.dtype(dtype))
        # Wait for the copy, so that this part can be freed before the next is read.
        arrays += jax.block_until_ready([jax.device_put(value, device) for device in devices])
    return jax.make_array_from_single_device_arrays(start.shape, sharding, arrays)


def _fresh(stage: Stage, paths: list[str], mesh: Mesh, seed: int) -> Flat:
    """Draw the parameters `paths` as the model initialises them, directly onto the mesh."""
    shards = data_shards(mesh)
    batch = full_batch(stage.settings.model, shards)

    def init(key: jax.Array) -> Flat:
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), batch)
        names = "params", "dropout", "router"
        keys: dict[str, jax.Array] = dict(zip(names, jax.random.split(key, 3), strict=True))
        flat = flatten(nn.meta.unbox(stage.model.init(keys, zeros)["params"]))
        # XLA removes the computation of every parameter that is not returned.
        return {path: flat[path].astype(stage.infos[path].dtype) for path in paths}

    shardings = {path: stage.shardings[path] for path in paths}
    return jax.jit(init, out_shardings=shardings)(jax.random.key(seed))
