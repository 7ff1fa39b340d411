"""Videos that are given as frames, and files whose soft tokens are remembered."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unimoe_jax.data.records import MediaFile
from unimoe_jax.generate.errors import GenerationError


@pytest.fixture(scope="module")
def frames(tmp_path_factory) -> list[Path]:
    folder, random = tmp_path_factory.mktemp("frames"), np.random.default_rng(1)
    paths = [folder / f"{number}.png" for number in range(5)]
    for path in paths:
        Image.fromarray(random.integers(0, 255, (9, 12, 3), dtype=np.uint8)).save(path)
    return paths


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_a_video_is_the_mean_of_all_its_frames(model, frames, tmp_path, count: int):
    """The video program of this model takes two frames; other numbers are encoded as images."""
    paths = frames[:count]
    for path in paths:
        (tmp_path / path.name).symlink_to(path)
    images = model.media.encode([MediaFile("image", (str(path),)) for path in paths])
    expected = np.mean(images, axis=0)
    for given in ((str(tmp_path),), tuple(map(str, paths))):
        (soft,) = model.media.encode([MediaFile("video", given)])
        np.testing.assert_allclose(soft, expected, rtol=1e-5, atol=1e-5)


def test_any_number_of_frames_uses_the_same_program(model, frames):
    videos = [MediaFile("video", tuple(map(str, frames[:count]))) for count in (3, 4, 5)]
    model.media.warm_up(videos[:1])
    compiled = list(model.media.program_cache.compiled)
    model.media.warm_up(videos)
    model.media.encode(videos)
    assert list(model.media.program_cache.compiled) == compiled


def test_a_broken_frame_is_named(model, frames, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    with pytest.raises(GenerationError, match=r"broken\.png"):
        model.media.encode([MediaFile("video", (str(frames[0]), str(broken), str(frames[1])))])


def test_a_frame_that_was_overwritten_is_encoded_again(model, frames, tmp_path):
    """Cameras overwrite a frame in its place, which does not change the folder."""
    place = tmp_path / "frame.png"
    place.write_bytes(frames[0].read_bytes())
    video = [MediaFile("video", (str(tmp_path),))]
    (before,) = model.media.encode(video)
    place.write_bytes(frames[1].read_bytes())
    (after,) = model.media.encode(video)
    (expected,) = model.media.encode([MediaFile("image", (str(frames[1]),))])
    np.testing.assert_allclose(after, expected, rtol=1e-5, atol=1e-5)
    assert not np.array_equal(before, after)


def test_an_animated_image_is_a_video_file(model, frames, tmp_path):
    """As many frames are taken as in training. An overwritten file is encoded again."""
    place = tmp_path / "moving.png"
    for order in (frames, frames[::-1]):
        first, *others = map(Image.open, order)
        first.save(place, save_all=True, append_images=others)
        (soft,) = model.media.encode([MediaFile("video", (str(place),))])
        chosen = (str(order[0]), str(order[2]))
        (expected,) = model.media.encode([MediaFile("video", chosen)])
        np.testing.assert_allclose(soft, expected, rtol=1e-5, atol=1e-5)


def test_another_thread_may_empty_the_memory(model, frames, monkeypatch):
    """All threads that use a model share its remembered files, and each drops the oldest."""
    images = [MediaFile("image", (str(path),)) for path in frames[:2]]
    expected = model.media.encode(images)
    encode = model.media._encode

    def encode_while_another_thread_clears(file: MediaFile) -> np.ndarray:
        model.media._remembered.clear()
        return encode(file)

    model.media._remembered.clear()
    monkeypatch.setattr(model.media, "_encode", encode_while_another_thread_clears)
    for soft, wanted in zip(model.media.encode(images), expected, strict=True):
        np.testing.assert_array_equal(soft, wanted)
