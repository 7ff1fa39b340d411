"""Refuse a preprocessor_config.json that asks for other features than `data.features` computes."""

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
BICUBIC = 3  # PIL's number for bicubic resampling


def check_processor(source: SourceFolder) -> None:
    """Check the processor file of a CLIP or Whisper folder, if there is one.

    Without this check an encoder that was trained on other pixels or other frames would silently
    see the features of this package.

    Raises:
        ConvertError: a setting differs from the constant that this package uses.
    """
    path = source.files.get(PROCESSOR_FILE)
    if path is None or source.role not in ("clip", "whisper"):
        return
    settings = read_json(path)
    supported = _image_settings if source.role == "clip" else _sound_settings
    for key, value in supported(source.config):
        if key in settings and not _same(settings[key], value):
            raise ConvertError(
                f"{path}: {key} {settings[key]!r} is not supported; it must be {value}"
            )


def _image_settings(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """(key, supported value) of CLIP's image processor."""
    # CLIPModel nests the encoder's settings, CLIPVisionModel does not.
    vision = config.get("vision_config") or config
    side = vision.get("image_size", 224)
    yield from (("size", side), ("crop_size", side), ("resample", BICUBIC))
    yield from ((step, True) for step in STEPS)
    yield from (("image_mean", CLIP_MEAN.tolist()), ("image_std", CLIP_STD.tolist()))
    yield "rescale_factor", 1 / 255


def _sound_settings(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """(key, supported value) of Whisper's feature extractor."""
    yield "feature_size", config.get("num_mel_bins", 80)
    yield from (("sampling_rate", SAMPLE_RATE), ("n_fft", WINDOW), ("hop_length", HOP))


def _same(setting: Any, value: Any) -> bool:
    """Whether both mean the same number or list of numbers.

    A size may be written as {"shortest_edge": n} or as {"height": n, "width": n}.
    """
    if isinstance(setting, Mapping):
        # {"longest_edge": n} is another resize: the longer side becomes n.
        return set(setting.values()) == {value} and "longest_edge" not in setting
    try:
        # Files hold rounded numbers, for example 0.00392156862745098 for 1 / 255.
        return bool(np.allclose(setting, value, rtol=0, atol=1e-5))
    except (TypeError, ValueError):
        return False
