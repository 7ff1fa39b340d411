"""Held-out exact match: the share of samples that greedy decoding answers to the letter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from unimoe_jax.data.batch import Batch, Signature
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
    params: Flat, pipeline: Pipeline, compiled: Mapping[Signature, Any], mesh: Mesh
) -> dict[str, float]:
    """Accuracy per source of one pass over `pipeline`; `compiled`: scoring step per signature."""
    right, total = Counter(), Counter()
    batches = pipeline.batches(
        host=jax.process_index(), hosts=jax.process_count(), stop_step=pipeline.steps_per_epoch
    )
    pending = [
        (step, compiled[signature](params, to_devices(batch, mesh)))
        for step, signature, batch in batches
    ]
    for step, (exact_BS, real_BS) in pending:
        exact_BS, real_BS = np.asarray(exact_BS), np.asarray(real_BS)
        for row, sources in enumerate(pipeline.sources_at(step)):
            for segment, source in enumerate(sources):
                total[source] += int(real_BS[row, segment])
                right[source] += int(exact_BS[row, segment])
    return {source: right[source] / max(1, total[source]) for source in pipeline.names}
