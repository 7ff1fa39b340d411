"""Held-out exact match: the share of samples that greedy decoding answers to the letter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from unimoe_jax.data.batch import Batch
from unimoe_jax.data.pipeline import Pipeline
from unimoe_jax.params import Flat
from unimoe_jax.sharding import batch_sharding, replicated
from unimoe_jax.stage import Stage, structs
from unimoe_jax.train_step import make_score_step


def to_devices(batch: Batch, mesh: Mesh) -> Batch:
    """This process's part of a batch -> global arrays, cut over the data shards."""
    return jax.tree.map(
        lambda a: jax.make_array_from_process_local_data(batch_sharding(mesh, a.ndim), a), batch
    )


def compile_score(stage: Stage, mesh: Mesh, spec: Batch) -> Any:
    """The scoring step, compiled ahead for batches of `spec`."""
    score = jax.jit(make_score_step(stage.scorer), out_shardings=replicated(mesh))
    params = {
        path: jax.ShapeDtypeStruct(info.shape, info.dtype, sharding=stage.shardings[path])
        for path, info in stage.infos.items()
    }
    return score.lower(params, structs(spec, lambda rank: batch_sharding(mesh, rank))).compile()


def exact_match(
    params: Flat, pipelines: Mapping[str, Pipeline], compiled: Mapping[tuple, Any], mesh: Mesh
) -> dict[str, float]:
    """Accuracy per source. `compiled` maps (source, signature) to a compiled scoring step."""
    accuracy = {}
    for name, pipeline in pipelines.items():
        counts = []
        batches = pipeline.batches(
            host=jax.process_index(),
            hosts=jax.process_count(),
            stop_step=pipeline.steps_per_epoch,
        )
        for _, signature, batch in batches:
            counts.append(compiled[name, signature](params, to_devices(batch, mesh)))
        right = sum(int(r) for r, _ in counts)
        total = sum(int(t) for _, t in counts)
        accuracy[name] = right / max(1, total)
    return accuracy
