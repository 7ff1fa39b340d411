"""Between settings and loaders: the embedded data set, tokenizers, and a stage's pipeline."""

from __future__ import annotations

import contextlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from unimoe_jax.config import DataConfig, RunConfig, SourceConfig, StageConfig
from unimoe_jax.config_yaml import ConfigError
from unimoe_jax.data import embedded
from unimoe_jax.data.pipeline import Pipeline
from unimoe_jax.data.records import RecordFile, turns_of
from unimoe_jax.data.tally import BadSample
from unimoe_jax.data.tokenizer import Tokenizer

PREFIX = "embedded:"
MEDIA_KEYS = ("image", "video", "voice", "voice_modality")


def cache_folder(data: DataConfig) -> Path:
    """Where generated data and indices lie: `data.cache`, else the user's cache folder."""
    home = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "unimoe_jax"
    return Path(data.cache or home).expanduser()


@contextlib.contextmanager
def _cache_errors(folder: Path) -> Iterator[None]:
    """What is made on first use lies in the cache."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"data.cache {folder}: cannot be written ({error.strerror or error}); set data.cache, "
            "or XDG_CACHE_HOME, to a folder that can"
        ) from error


def resolve_sources(data: DataConfig) -> DataConfig:
    """`embedded:SPLIT/NAME` paths become files on disk; the set is built on first use."""
    folder, sources = cache_folder(data), {}
    for name, source in data.sources.items():
        if source.path.startswith(PREFIX):
            with _cache_errors(folder):
                path = Path(embedded.resolve(source.path, folder, size=data.embedded_size))
            root = str(path.parent.parent)
            source = source.model_copy(update={"path": str(path), "root": root})
        sources[name] = source
    return data.model_copy(update={"sources": sources, "cache": str(folder)})


def check_sources(run: RunConfig, stages: Iterable[StageConfig]) -> None:
    """The files of everything that `stages` read or are scored on must be there.

    Raises:
        ConfigError: one is missing; its key and the stage are named.
    """
    for stage in stages:
        for name in (*stage.mixture, *stage.evaluate):
            path = run.data.sources[name].path
            if not path.startswith(PREFIX) and not Path(path).is_file():
                raise ConfigError(
                    f"data.sources.{name}.path = {path!r} (stage {stage.name}): no such file"
                )


def load_tokenizer(run: RunConfig) -> tuple[Tokenizer, Path]:
    """The run's tokenizer and the file it came from.

    Raises:
        ConfigError: there is none, or it cannot be read.
    """
    path = run.tokenizer
    if path == "embedded":
        folder = cache_folder(run.data)
        with _cache_errors(folder):
            path = embedded.tokenizer_path(folder, size=run.data.embedded_size)
    try:
        return Tokenizer.load(path), Path(path)
    except (OSError, RuntimeError, ValueError, AttributeError) as error:  # also SentencePiece's
        problem = " ".join(str(error).split())
        raise ConfigError(
            f"tokenizer = {run.tokenizer!r}: {problem}; allowed: `embedded`, a SentencePiece "
            ".model file, or a folder with tokenizer.model"
        ) from error


def pool_groups(run: RunConfig, stage: StageConfig, shards: int) -> int:
    """G: media pools per batch; rows and data shards must fit it.

    Raises:
        ConfigError: they do not.
    """
    loader = stage.loader or run.data.loader
    key = f"stages.{stage.name}.loader" if stage.loader else "data.loader"
    groups = loader.groups or shards
    if groups % shards:
        raise ConfigError(
            f"{key}.groups = {groups} (stage {stage.name}): allowed: multiples of {shards}, the "
            "data shards of the mesh"
        )
    if loader.rows % groups:
        whose = f"{key}.groups = {groups}" if loader.groups else f"the mesh's {groups} data shards"
        divisors = [n for n in range(1, loader.rows + 1) if not (loader.rows % n or n % shards)]
        others = f", or {_listed(divisors)} for {key}.groups" if loader.groups and divisors else ""
        raise ConfigError(
            f"{key}.rows = {loader.rows} (stage {stage.name}) does not divide over {whose}; "
            f"allowed: multiples of {groups} for {key}.rows{others}"
        )
    return groups


def _listed(numbers: list[int]) -> str:
    return " or ".join(map(str, numbers))


def stage_pipeline(
    run: RunConfig, stage: StageConfig, data: DataConfig, tokenizer: Tokenizer, groups: int
) -> Pipeline:
    """Training batches of a stage. Each holds the micro-batches of one optimizer step: rows and
    groups are multiplied by `optim.accumulate`."""
    loader = stage.loader or data.loader
    accumulate = stage.optim.accumulate
    loader = loader.model_copy(update={"rows": loader.rows * accumulate})
    # The stage's name is in the seed: stages over the same sources see them in another order.
    seed = run.seed + int.from_bytes(stage.name.encode()[:4], "little") % 65536
    return Pipeline(
        _stage_data(data, stage),
        run.stage_model(stage),
        dict(stage.mixture),
        tokenizer,
        loader,
        seed=seed,
        shards=groups * accumulate,
    )


def stage_steps(stage: StageConfig, pipeline: Pipeline) -> int:
    """How many steps the stage trains on the batches of `pipeline`.

    Raises:
        ConfigError: none; it would leave what it began with.
    """
    steps = stage.optim.steps or pipeline.steps(stage.optim.epochs)
    if not steps:
        raise ConfigError(
            f"stages.{stage.name}.optim.epochs = {stage.optim.epochs:g}: less than one step; "
            f"batches per epoch: {pipeline.steps_per_epoch}; set more epochs, or optim.steps"
        )
    return steps


def heldout_pipeline(
    run: RunConfig, stage: StageConfig, data: DataConfig, tokenizer: Tokenizer, groups: int
) -> Pipeline:
    """Every sample of the stage's held-out sources exactly once, all media in one signature: one
    program scores them all."""
    loader = (stage.loader or data.loader).model_copy(update={"group_by_modality": False})
    mixture = dict.fromkeys(stage.evaluate, 1.0)
    return Pipeline(
        _stage_data(data, stage),
        run.stage_model(stage),
        mixture,
        tokenizer,
        loader,
        seed=0,
        shards=groups,
        shuffle=False,
    )


def _stage_data(data: DataConfig, stage: StageConfig) -> DataConfig:
    """The data as this stage reads them: with its own template, if it has one."""
    return data.model_copy(update={"template": stage.template or data.template})


def chance_levels(data: DataConfig, sources: Iterable[str]) -> dict[str, float]:
    """Per source, what is right without looking at the media: the share of the commonest answer, or
    a guess among the answers that the same question has elsewhere, whichever is more."""
    levels = {}
    for name in sources:
        pairs = list(_answered(_records(data.sources[name])))
        answers = Counter(answer for _, answer in pairs)
        asked = Counter(question for question, _ in pairs)
        choices = {q: {answer for other, answer in pairs if other == q} for q in asked}
        # A question asked once or twice says nothing about what else it could be answered with.
        guess = sum(1 / len(choices[q]) for q, _ in pairs if asked[q] > 2)
        levels[name] = max(*answers.values(), guess, 0) / max(1, len(pairs))
    return levels


def _answered(records: Iterable[dict]) -> Iterator[tuple[str, str]]:
    """The last question and its answer of every record that has them; others are counted as bad
    where samples are read."""
    for record in records:
        with contextlib.suppress(BadSample):
            *_, question, answer = turns_of(record)
            yield question.text, answer.text


def _records(source: SourceConfig) -> list[dict]:
    """The records that can be read, found as the loader finds them.

    Raises:
        ConfigError: there are none.
    """
    try:
        file = RecordFile(source.path)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    found, problem = [], ""
    for number in range(len(file)):
        try:
            found.append(file.read(number))
        except BadSample as bad:
            problem = problem or bad.message
    if not found:
        raise ConfigError(f"{source.path}: neither a JSON list nor JSON lines ({problem})")
    return found


def with_shuffled_media(data: DataConfig, sources: Iterable[str], folder: Path) -> DataConfig:
    """The data with every record of `sources` given the media of another record of its source.

    Questions and answers stay, so a model that really uses its media falls to chance. The changed
    JSON files are written to `folder`.
    """
    changed = dict(data.sources)
    for name in sources:
        source = data.sources[name]
        records = _records(source)
        order = np.random.default_rng(0).permutation(len(records))
        donors = dict(zip(order, np.roll(order, 1), strict=True))  # one cycle: nobody keeps its own
        media = [{k: r[k] for k in MEDIA_KEYS if k in r} for r in records]
        path = folder / f"{name}.json"
        path.write_text(json.dumps([r | media[donors[i]] for i, r in enumerate(records)]))
        root = source.root or str(Path(source.path).parent)
        changed[name] = source.model_copy(update={"path": str(path), "root": root})
    return data.model_copy(update={"sources": changed})
