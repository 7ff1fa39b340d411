"""The cases of train_step.py: a stage, its weights and a batch, in files that both sides read."""

from __future__ import annotations

import json
from pathlib import Path

import common
import numpy as np

LEARNING_RATE, CLIP_NORM = 1e-5, 1.0
ROWS, ROW_LENGTH, SEGMENTS = 4, 512, 4
EPOCH = 2000  # number of made-up samples, from which one batch is taken
SAMPLES = ("equal", "varied")


def make_stage(size: str, name: str):
    """Return the run and its stage `tune`, which starts from fresh weights.

    name: `tune` keeps what the run file trains; `full` trains every parameter, without adapters.
    """
    from unimoe_jax.config import OptimConfig, Rule, Take
    from unimoe_jax.config.load import load_config

    run = load_config(common.ROOT / common.RUN_FILES[size])
    stage = next(stage for stage in run.stages if stage.name == "tune")
    changes = {
        "init": (Take(match=".*", source="fresh"),),
        "optim": OptimConfig(
            learning_rate=LEARNING_RATE,
            steps=10_000,
            schedule="constant",
            warmup_ratio=0.0,
            clip_norm=CLIP_NORM,
        ),
    }
    if name == "full":
        changes |= {"lora": (), "train": (Rule(match=".*", lr=1.0),)}
    return run, stage.model_copy(update=changes)


def prepare(folder: Path, size: str, name: str, signature: str, samples: str) -> None:
    """Write the weights, the batch and the description of a case to `folder`."""
    import jax

    from unimoe_jax.config import MeshConfig
    from unimoe_jax.config.stage_settings import resolve_stage
    from unimoe_jax.nn.stack import where_is
    from unimoe_jax.parallel.sharding import make_mesh, use_mesh
    from unimoe_jax.stages.initial_params import initial_params
    from unimoe_jax.stages.stage import build_stage

    run, stage = make_stage(size, name)
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    with use_mesh(mesh):
        built = build_stage(resolve_stage(run, stage), mesh, 10_000)
        params = initial_params(built, {}, mesh, 0)
    random = np.random.default_rng(1)
    for path, value in params.items():
        # lora_b starts as zeros, so adapters change nothing yet. Add noise, so that the comparison
        # of both sides can see them.
        if path.endswith("/lora_b"):
            noise = random.standard_normal(value.shape, dtype=np.float32)
            params[path] = 0.01 * noise
    np.savez(folder / "params.npz", **{path: np.asarray(v) for path, v in params.items()})
    vision = built.settings.model.vision
    side = vision.encoder.image_size if signature == "image" else None
    media = 1 + vision.num_tokens if side else 0
    lengths, room = varied_samples(media) if samples == "varied" else equal_samples()
    vocabulary = built.settings.model.decoder.vocab_size
    batch = make_batch(vocabulary, (room, side), vision.num_tokens, lengths)
    np.savez(folder / "batch.npz", **batch)
    kinds = built.settings.model.decoder.moe_layers()
    description = {
        "parameters": sum(info.size for info in built.infos.values()),
        "trained": [path for path, info in built.infos.items() if info.trained],
        "model": built.settings.model.model_dump(),
        "lora": [rule.model_dump() for rule in stage.lora],
        "aux": stage.aux.model_dump(),
        "places": [
            (place.prefix, place.index, kind)
            for place, kind in zip(where_is(kinds), kinds, strict=True)
        ],
        "one_per_row": samples == "varied",
        "samples": sum(len(row) for row in lengths),
        "tokens": sum(sum(row) for row in lengths),
        "longest": max(max(row) for row in lengths),
    }
    (folder / "case.json").write_text(json.dumps(description))


