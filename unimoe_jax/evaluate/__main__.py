"""Score a finished run: the share of held-out samples that greedy decoding answers exactly.

    python -m unimoe_jax.evaluate RUN_DIR [--stage NAME] [--shuffle-media] [key=value …]

scores the model that a stage left behind on the held-out sources of that stage. `--shuffle-media`
is the control: every question gets the media of another record, so a model that really uses its
media falls to chance.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from unimoe_jax.checkpoints.final import open_source
from unimoe_jax.checkpoints.layout import RunLayout
from unimoe_jax.config import ConfigError, RunConfig, StageConfig, Take
from unimoe_jax.config.load import load_config
from unimoe_jax.config.stage_settings import resolve_stage
from unimoe_jax.data.sources import check_sources, load_tokenizer, resolve_sources
from unimoe_jax.data.tally import TooManyBadSamples
from unimoe_jax.evaluate.controls import chance_levels, with_shuffled_media
from unimoe_jax.evaluate.exact_match import SCORING_ERRORS, exact_match, is_scorable
from unimoe_jax.parallel import distributed
from unimoe_jax.parallel.sharding import data_shards, make_mesh, use_mesh
from unimoe_jax.runtime.cpu import prepare
from unimoe_jax.runtime.program import program_name
from unimoe_jax.stages.data import heldout_pipeline
from unimoe_jax.stages.initial_params import read_params
from unimoe_jax.stages.programs import lower_score
from unimoe_jax.stages.stage import build_stage

# ------------------------------------------------------------------------------- the program


def score_stage(
    run: RunConfig, stage: StageConfig, layout: RunLayout, *, shuffle_media: bool = False
) -> dict[str, tuple[float, float]]:
    """(accuracy, chance) per held-out source of `stage`, with the parameters that it left behind.

    shuffle_media: give every question the media of another record.

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
        settings = resolve_stage(run, stage)
        groups = settings.pool_groups(data_shards(mesh))
        pipeline = heldout_pipeline(settings, data, tokenizer, groups)
        ready = build_stage(settings, mesh, steps=1)
        result = open_source(stage.name, layout.stage(stage.name).final)
        take = Take(match=".*", source=stage.name)
        params = read_params(ready, dict.fromkeys(ready.infos, take), {stage.name: result})
        compiled = {
            name: lower_score(ready, mesh, pipeline.spec(name)).compile()
            for name in pipeline.signatures
        }
        accuracy = exact_match(params, pipeline, compiled, mesh)
    assert accuracy is not None  # None would mean that a stop signal came; none is asked for here.
    return {source: (share, chance[source]) for source, share in accuracy.items()}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog=program_name("evaluate"),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("--stage", help="default: the last stage with held-out sources")
    parser.add_argument(
        "--shuffle-media", action="store_true", help="control: ask with the media of other records"
    )
    distributed.add_arguments(parser)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    return parser.parse_intermixed_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a table. Returns 0, or 1 if too many samples are bad, or 2 if the run cannot be
    scored.
    """
    args = parse(arguments)
    return distributed.guard(lambda: run_command(args))


def run_command(args: argparse.Namespace) -> int:
    """Carry out the parsed command. Returns the exit code."""
    try:
        distributed.initialize(args)
        prepare()
        layout = RunLayout(args.run)
        run = load_config(layout.config, args.overrides)
        stage = stage_to_score(run, args.stage, args.run)
        scores = score_stage(run, stage, layout, shuffle_media=args.shuffle_media)
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
    """The stage called `name`, or the last stage with held-out sources.

    Raises:
        ConfigError: there is no such stage.
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
    """Print a line for every source: accuracy and chance level."""
    width = max(map(len, scores))
    title = "with the media of another record" if shuffled else "exact match"
    print(f"{'':<{width}}  {title}  chance")
    for source, (accuracy, chance) in scores.items():
        print(f"{source:<{width}}  {accuracy:>{len(title)}.1%}  {chance:>6.1%}")


if __name__ == "__main__":
    sys.exit(main())
