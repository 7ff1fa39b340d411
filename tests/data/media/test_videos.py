"""Untrusted videos and animations: refused with a named reason, or read with defined frames."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from tests.data.media.helpers import assert_refused, write_video
from unimoe_jax.data.media.containers import duration_seconds
from unimoe_jax.data.media.images import ImageLimits, load_image
from unimoe_jax.data.media.sounds import load_waveform, sound_length
from unimoe_jax.data.media.videos import frame_files, frame_numbers, load_frames
from unimoe_jax.data.tally import BadSample


def test_frames_of_a_video(folder):
    path = folder.root / "v.mp4"
    write_video(path, frames=33, rate=10)
    assert frame_numbers(33, 4) == [0, 8, 16, 24]
    levels = [np.asarray(frame).mean() for frame in load_frames((str(path),), 4)]
    np.testing.assert_allclose(levels, [n * 255 // 33 for n in (0, 8, 16, 24)], atol=4)
    folder.image("still.png")
    (folder.root / "frames").mkdir()
    for number in range(8):
        folder.image(f"frames/f{number}.png", value=10 * number)
    frames = load_frames((str(folder.root / "frames"),), 4)
    assert [frame.getpixel((0, 0))[0] for frame in frames] == [0, 20, 40, 60]
    few = [str(folder.root / "frames" / f"f{n}.png") for n in (1, 2)]
    assert [f.getpixel((0, 0))[0] for f in load_frames(tuple(few), 4)] == [10, 10, 20, 20]


def write_animation(path, levels, **settings):
    first, *others = (Image.new("RGB", (8, 8), (level,) * 3) for level in levels)
    first.save(path, save_all=True, append_images=others, **settings)
    return str(path)


def levels_of(path, count=4):
    return [frame.getpixel((0, 0))[0] for frame in load_frames((path,), count)]


@pytest.mark.parametrize(
    ("suffix", "settings"),
    [("gif", {}), ("GIF", {"disposal": 2}), ("webp", {"lossless": True}), ("png", {})],
)
def test_an_animated_image_is_a_video(tmp_path, suffix, settings):
    path = write_animation(tmp_path / f"moving.{suffix}", range(0, 110, 10), **settings)
    assert frame_files((path,)) == ()
    assert levels_of(path) == [0, 20, 40, 60]
    assert levels_of(path, 22) == [10 * (n // 2) for n in range(22)]
    assert load_image(path).getpixel((0, 0)) == (0, 0, 0)  # an image is the first frame
    assert frame_files((path, path)) == (path, path)  # several files are one frame each


def test_the_picture_of_an_animated_png_for_other_programs_is_no_frame(tmp_path):
    path = tmp_path / "moving.apng"
    write_animation(path, [250, 10, 20], format="PNG", default_image=True)
    assert levels_of(str(path)) == [10, 10, 20, 20]


def test_stills_and_pages_are_frames(tmp_path):
    for name, levels in (("still.gif", [7]), ("still.webp", [7]), ("pages.tiff", [7, 90])):
        path = write_animation(tmp_path / name, levels)
        assert frame_files((path,)) == (path,)
        assert levels_of(path) == [7] * 4


def test_refused_animations(tmp_path):
    def frames(path):
        return load_frames((path,), 2)

    whole = tmp_path / "whole.gif"
    data = bytearray(Path(write_animation(whole, [10, 20])).read_bytes())
    second = data.rindex(b",\0\0\0\0")  # the second frame: its position, then its size
    for name, end in (("palette.gif", second + 12), ("pixels.gif", len(data) - 4)):
        (tmp_path / name).write_bytes(data[:end])
        assert_refused(frames, tmp_path / name, "unreadable_image")
    (tmp_path / "label.gif").write_bytes(data[:second] + b"!\xf9\x01\0\0;")
    assert_refused(frames, tmp_path / "label.gif", "unreadable_image")
    data[second + 5 : second + 9] = b"\x64\0\x64\0"
    (tmp_path / "grows.gif").write_bytes(data)
    limits = ImageLimits(max_pixels=100)
    assert len(load_frames((str(whole),), 2, limits)) == 2
    with pytest.raises(BadSample, match=r"grows.gif: 100x100 exceeds 100 pixels"):
        load_frames((str(tmp_path / "grows.gif"),), 2, limits)


def test_frames_far_apart_are_found_by_seeking(folder):
    path = folder.root / "long.mp4"
    write_video(path, frames=200, rate=10)
    levels = [np.asarray(frame).mean() for frame in load_frames((str(path),), 4)]
    np.testing.assert_allclose(levels, [n * 255 // 200 for n in (0, 50, 100, 150)], atol=4)


def test_refused_videos(folder):
    def frames(path):
        return load_frames((path,), 4)

    root = folder.root
    write_video(root / "whole.mp4")
    data = (root / "whole.mp4").read_bytes()
    (root / "cut.mp4").write_bytes(data[: len(data) // 3])
    (root / "list.mp4").write_text(f"ffconcat version 1.0\nfile {root / 'whole.mp4'}\n")
    (root / "play.mp4").write_text(f"#EXTM3U\n#EXTINF:1,\n{root / 'whole.mp4'}\n")
    (root / "empty.mp4").write_bytes(b"")
    for name in ("cut.mp4", "list.mp4", "play.mp4", "empty.mp4"):
        assert_refused(frames, root / name, "unreadable_video")
        assert_refused(load_waveform, root / name, "unreadable_audio")
    assert_refused(load_waveform, root / "whole.mp4", "unreadable_audio")  # no sound track
    (root / "folder").mkdir()
    assert_refused(frames, root / "folder", "unreadable_video")


def test_a_format_that_is_not_listed_is_named_as_the_reason(folder):
    write_video(folder.root / "v.ts", rate=25)
    for load in (lambda path: load_frames((path,), 4), load_waveform, sound_length):
        with pytest.raises(BadSample, match=r"v\.ts: .*its format is not one of mov, mp4, .*, aac"):
            load(str(folder.root / "v.ts"))


def test_video_of_an_unknown_codec(tmp_path):
    file = tmp_path / "damaged.avi"
    write_video(file)
    file.write_bytes(file.read_bytes().replace(b"FMP4", b"zq7x"))
    assert_refused(lambda path: load_frames((path,), 2), file, "unreadable_video")


def test_the_duration_of_a_video_that_only_names_its_number_of_frames():
    """Without a duration and an average rate, the length follows from the guessed rate."""
    container = SimpleNamespace(duration=None)
    stream = SimpleNamespace(duration=None, frames=50, average_rate=None)
    assert duration_seconds(container, stream, Fraction(25)) == 2