def equal_samples() -> tuple[list[list[int]], int]:
    """Samples of equal length that fill every row.

    Returns the lengths of the samples of each row, and the number of images.
    """
    return [[ROW_LENGTH // SEGMENTS] * SEGMENTS] * ROWS, ROWS * SEGMENTS


def varied_samples(media: int) -> tuple[list[list[int]], int]:
    """Samples with text as long as in instruction data, packed as this package packs them.

    Returns the lengths of the samples of each row, and the number of images that a batch has room
    for. Out of the batches of an epoch, the batch is taken that is in the middle when they are
    sorted by `padded`: by the positions per token that PyTorch computes, with one sample per row.

    media: number of positions of an image at the start of every sample; 0 for text alone.
    """
    from unimoe_jax.config import MEDIA, LoaderConfig
    from unimoe_jax.data.plan import BatchPlan, Samples

    random = np.random.default_rng(8)
    tokens = media + common.text_lengths(random, EPOCH, ROW_LENGTH - media)
    entries = np.zeros((EPOCH, len(MEDIA)), np.int64)
    entries[:, MEDIA.index("image")] = media > 0
    source, record = np.zeros(EPOCH, np.int64), np.arange(EPOCH)
    loader = LoaderConfig(row_length=ROW_LENGTH, rows=ROWS)
    samples = Samples(source, record, tokens, entries, ("made up",), (1.0,))
    plan = BatchPlan(samples, loader, 0, 1, True)
    epoch = plan.epoch(0)
    batches = [
        [tokens[epoch.row(row)].tolist() for row in rows]
        for rows in epoch.batches.tolist()
        if min(rows) >= 0  # leave out batches with empty rows
    ]
    batches.sort(key=padded)
    return batches[len(batches) // 2], plan.capacity(plan.signatures[0]).get("image", 0)


def padded(rows: list[list[int]]) -> float:
    """Positions per token if the samples of these rows are padded to the longest sample.

    For example, samples of 2, 3 and 4 tokens take 3 * 4 positions for 9 tokens: 12 / 9.
    """
    lengths = [length for row in rows for length in row]
    return len(lengths) * max(lengths) / sum(lengths)


def make_batch(
    vocab_size: int, pool: tuple[int, int | None], patches: int, samples: list[list[int]]
) -> dict[str, np.ndarray]:
    """Make a batch of random tokens; the second half of each sample has targets.

    pool: the number of images that the batch has room for, and the pixels of a side. If there is a
    size, each sample has an image at its beginning. patches: soft tokens of an image.
    samples: lengths of the samples of each row.
    """
    # With seed 0, the second and third expert of a token in `small` are 1e-6 apart, so rounding
    # would decide which of them is chosen.
    random = np.random.default_rng(1)
    shape = (ROWS, ROW_LENGTH)
    position, segment, length = (np.zeros(shape, np.int32) for _ in range(3))
    image, images = np.zeros(shape, np.int32), 0
    for row, lengths in enumerate(samples):
        start = 0
        for number, tokens in enumerate(lengths, 1):
            place = np.s_[row, start : start + tokens]
            position[place], segment[place] = np.arange(tokens), number
            length[place], image[place] = tokens, images
            start, images = start + tokens, images + 1
    batch = {
        "token_id_BT": random.integers(3, vocab_size, shape, dtype=np.int32),
        "target_BT": random.integers(3, vocab_size, shape, dtype=np.int32),
        "weight_BT": ((segment > 0) & (position >= length // 2)).astype(np.float32),
        "segment_BT": segment,
        "position_BT": position,
        "modality_BT": np.where(segment > 0, 0, -1).astype(np.int32),
        "slot_BT": np.full(shape, -1, np.int32),
    }
    room, image_size = pool
    if image_size:
        pixels = np.zeros((1, room, image_size, image_size, 3), np.float32)
        pixels[:, :images] = random.standard_normal(pixels[:, :images].shape, dtype=np.float32)
        batch["image_GIHWC"] = pixels
        # Position 0 is a text token; the soft tokens of the image follow it.
        inside = (segment > 0) & (position >= 1) & (position <= patches)
        batch["slot_BT"] = np.where(inside, image * patches + position - 1, -1).astype(np.int32)
        batch["modality_BT"][inside] = 1
        batch["token_id_BT"][inside] = 0
    return batch


def one_per_row(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Unpack a batch as the originals collate it: one sample per row, padded on the right.

    Rows are as long as the longest sample. Unused room for images is removed. For example, the
    segments [[1, 1, 2], [1, 1, 1]] become the rows [1 1 0], [2 0 0] and [1 1 1].
    """
    rows, segment = [], batch["segment_BT"]
    for row, numbers in enumerate(segment):
        rows += [(row, numbers == number) for number in range(1, numbers.max() + 1)]
    # `rows` holds for every sample its row and a mask of its positions.
    longest = max(int(here.sum()) for _, here in rows)
    padding = {"slot_BT": -1, "modality_BT": -1}
    alone = dict(batch)
    for name in (name for name in batch if name.endswith("_BT")):
        full = np.full((len(rows), longest), padding.get(name, 0), batch[name].dtype)
        for number, (row, here) in enumerate(rows):
            full[number, : here.sum()] = batch[name][row, here]
        alone[name] = full
    if "image_GIHWC" in batch:
        alone["image_GIHWC"] = batch["image_GIHWC"][:, : len(rows)]
    return alone
