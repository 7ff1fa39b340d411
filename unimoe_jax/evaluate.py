"""Held-out exact match: the share of samples that greedy decoding answers to the letter.

    python -m unimoe_jax.evaluate RUN_DIR [--stage NAME] [--shuffle-media] [key=value …]

scores what a stage of a finished run left behind on its held-out sources. `--shuffle-media` gives
every question the media of another: what remains is what the model guesses without looking.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from unimoe_jax import config_io, distributed
from unimoe_jax.checkpoint import open_source
from unimoe_jax.config import RunConfig, StageConfig, Take
from unimoe_jax.config_yaml import ConfigError
from unimoe_jax.data.batch import Batch, Signature
from unimoe_jax.data.pipeline import Pipeline
from unimoe_jax.data.tally import TooManyBadSamples
from unimoe_jax.distributed import DistributedError
from unimoe_jax.host_memory import keep_freed_memory
from unimoe_jax.integrity import CheckpointError
from unimoe_jax.params import Flat, ParamError
from unimoe_jax.programs import lower_score
from unimoe_jax.setup_data import (
    chance_levels,
    check_sources,
    heldout_pipeline,
    load_tokenizer,
    pool_groups,
    resolve_sources,
    with_shuffled_media,
)
from unimoe_jax.sharding import (
    ShardingError,
    batch_sharding,
    data_shards,
    make_mesh,
    own_data_shards,
    use_mesh,
)
from unimoe_jax.stage import build_stage, read_params

SCORING_ERRORS = (ConfigError, ParamError, ShardingError, CheckpointError, DistributedError)


def to_devices(batch: Batch, mesh: Mesh) -> Batch:
    """The parts of a batch that belong to this process's data shards, in their order -> global
    arrays, cut over the data shards."""
    own, shards = own_data_shards(mesh), data_shards(mesh)

    def put(a: np.ndarray) -> jax.Array:
        size = len(a) // len(own)

        def part(index: tuple[slice, ...]) -> np.ndarray:
            at = own.index((index[0].start or 0) // size) * size
            return a[at : at + size]

        shape = (size * shards, *a.shape[1:])
        return jax.make_array_from_callback(shape, batch_sharding(mesh, a.ndim), part)

    return jax.tree.map(put, batch)


def exact_match(
    params: Flat,
    pipeline: Pipeline,
    compiled: Mapping[Signature, Any],
    mesh: Mesh,
    stopped: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """Accuracy per source of one pass over `pipeline`; `compiled`: scoring step per signature. None
    if `stopped`, which is asked before every step, said so first. An answer that was cut to fit the
    row counts as wrong: to its end it was not compared."""
    right, total = Counter(), Counter()
    batches = pipeline.batches(
        parts=own_data_shards(mesh), of=data_shards(mesh), stop_step=pipeline.steps_per_epoch
    )
    pending = []
    with contextlib.closing(batches):
        for step, signature, batch in batches:
            if stopped():
                return None
            pending.append((step, compiled[signature](params, to_devices(batch, mesh))))
    for step, (exact_BS, real_BS) in pending:
        exact_BS, real_BS = np.asarray(exact_BS), np.asarray(real_BS)
        for row, segments in enumerate(pipeline.segments_at(step)):
            for segment, (source, whole) in enumerate(segments):
                total[source] += int(real_BS[row, segment])
                right[source] += int(exact_BS[row, segment] and whole)
    return {source: right[source] / max(1, total[source]) for source in pipeline.names}


# ------------------------------------------------------------------------------- the program


def is_scorable(stage: StageConfig) -> bool:
    """Whether the stage has held-out sources and leaves the model that was scored on them."""
    return bool(stage.evaluate) and not stage.merge_lora and stage.leaves == "all"


def score_stage(
    run: RunConfig, stage: StageConfig, folder: Path, *, shuffle_media: bool = False
) -> dict[str, tuple[float, float]]:
    """(accuracy, chance) per held-out source of `stage`, with what it left in `folder`.

    Raises:
        ConfigError: the stage has no held-out sources or has merged its adapters away.
        CheckpointError: it is not finished or damaged.
    """
    if not is_scorable(stage):
        raise ConfigError(
            f"stage {stage.name}: has no held-out sources, or left only a part behind"
        )
    check_sources(run, [stage])
    mesh = make_mesh(run.mesh)
    with use_mesh(mesh, run.mesh.rules), tempfile.TemporaryDirectory() as scratch:
        data = distributed.writer_first("data", lambda: resolve_sources(run.data))
        chance = chance_levels(data, stage.evaluate)
        if shuffle_media:
            data = with_shuffled_media(data, stage.evaluate, Path(scratch))
        tokenizer, _ = load_tokenizer(run)
        groups = pool_groups(run, stage, data_shards(mesh))
        pipeline = heldout_pipeline(run, stage, data, tokenizer, groups)
        ready = build_stage(run, stage, mesh, steps=1)
        left = open_source(stage.name, folder / "checkpoints" / stage.name / "final")
        itself = Take(match=".*", source=stage.name)
        params = read_params(ready, dict.fromkeys(ready.infos, itself), {stage.name: left})
        compiled = {
            name: lower_score(ready, mesh, pipeline.spec(name)).compile()
            for name in pipeline.signatures
        }
        accuracy = exact_match(params, pipeline, compiled, mesh)
    return {source: (share, chance[source]) for source, share in accuracy.items()}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m unimoe_jax.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("--stage", help="default: the last one with held-out sources")
    parser.add_argument("--shuffle-media", action="store_true", help="control: media of others")
    distributed.add_arguments(parser)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    return parser.parse_intermixed_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a table; returns 0, 1 where too many samples are bad, or 2 where the run cannot be
    scored."""
    args = parse(arguments)
    return distributed.guard(lambda: _main(args))


def _main(args: argparse.Namespace) -> int:
    try:
        distributed.initialize(args)
        if jax.default_backend() == "cpu":
            keep_freed_memory()
        run = config_io.load(args.run / "config.yaml", args.overrides)
        stage = stage_to_score(run, args.stage, args.run)
        scores = score_stage(run, stage, args.run, shuffle_media=args.shuffle_media)
    except (*SCORING_ERRORS, OSError, ValueError) as error:
        if distributed.lost_peer(error):
            raise
        return distributed.fail(f"error: {error}", 2)
    except TooManyBadSamples as error:
        return distributed.fail(f"stopped: {error}", 1)
    if distributed.is_writer():
        print_scores(scores, shuffled=args.shuffle_media)
    return 0


def stage_to_score(run: RunConfig, name: str | None, folder: Path) -> StageConfig:
    """The stage called `name`, or the last one with held-out sources.

    Raises:
        ConfigError: there is none.
    """
    stages = {stage.name: stage for stage in run.stages if stage.evaluate}
    if not stages:
        raise ConfigError(
            f"{folder}: no stage of this run has held-out sources, so there is nothing to score; "
            "list some under `evaluate` of a stage before it is trained"
        )
    name = name or next(reversed(stages))
    if name not in stages:
        raise ConfigError(f"--stage {name}: has no held-out sources; allowed: {', '.join(stages)}")
    return stages[name]


def print_scores(scores: Mapping[str, tuple[float, float]], *, shuffled: bool) -> None:
    """A line for every source: accuracy and chance."""
    width = max(map(len, scores))
    title = "with the media of another record" if shuffled else "exact match"
    print(f"{'':<{width}}  {title}  chance")
    for source, (accuracy, chance) in scores.items():
        print(f"{source:<{width}}  {accuracy:>{len(title)}.1%}  {chance:>6.1%}")


if __name__ == "__main__":
    sys.exit(main())
