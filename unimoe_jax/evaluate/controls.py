"""Controls of an evaluation: chance levels, and data with shuffled media."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from unimoe_jax.config import ConfigError, DataConfig, SourceConfig
from unimoe_jax.config.media import RECORD_PLACEHOLDERS
from unimoe_jax.data.record_files import RecordFile
from unimoe_jax.data.records import path_groups, turns_of
from unimoe_jax.data.tally import BadSample, index_log

MEDIA_KEYS = (*RECORD_PLACEHOLDERS, "voice_modality")


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
        return tuple(len(path_groups(key, media.get(key))) for key in RECORD_PLACEHOLDERS)
    except BadSample:
        return ()
