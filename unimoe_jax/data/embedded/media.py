"""Which media files the data set has: their paths, their labels, the seeds of their parameters."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from unimoe_jax.data.embedded import images, sounds, speech, videos

VERSION = 7  # part of the folder's name; raise it whenever the same seed gives other files
DRAWS = 6  # part of every seed; raise it to draw other labels and parameters from the same seed
SPLITS = ("train", "heldout")


@dataclass(frozen=True)
class Counts:
    """Media files per kind in the training split, and held-out records per source."""

    image: int = 1500
    sound: int = 600
    vowel: int = 400
    word: int = 200
    video: int = 600
    text: int = 900
    heldout: int = 96

    def of(self, kind: str, split: str, size: int) -> int:
        """Number of files of a kind in a split; `size` scales the training split only."""
        return self.heldout if split == "heldout" else size * getattr(self, kind)


class Kind(NamedTuple):
    """One kind of media file.

    suffix: of the file name; write: writes a file of given labels; groups: the values of each
    label. All combinations of values within a group are equally frequent; the groups are drawn
    independently. blocks: number of question types; the files are divided into so many equal
    blocks, and the labels are balanced within each block.
    """

    suffix: str
    write: Callable[[Path, dict[str, str], np.random.Generator], None]
    groups: tuple[dict[str, tuple[str, ...]], ...]
    blocks: int


_COLOURS, _SOUNDS = tuple(images.COLOURS), tuple(sounds.SOUNDS)
KINDS: dict[str, Kind] = {
    "image": Kind("png", images.write, ({"colour": _COLOURS, "shape": images.SHAPES},), 2),
    "sound": Kind("wav", sounds.write, ({"sound": _SOUNDS},), 1),
    "vowel": Kind(
        "wav", speech.write_vowel, ({"vowel": tuple(speech.VOWELS), "times": ("1", "2")},), 1
    ),
    "word": Kind("wav", speech.write_word, ({"word": tuple(speech.WORDS)},), 2),
    "video": Kind(
        "mp4",
        videos.write,
        (
            {"colour": _COLOURS, "sound": _SOUNDS},
            {"shape": images.SHAPES, "light": videos.LIGHTS},
        ),
        2,
    ),
}


class Item(NamedTuple):
    """One media file.

    path: relative to the folder of the data set; key: seed of the file's parameters; block: which
    question is asked about it when it is held out.
    """

    kind: str
    path: str
    labels: dict[str, str]
    key: tuple[int, ...]
    block: int


DatasetPlan = dict[str, dict[str, list[Item]]]  # split -> kind -> items


def plan(counts: Counts, seed: int, size: int) -> DatasetPlan:
    """List every media file of the data set, without writing any."""
    return {
        split: {
            kind: _items(
                kind, split, counts.of(kind, split, size), (DRAWS, seed, kind_number, split_number)
            )
            for kind_number, kind in enumerate(KINDS)
        }
        for split_number, split in enumerate(SPLITS)
    }


def write(folder: Path, item: Item) -> None:
    """Draw the parameters of a file from its key and write it below `folder`.

    Every file has a different key, so files can be written in any order and in threads.
    """
    KINDS[item.kind].write(folder / item.path, item.labels, np.random.default_rng(item.key))


def _items(kind: str, split: str, count: int, key: tuple[int, ...]) -> list[Item]:
    """The files of one kind in one split; `key` seeds their labels."""
    form = KINDS[kind]
    rng = np.random.default_rng(key)
    # Example: 5 files in 2 blocks are in the blocks 0, 0, 0, 1, 1.
    block = np.arange(count) * form.blocks // count
    sizes = np.bincount(block, minlength=form.blocks)
    columns: dict[str, list[str]] = {}
    for group in form.groups:
        columns |= _balanced(group, sizes, rng)
    return [
        Item(
            kind=kind,
            path=f"media/{kind}/{split}-{i:05d}.{form.suffix}",
            labels={name: column[i] for name, column in columns.items()},
            key=(*key, i),
            block=int(block[i]),
        )
        for i in range(count)
    ]


def _balanced(
    axes: dict[str, tuple[str, ...]], sizes: np.ndarray, rng: np.random.Generator
) -> dict[str, list[str]]:
    """Draw columns of labels in which, within each block, the numbers of any two combinations of
    values differ by at most one.

    axes: the values of each label; sizes int [blocks]: files per block.

    Example: 2 colours x 2 shapes are 4 combinations. A block of 6 files gets every combination
    once, and 2 of them, chosen at random, twice.
    """
    shape = tuple(len(values) for values in axes.values())
    combinations = math.prod(shape)
    # The first permutation decides which combinations occur once more; the second one shuffles.
    codes = []
    for size in sizes:
        order = rng.permutation(combinations)
        codes.append(rng.permutation(order[np.arange(size) % combinations]))
    indices = np.unravel_index(np.concatenate(codes), shape)
    return {
        name: [values[i] for i in index]
        for (name, values), index in zip(axes.items(), indices, strict=True)
    }
