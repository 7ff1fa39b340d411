"""Held-out exact match: the share of samples that greedy decoding answers to the letter.

    python -m unimoe_jax.evaluate RUN_DIR [--stage NAME] [--shuffle-media] [key=value …]

scores what a stage of a finished run left behind on its held-out sources. `--shuffle-media` gives
every question the media of another: what remains is what the model guesses without looking.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from unimoe_jax import config_io
from unimoe_jax.checkpoint import CheckpointError, load_final
from unimoe_jax.config import RunConfig, StageConfig
from unimoe_jax.config_yaml import ConfigError
from unimoe_jax.data.batch import Batch, Signature
from unimoe_jax.data.pipeline import Pipeline
from unimoe_jax.params import Flat
from unimoe_jax.setup_data import (
    chance_levels,
    heldout_pipeline,
    load_tokenizer,
    pool_groups,
    resolve_sources,
    with_shuffled_media,
)
from unimoe_jax.sharding import batch_sharding, data_shards, make_mesh, replicated, use_mesh
from unimoe_jax.stage import Stage, build_stage, place, structs
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


# ------------------------------------------------------------------------------- the program


def score_stage(
    run: RunConfig, stage: StageConfig, folder: Path, *, shuffle_media: bool = False
) -> dict[str, tuple[float, float]]:
    """(accuracy, chance) per held-out source of `stage`, with what it left in `folder`.

    Raises:
        ConfigError: the stage has no held-out sources or has merged its adapters away.
        CheckpointError: it is not finished or damaged.
    """
    if not stage.evaluate or stage.merge_lora or stage.leaves != "all":
        raise ConfigError(
            f"stage {stage.name}: has no held-out sources, or left only a part behind"
        )
    mesh = make_mesh(run.mesh)
    with use_mesh(mesh, run.mesh.rules), tempfile.TemporaryDirectory() as scratch:
        data = resolve_sources(run.data)
        chance = chance_levels(data, stage.evaluate)
        if shuffle_media:
            data = with_shuffled_media(data, stage.evaluate, Path(scratch))
        tokenizer, _ = load_tokenizer(run)
        groups = pool_groups(run, stage, data_shards(mesh))
        pipeline = heldout_pipeline(run, stage, data, tokenizer, groups)
        ready = build_stage(run, stage, mesh, steps=1)
        host = load_final(folder / "checkpoints" / stage.name / "final")
        params = {
            path: place(host[path].astype(info.dtype), ready.shardings[path])
            for path, info in ready.infos.items()
        }
        compiled = {
            name: compile_score(ready, mesh, pipeline.spec(name)) for name in pipeline.signatures
        }
        accuracy = exact_match(params, pipeline, compiled, mesh)
    return {source: (share, chance[source]) for source, share in accuracy.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a table; returns 0, or 2 where the run cannot be scored."""
    parser = argparse.ArgumentParser(
        prog="python -m unimoe_jax.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("--stage", help="default: the last one with held-out sources")
    parser.add_argument("--shuffle-media", action="store_true", help="control: media of others")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args(arguments)
    try:
        run = config_io.load(args.run / "config.yaml", args.overrides)
        stages = {stage.name: stage for stage in run.stages if stage.evaluate}
        name = args.stage or next(reversed(stages), None)
        if name not in stages:
            raise ConfigError(f"--stage {name}: held-out sources are in {sorted(stages)}")
        scores = score_stage(run, stages[name], args.run, shuffle_media=args.shuffle_media)
    except (ConfigError, CheckpointError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    width = max(map(len, scores))
    title = "with the media of another record" if args.shuffle_media else "exact match"
    print(f"{'':<{width}}  {title:>12}  chance")
    for source, (accuracy, chance) in scores.items():
        print(f"{source:<{width}}  {accuracy:>12.1%}  {chance:.1%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
