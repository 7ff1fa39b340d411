"""preprocessor_config.json of the encoders' folders: what `data.processors` does, or a refusal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from unimoe_jax.convert.reader import ConvertError, read_json
from unimoe_jax.convert.recognise import PROCESSOR_FILE, SourceFolder
from unimoe_jax.data.features.clip import CLIP_MEAN, CLIP_STD
from unimoe_jax.data.features.sound import HOP, WINDOW
from unimoe_jax.data.media.sounds import SAMPLE_RATE

STEPS = ("do_resize", "do_center_crop", "do_rescale", "do_normalize")
BICUBIC = 3  # PIL's number


def check_processor(source: SourceFolder) -> None:
    """A file that asks for other pixels or other frames than this package makes is not passed over.

    Raises:
        ConvertError: a setting has another value than the package's own processor.
    """
    path = source.files.get(PROCESSOR_FILE)
    if path is None or source.role not in ("clip", "whisper"):
        return
    given = read_json(path)
    expected = _of_images(source.config) if source.role == "clip" else _of_sound(source.config)
    for key, value in expected:
        if key in given and not _same(given[key], value):
            raise ConvertError(f"{path}: {key} {given[key]!r} is not supported; it must be {value}")


def _of_images(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    vision = config.get("vision_config") or config
    side = vision.get("image_size", 224)
    yield from (("size", side), ("crop_size", side), ("resample", BICUBIC))
    yield from ((step, True) for step in STEPS)
    yield from (("image_mean", CLIP_MEAN.tolist()), ("image_std", CLIP_STD.tolist()))
    yield "rescale_factor", 1 / 255


def _of_sound(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    yield "feature_size", config.get("num_mel_bins", 80)
    yield from (("sampling_rate", SAMPLE_RATE), ("n_fft", WINDOW), ("hop_length", HOP))


def _same(given: Any, value: Any) -> bool:
    """Whether they mean the same; a size may stand as {"shortest_edge": n} or height and width."""
    if isinstance(given, Mapping):
        return set(given.values()) == {value} and "longest_edge" not in given
    try:
        return bool(np.allclose(given, value, rtol=0, atol=1e-5))
    except (TypeError, ValueError):
        return False
