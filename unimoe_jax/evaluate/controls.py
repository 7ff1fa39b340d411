"""Controls of an evaluation: chance levels, and data with shuffled media.

A score means little by itself. It should be far above the chance level, which needs no media, and
it should fall to that level when every question is asked with the media of another record.
"""

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
    """The share of answers, per source, that can be right without looking at the media.

    This is the larger one of two strategies: always giving the most common answer of the source, or
    guessing among the answers that the same question has in other records. If "Which colour?" has
    the answers red, red, red and blue, the first strategy gets 3/4 and the second 1/2.
    """
    levels = {}
    for name in sources:
        pairs = list(_answered(_records(data.sources[name])))
        answers = Counter(answer for _, answer in pairs)
        asked = Counter(question for question, _ in pairs)
        choices: dict[str, set[str]] = {}
        for question, answer in pairs:
            choices.setdefault(question, set()).add(answer)
        # A question that occurs once or twice does not show which other answers are possible.
        guess = sum(1 / len(choices[q]) for q, _ in pairs if asked[q] > 2)
        levels[name] = max(*answers.values(), guess, 0) / max(1, len(pairs))
    return levels


def _answered(records: Iterable[dict]) -> Iterator[tuple[str, str]]:
    """The last question and its answer of every record.

    Broken records are left out here. The loader counts them when it reads the samples.
    """
    for record in records:
        with contextlib.suppress(BadSample):
            *_, question, answer = turns_of(record)
            yield question.text, answer.text


def _records(source: SourceConfig) -> list[dict]:
    """The records of a source that can be read, by the rules of the loader.

    Raises:
        ConfigError: no record can be read.
    """
    try:
        file = RecordFile(source.path)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    records, first_problem = [], ""
    for number in range(len(file)):
        try:
            records.append(file.read(number))
        except BadSample as bad:
            first_problem = first_problem or bad.message
    if not records:
        raise ConfigError(f"{source.path}: neither a JSON list nor JSON lines ({first_problem})")
    return records


def with_shuffled_media(data: DataConfig, sources: Iterable[str], folder: Path) -> DataConfig:
    """Settings of data in which every record has the media of another record of its source.

    Questions and answers stay the same, so a model that really uses its media falls to chance. The
    changed JSON files are written to `folder`. A record is left out if no other record can give it
    different media of the same kinds and numbers.

    Raises:
        ConfigError: every record of a source is left out.
    """
    changed = dict(data.sources)
    for name in sources:
        source = data.sources[name]
        records = _records(source)
        media = [{k: r[k] for k in MEDIA_KEYS if k in r} for r in records]
        donors = _donors(media)
        if without_donor := len(records) - len(donors):
            message = (
                f"{source.path}: {without_donor} of {len(records)} records cannot take media from "
                "another record, because none has different media of the same kinds and numbers"
            )
            if not donors:
                raise ConfigError(f"{message}: there is nothing to shuffle")
            index_log.warning("%s; they are left out", message)
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
    """Choose for every record the record whose media it gets: record number -> donor's number.

    A donor has different media, but as many of each kind, because the text of the record has a
    placeholder for each. A record without media is its own donor. A record without a possible
    donor is not in the result.
    """
    # Group the records by their numbers of media, then by the media themselves.
    groups: dict[tuple, dict[str, list[int]]] = {}
    for number, record_media in enumerate(media):
        group = groups.setdefault(_media_counts(record_media), {})
        group.setdefault(json.dumps(record_media, sort_keys=True), []).append(number)
    donors = {}
    for counts, group in groups.items():
        # Put records with the same media next to each other, and these blocks in random order.
        blocks = list(group.values())
        block_order = np.random.default_rng(0).permutation(len(blocks))
        order = [number for block in block_order for number in blocks[block]]
        # Rotate by the size of the largest block: then no record receives its own media, if that
        # is possible at all. With blocks [0, 1] and [2, 3], the order 0, 1, 2, 3 is rotated by two,
        # and the donors of 0, 1, 2, 3 are 2, 3, 0, 1.
        shift = max(map(len, blocks)) if any(counts) else 0
        for position, number in enumerate(order):
            donor = order[position - shift]
            if media[donor] != media[number] or not any(counts):
                donors[number] = donor
    return donors


def _media_counts(media: dict) -> tuple[int, ...]:
    """How many media of each kind a record has; empty for a record that the loader will refuse."""
    try:
        return tuple(len(path_groups(key, media.get(key))) for key in RECORD_PLACEHOLDERS)
    except BadSample:
        return ()
