"""Score held-out samples by exact match of the whole answer."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jax.sharding import Mesh

from unimoe_jax.checkpoints.checksums import CheckpointError
from unimoe_jax.config import ConfigError, StageConfig
from unimoe_jax.data.batch import Signature
from unimoe_jax.data.pipeline import Pipeline
from unimoe_jax.parallel.placement import to_devices
from unimoe_jax.parallel.processes import DistributedError
from unimoe_jax.parallel.sharding import ShardingError, data_shards, own_data_shards
from unimoe_jax.params.paths import Flat, ParamError

# Errors of the settings, not of the program: commands print them as one line.
SCORING_ERRORS = (ConfigError, ParamError, ShardingError, CheckpointError, DistributedError)


def exact_match(
    params: Flat,
    pipeline: Pipeline,
    compiled: Mapping[Signature, Any],
    mesh: Mesh,
    stopped: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """Accuracy per source over one pass of `pipeline`.

    params: the parameters that are scored.
    compiled: the compiled scoring step of every batch signature.
    stopped: asked before every step; if it returns True, the result is None.

    An answer that was cut to fit its row counts as wrong, because its end was not compared.
    """
    right, total = Counter(), Counter()
    batches = pipeline.batches(
        shards=own_data_shards(mesh),
        num_shards=data_shards(mesh),
        stop_step=pipeline.steps_per_epoch,
    )
    # Results are fetched after the last step, so that the devices never wait for the host.
    pending = []
    with contextlib.closing(batches):
        for step, signature, batch in batches:
            if stopped():
                return None
            pending.append((step, compiled[signature](params, to_devices(batch, mesh))))
    # exact_BS: whether all target tokens of segment s in row b were right. real_BS: whether the
    # segment has any target tokens, so empty slots of a row do not count.
    for step, (exact_BS, real_BS) in pending:
        exact_BS, real_BS = np.asarray(exact_BS), np.asarray(real_BS)
        for row, segments in enumerate(pipeline.segments_at(step)):
            for segment, (source, whole) in enumerate(segments):
                total[source] += int(real_BS[row, segment])
                right[source] += int(exact_BS[row, segment] and whole)
    return {source: right[source] / max(1, total[source]) for source in pipeline.names}


def is_scorable(stage: StageConfig) -> bool:
    """Whether the stage has held-out sources and leaves behind the model that is scored on them.

    A stage with merged adapters, or one that leaves only some parameters, does not.
    """
    return bool(stage.evaluate) and not stage.merge_lora and stage.leaves == "all"
