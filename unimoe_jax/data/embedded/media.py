"""Which media files there are: their paths, labels and the keys that seed their parameters."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from unimoe_jax.data.embedded import images, sounds, speech, videos

VERSION = 7  # raise it whenever the same seed gives other files
DRAWS = 6  # raise it to draw other labels and parameters from the same seed
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
        """Files of a kind in a split; `size` scales the training split only."""
        return self.heldout if split == "heldout" else size * getattr(self, kind)


class Kind(NamedTuple):
    """One kind of file. Values within an axis group are balanced jointly, groups independently."""

    suffix: str
    write: Callable[[Path, dict[str, str], np.random.Generator], None]
    groups: tuple[dict[str, tuple[str, ...]], ...]
    blocks: int  # question types: labels are balanced within each of so many equal blocks


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
    """One media file: path relative to the data set, labels, and the seed of its parameters."""

    kind: str
    path: str
    labels: dict[str, str]
    key: tuple[int, ...]
    block: int


DatasetPlan = dict[str, dict[str, list[Item]]]  # split -> kind -> items


def plan(counts: Counts, seed: int, size: int) -> DatasetPlan:
    """Lists every media file of the data set, without writing any."""
    return {
        split: {
            kind: _items(kind, split, counts.of(kind, split, size), (DRAWS, seed, k, s))
            for k, kind in enumerate(KINDS)
        }
        for s, split in enumerate(SPLITS)
    }


def write(folder: Path, item: Item) -> None:
    """Draws the file's parameters from its own key and writes it below `folder`."""
    KINDS[item.kind].write(folder / item.path, item.labels, np.random.default_rng(item.key))


def _items(kind: str, split: str, count: int, key: tuple[int, ...]) -> list[Item]:
    suffix, _, groups, blocks = KINDS[kind]
    rng = np.random.default_rng(key)
    block = np.arange(count) * blocks // count
    sizes = np.bincount(block, minlength=blocks)
    columns: dict[str, list[str]] = {}
    for group in groups:
        columns |= _balanced(group, sizes, rng)
    return [
        Item(
            kind=kind,
            path=f"media/{kind}/{split}-{i:05d}.{suffix}",
            labels={name: column[i] for name, column in columns.items()},
            key=(*key, i),
            block=int(block[i]),
        )
        for i in range(count)
    ]


def _balanced(
    axes: dict[str, tuple[str, ...]], sizes: np.ndarray, rng: np.random.Generator
) -> dict[str, list[str]]:
    """Columns of labels in which, per block, all combinations are equally frequent up to one."""
    shape = tuple(len(values) for values in axes.values())
    cells = math.prod(shape)
    codes = [rng.permutation(rng.permutation(cells)[np.arange(n) % cells]) for n in sizes]
    indices = np.unravel_index(np.concatenate(codes), shape)
    return {
        name: [values[i] for i in index]
        for (name, values), index in zip(axes.items(), indices, strict=True)
    }
