"""Between settings and loaders: the embedded data set, tokenizers, and a stage's pipeline."""

from __future__ import annotations

import contextlib
import json
import os
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from unimoe_jax.config import DataConfig, RunConfig, SourceConfig, StageConfig
from unimoe_jax.config_yaml import ConfigError
from unimoe_jax.data import embedded
from unimoe_jax.data.pipeline import Pipeline
from unimoe_jax.data.records import PLACEHOLDERS, RecordFile, path_groups, turns_of
from unimoe_jax.data.tally import BadSample, index_log
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
        ConfigError: there is none, it cannot be read, or it has pieces that the model does not.
    """
    path = run.tokenizer
    if path == "embedded":
        folder = cache_folder(run.data)
        with _cache_errors(folder):
            path = embedded.tokenizer_path(folder, size=run.data.embedded_size)
    file = Path(path) / "tokenizer.model" if Path(path).is_dir() else Path(path)
    try:
        tokenizer = Tokenizer.load(file)
    except (OSError, RuntimeError, ValueError, AttributeError) as error:  # also SentencePiece's
        problem = " ".join(str(error).split())
        raise ConfigError(
            f"tokenizer = {run.tokenizer!r}: {problem}; allowed: `embedded`, a SentencePiece "
            ".model file, or a folder with tokenizer.model"
        ) from error
    size = run.model.decoder.vocab_size
    if tokenizer.vocab_size > size:  # looked up, the rest would all be the last row
        raise ConfigError(
            f"tokenizer = {run.tokenizer!r} has {tokenizer.vocab_size} pieces, but "
            f"model.decoder.vocab_size = {size}; allowed: {tokenizer.vocab_size} or more, or the "
            "tokenizer that belongs to the model"
        )
    return tokenizer, file


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
    return Pipeline(
        _stage_data(data, stage),
        run.stage_model(stage),
        dict(stage.mixture),
        tokenizer,
        loader,
        seed=stage_seed(run, stage),
        shards=groups * accumulate,
    )


def stage_seed(run: RunConfig, stage: StageConfig) -> int:
    """The stage's name is in it: stages over the same sources see them in another order."""
    return run.seed + zlib.crc32(stage.name.encode()) % 65536


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
        choices: dict[str, set[str]] = {}
        for question, answer in pairs:
            choices.setdefault(question, set()).add(answer)
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
    JSON files are written to `folder`. Records with media that no other could take are left out.

    Raises:
        ConfigError: that is all of a source.
    """
    changed = dict(data.sources)
    for name in sources:
        source = data.sources[name]
        records = _records(source)
        media = [{k: r[k] for k in MEDIA_KEYS if k in r} for r in records]
        donors = _donors(media)
        if left := len(records) - len(donors):
            told = f"{source.path}: {left} of {len(records)} records have media that no other has"
            if not donors:
                raise ConfigError(f"{told} the like of: there is nothing to shuffle")
            index_log.warning("%s the like of; they are left out", told)
        shuffled = [
            {k: v for k, v in record.items() if k not in MEDIA_KEYS} | media[donors[number]]
            for number, record in enumerate(records)
            if number in donors
        ]
        path = folder / f"{name}.json"
        path.write_text(json.dumps(shuffled))
        root = source.root or str(Path(source.path).parent)
        changed[name] = source.model_copy(update={"path": str(path), "root": root})
    return data.model_copy(update={"sources": changed})


def _donors(media: list[dict]) -> dict[int, int]:
    """Record -> the record whose media it gets: as many of each kind, as its text has placeholders
    for them, and other ones. A record without media stays as it is."""
    alike: dict[tuple, dict[str, list[int]]] = {}
    for number, own in enumerate(media):
        same = alike.setdefault(_numbers(own), {})
        same.setdefault(json.dumps(own, sort_keys=True), []).append(number)
    donors = {}
    for numbers, same in alike.items():
        blocks = list(same.values())
        shuffled = np.random.default_rng(0).permutation(len(blocks))
        order = [number for block in shuffled for number in blocks[block]]
        # As far as the largest block is long: nobody meets its own media then, if anybody can.
        shift = max(map(len, blocks)) if any(numbers) else 0
        for at, number in enumerate(order):
            donor = order[at - shift]
            if media[donor] != media[number] or not any(numbers):
                donors[number] = donor
    return donors


def _numbers(media: dict) -> tuple[int, ...]:
    """How many of each kind; none where the loader will refuse them."""
    try:
        return tuple(len(path_groups(key, media.get(key))) for key in PLACEHOLDERS)
    except BadSample:
        return ()
