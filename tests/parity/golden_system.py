"""A recorded system: its checkpoint, imported in memory, and the inputs of its decoder.

Sizes, families and placements come from the files, so this code works for any recorded system.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from tests.convert.reading import read_all
from unimoe_jax.config.media import MODALITY
from unimoe_jax.convert.family_plans import plan_of
from unimoe_jax.convert.options import Options
from unimoe_jax.convert.plan import Resolution, resolve_plan
from unimoe_jax.convert.recognise import recognise
from unimoe_jax.data.processors import Processors
from unimoe_jax.data.records import MediaFile

PLACEHOLDER = {-200: "image", -300: "voice", -400: "video"}


@dataclass(frozen=True)
class Spliced:
    """Rows as the reference feeds its decoder: text, soft tokens, embedded padding, zero vectors.

    token_id, modality, slot: [B,N] as in `Batch`, except that padding counts as text.
    labels: [B,N], -100 where a position is not learned.
    attended: [B], number of positions at the start of a row that other positions may attend to.
    zero: [B,N], True where the row has a zero vector.
    """

    token_id: np.ndarray
    modality: np.ndarray
    slot: np.ndarray
    labels: np.ndarray
    attended: np.ndarray
    zero: np.ndarray


@dataclass(frozen=True)
class Pools:
    """Encoder inputs [1, entries, …] as in `Batch`; None if the batch has no such medium."""

    image: np.ndarray | None
    video: np.ndarray | None
    sound: np.ndarray | None
    sound_length: np.ndarray | None


@dataclass(frozen=True)
class System:
    """One folder of recorded data."""

    folder: Path

    @cached_property
    def inputs(self):
        return np.load(self.folder / "inputs.npz")

    @cached_property
    def expected(self) -> dict[str, np.ndarray]:
        return load_file(self.folder / "expected.safetensors")

    @cached_property
    def info(self) -> dict:
        return json.loads((self.folder / "info.json").read_text())

    @cached_property
    def grad_norms(self) -> dict[str, dict[str, float]]:
        return json.loads((self.folder / "grad_norms.json").read_text())

    @cached_property
    def sources(self):
        return recognise([self.folder / "checkpoint"])

    @cached_property
    def config(self) -> dict:
        """config.json of the fine-tune."""
        return dict(next(s.config for s in self.sources if s.role == "tuned"))

    def resolution(self, form: str) -> Resolution:
        """Resolve a form: `unmerged` has separate adapters, as in training; `merged` is the model
        that the released loader makes."""
        options = Options("keep", "merge") if form == "unmerged" else Options("merge", "override")
        return resolve_plan(plan_of(self.sources, options))

    @cached_property
    def voice(self) -> str:
        model = self.resolution("merged").plan.model
        return "audio" if model.audio else "speech"

    @cached_property
    def processors(self) -> Processors:
        """Processors like those of the inference scripts: images are cropped, never padded."""
        model = self.resolution("merged").plan.model
        vision = model.vision.model_copy(update={"aspect": "square"})
        return Processors(model.model_copy(update={"vision": vision}))

    def load(self, modality: str, *paths: str) -> tuple[list[np.ndarray], list[int]]:
        """Pool entries of recorded media files, for inference."""
        given = [self.folder / path for path in paths]
        if len(given) == 1 and given[0].is_dir():
            given = sorted(given[0].iterdir())
        entries = self.processors.load(MediaFile(modality, tuple(str(path) for path in given)))
        return entries.arrays, entries.lengths


# ------------------------------------------------------------------------------- splicing


def splice(
    rows: list[list[int]],
    labels: list[list[int]],
    text_length: list[int],
    files: list[list[int]],
    tokens: dict[str, int],
    voice: str,
    counts: tuple[int, int],
    blank: bool = False,
) -> Spliced:
    """Replace placeholders by slots, and pad rows with zero vectors to the length of the longest.

    Args:
        rows: ids with negative placeholders, padded to one length.
        labels: the label of every id.
        text_length: number of ids in each row that are not padding.
        files: number of chunks of each voice file, per row.
        tokens: number of soft tokens per entry of a medium.
        counts: number of images and of videos in the batch; sounds follow them in the table.
        blank: whether a row without an image takes one image from the table, as in CuMo.
    """
    start = {"image": 0, "video": counts[0] * tokens.get("image", 0)}
    start[voice] = start["video"] + counts[1] * tokens.get("video", 0)
    built, attended = [], []
    for ids, marks, length, chunks in zip(rows, labels, text_length, files, strict=True):
        queue, row = iter(chunks), []
        for token, label in zip(ids, marks, strict=True):
            if token not in PLACEHOLDER:
                row.append((token, 0, -1, label))
                continue
            name = PLACEHOLDER[token]
            name, entries = (voice, next(queue)) if name == "voice" else (name, 1)
            for _ in range(entries * tokens[name]):
                row.append((0, MODALITY[name], start[name], -100))
                start[name] += 1
        if blank and not set(ids) & PLACEHOLDER.keys():
            start["image"] += tokens["image"]
        attended.append(len(row) - len(ids) + length)
        built.append(row)
    longest = max(map(len, built))
    zero = np.array([[i >= len(row) for i in range(longest)] for row in built])
    padded = np.array([row + [(0, 0, -1, -100)] * (longest - len(row)) for row in built], np.int32)
    token, modality, slot, label = np.moveaxis(padded, -1, 0)
    return Spliced(token, modality, slot, label, np.array(attended), zero)


def chunks_per_file(features_mask: np.ndarray) -> list[int]:
    """Count the chunks of each file: [1, 1, 2, 0] -> [2, 1]. The reference stops at the first 0."""
    counts: list[int] = []
    for previous, number in zip([0, *features_mask], features_mask, strict=False):
        if number == 0:
            break
        if number == previous:
            counts[-1] += 1
        else:
            counts.append(1)
    return counts


def training_batch(system: System, tokens: dict[str, int]) -> tuple[Spliced, Pools]:
    """The collated batch of inputs.npz."""
    inputs = system.inputs
    has_image, has_video = inputs["image_mask"], inputs["video_mask"]
    files = [chunks_per_file(row) for row in inputs["features_mask"]]
    spliced = splice(
        inputs["input_ids"].tolist(),
        inputs["labels"].tolist(),
        inputs["attention_mask"].sum(1).tolist(),
        files,
        tokens,
        system.voice,
        (int(has_image.sum()), int(has_video.sum())),
    )
    used = inputs["features_mask"] > 0
    sound = inputs["input_features"][used]
    length = None
    if system.voice == "audio":
        sound = sound[:, 0]
        length = (inputs["padding_masks"][used][:, 0] == 0).sum(-1).astype(np.int32)[None]
    image = inputs["images"][has_image].transpose(0, 2, 3, 1)
    video = inputs["videos"][has_video].transpose(0, 1, 3, 4, 2)
    pools = [pool[None] if len(pool) else None for pool in (image, video, sound)]
    return spliced, Pools(*pools, length)


def query_batch(system: System, tokens: dict[str, int]) -> tuple[Spliced, Pools]:
    """The inference queries as one batch.

    Ids come from inputs.npz, and so do images if they were recorded. Other media are decoded from
    their files.
    """
    queries = json.loads((system.folder / "generate_queries.json").read_text())
    rows, files, images, videos, sounds, lengths = [], [], [], [], [], []
    for number, query in enumerate(queries):
        rows.append(system.inputs[f"generate/{number}/input_ids"][0].tolist())
        files.append([])
        if f"generate/{number}/images" in system.inputs:
            images += list(system.inputs[f"generate/{number}/images"].transpose(0, 2, 3, 1))
        elif query.get("image"):
            images += system.load("image", query["image"])[0]
        if query.get("video"):
            video = query["video"]
            videos += system.load("video", *([video] if isinstance(video, str) else video))[0]
        voices = query.get("voice") or []
        for voice in [voices] if isinstance(voices, str) else voices:
            arrays, valid = system.load(system.voice, voice)
            files[-1].append(len(arrays))
            sounds += arrays
            lengths += valid
    longest = max(map(len, rows))
    spliced = splice(
        [row + [0] * (longest - len(row)) for row in rows],
        [[-100] * longest for _ in rows],
        [len(row) for row in rows],
        files,
        tokens,
        system.voice,
        (len(images), len(videos)),
    )
    pools = [np.stack(pool)[None] if pool else None for pool in (images, videos, sounds)]
    length = np.array([lengths], np.int32) if system.voice == "audio" and lengths else None
    return spliced, Pools(*pools, length)


def read_params(resolution: Resolution) -> dict[str, np.ndarray]:
    """Path -> float32 array, for every parameter of an import."""
    return {path: value.astype(np.float32) for path, value in read_all(resolution).items()}
