"""Untrusted files: refused by name, or read with a defined result."""

from __future__ import annotations

import resource
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import soundfile
from PIL import Image

from unimoe_jax.data.features.beats import beats_fbank
from unimoe_jax.data.features.whisper import log_mel
from unimoe_jax.data.media.containers import duration_seconds
from unimoe_jax.data.media.images import ImageLimits, load_image
from unimoe_jax.data.media.sounds import LOUDEST, load_waveform, sound_length
from unimoe_jax.data.media.videos import frame_files, frame_numbers, load_frames
from unimoe_jax.data.tally import BadSample


def refused(load, path, reason):
    with pytest.raises(BadSample) as caught:
        load(str(path))
    assert caught.value.reason == reason, caught.value.message
    assert str(path) in caught.value.message


def write_video(path, frames=30, rate=10, sound=False, size=(32, 32)):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        track = container.add_stream("aac", rate=44100) if sound else None
        for number in range(frames):
            image = np.full((*size[::-1], 3), number * 255 // frames, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image)))
        container.mux(stream.encode(None))
        if track:
            wave = (0.3 * np.sin(np.arange(44100 * 3) / 20)).astype(np.float32)
            for start in range(0, len(wave), 1024):
                block = wave[None, start : start + 1024]
                frame = av.AudioFrame.from_ndarray(block, format="fltp", layout="mono")
                frame.sample_rate, frame.pts = 44100, start
                container.mux(track.encode(frame))
            container.mux(track.encode(None))


def test_refused_images(folder):
    root = folder.root
    folder.image("whole.jpg", (200, 200))
    data = (root / "whole.jpg").read_bytes()
    (root / "cut.jpg").write_bytes(data[: len(data) // 2])
    (root / "page.jpg").write_text("<html>not found</html>")
    (root / "empty.png").write_bytes(b"")
    (root / "script.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    for name in ("cut.jpg", "page.jpg", "empty.png", "script.png"):
        refused(load_image, root / name, "unreadable_image")
    refused(load_image, root / "none.png", "missing_file")
    folder.image("thin.png", (1, 1000))
    refused(load_image, root / "thin.png", "aspect_ratio")
    with pytest.raises(BadSample, match="exceeds 100 pixels"):
        load_image(str(root / "whole.jpg"), ImageLimits(max_pixels=100))


def test_huge_images_are_refused_before_decoding(folder):
    Image.new("1", (20000, 10000)).save(folder.root / "huge.png")
    Image.new("1", (10000, 10000)).save(folder.root / "large.png")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(load_image, folder.root / "huge.png", "image_too_large")
    refused(load_image, folder.root / "large.png", "image_too_large")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kB


def test_unusual_images_have_defined_pixels(folder):
    root = folder.root
    deep = Image.fromarray(np.full((4, 4), 0x8080, np.uint16))
    deep.save(root / "deep.png")
    assert load_image(str(root / "deep.png")).getpixel((0, 0)) == (128, 128, 128)
    folder.image("alpha.png", mode="RGBA", value=200)
    assert load_image(str(root / "alpha.png")).getpixel((0, 0)) == (200, 30, 60)
    Image.new("CMYK", (8, 8), (0, 0, 0, 0)).save(root / "cmyk.jpg")
    assert load_image(str(root / "cmyk.jpg")).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (4, 4))
    palette.putpalette([9, 60, 200])
    palette.save(root / "palette.png", transparency=bytes([7]))  # Pillow would warn each time
    assert load_image(str(root / "palette.png")).getpixel((0, 0)) == (9, 60, 200)
    first, second = (Image.new("P", (4, 4), colour) for colour in (0, 1))
    first.save(root / "moving.gif", save_all=True, append_images=[second])
    assert load_image(str(root / "moving.gif")).size == (4, 4)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by a quarter
    Image.new("RGB", (40, 20)).save(root / "rotated.jpg", exif=exif)
    assert load_image(str(root / "rotated.jpg")).size == (20, 40)
    assert load_image(folder.root / folder.image("dot.png", (1, 1))).size == (1, 1)


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
    assert load_image(path).getpixel((0, 0)) == (0, 0, 0)  # as an image it is its first frame
    assert frame_files((path, path)) == (path, path)  # of several, each is a frame


def test_what_an_animated_png_shows_elsewhere_is_no_frame(tmp_path):
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
    second = data.rindex(b",\0\0\0\0")  # its place, then its size
    for name, end in (("palette.gif", second + 12), ("pixels.gif", len(data) - 4)):
        (tmp_path / name).write_bytes(data[:end])
        refused(frames, tmp_path / name, "unreadable_image")
    (tmp_path / "label.gif").write_bytes(data[:second] + b"!\xf9\x01\0\0;")
    refused(frames, tmp_path / "label.gif", "unreadable_image")
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
        refused(frames, root / name, "unreadable_video")
        refused(load_waveform, root / name, "unreadable_audio")
    refused(load_waveform, root / "whole.mp4", "unreadable_audio")  # no sound track
    (root / "folder").mkdir()
    refused(frames, root / "folder", "unreadable_video")


def test_a_format_that_is_not_listed_is_called_so(folder):
    write_video(folder.root / "v.ts", rate=25)
    for load in (lambda path: load_frames((path,), 4), load_waveform, sound_length):
        with pytest.raises(BadSample, match=r"v\.ts: .*its format is not one of mov, mp4, .*, aac"):
            load(str(folder.root / "v.ts"))


def test_sound_of_many_kinds(folder):
    root = folder.root
    for name, settings in {
        "mono.wav": {},
        "stereo.flac": {"rate": 44100, "channels": 2},
        "low.wav": {"rate": 8000},
        "high.ogg": {"rate": 48000},
        "int16.wav": {"subtype": "PCM_16"},
    }.items():
        wave = load_waveform(str(root / folder.sound(name, 1.25, **settings)))
        assert wave.dtype == np.float32
        assert wave.shape == (20000,)
        assert 0.1 < np.abs(wave).max() < 0.4
        assert sound_length(str(root / name)) == 20000
    stereo = np.stack([np.full(16000, 0.5), np.full(16000, -0.1)], axis=1)
    soundfile.write(root / "two.wav", stereo, 16000, subtype="FLOAT")
    np.testing.assert_allclose(load_waveform(str(root / "two.wav")), 0.2, atol=1e-6)


def test_the_sound_track_of_a_video(folder):
    path = folder.root / "v.mp4"
    write_video(path, sound=True)
    wave = load_waveform(str(path))
    assert abs(len(wave) - 48000) < 2000
    assert 0.2 < np.abs(wave).max() < 0.4
    assert sound_length(str(path)) + 2000 > len(wave)


def test_refused_sound(folder):
    root = folder.root
    (root / "empty.wav").write_bytes(b"")
    (root / "text.mp3").write_text("<html>")
    folder.sound("none.wav", 0)
    folder.sound("blip.wav", 0.001)
    folder.sound("nan.wav", nan=True)
    refused(load_waveform, root / "empty.wav", "unreadable_audio")
    refused(load_waveform, root / "text.mp3", "unreadable_audio")
    refused(load_waveform, root / "gone.wav", "missing_file")
    refused(sound_length, root / "gone.wav", "missing_file")
    for load in (load_waveform, sound_length):
        refused(load, root / "none.wav", "empty_audio")
        refused(load, root / "blip.wav", "empty_audio")
    refused(load_waveform, root / "nan.wav", "nan_audio")
    for value in (3e38, 1e15):  # finite, but not its power or the sum of two channels
        wave = np.full((16000, 2), value, np.float32)
        soundfile.write(root / "loud.wav", wave, 16000, subtype="FLOAT")
        refused(load_waveform, root / "loud.wav", "loud_audio")


def test_the_loudest_sound_has_finite_features(folder):
    """At the bound, in its hardest form for every filter: white noise."""
    wave = np.random.default_rng(0).choice([-LOUDEST, LOUDEST], 44100).astype(np.float32)
    soundfile.write(folder.root / "loud.wav", wave, 44100, subtype="FLOAT")
    wave = load_waveform(str(folder.root / "loud.wav"))
    for features in (beats_fbank(wave, 32000, 16), log_mel(wave, 8, 200)):
        assert np.isfinite(features).all()


def test_video_of_an_unknown_codec(tmp_path):
    file = tmp_path / "damaged.avi"
    write_video(file)
    file.write_bytes(file.read_bytes().replace(b"FMP4", b"zq7x"))
    refused(lambda path: load_frames((path,), 2), file, "unreadable_video")


def test_video_that_names_only_its_frames():
    """Neither a duration nor an average rate: the guessed rate says how long it is."""
    container = SimpleNamespace(duration=None)
    stream = SimpleNamespace(duration=None, frames=50, average_rate=None)
    assert duration_seconds(container, stream, Fraction(25)) == 2


def test_sound_with_a_damaged_header(tmp_path, monkeypatch):
    """An unknown codec, or more samples promised than memory holds: a bad sample like any other."""
    file = tmp_path / "damaged.wav"
    soundfile.write(file, np.full(2000, 0.1), 16000)
    whole = file.read_bytes()
    file.write_bytes(whole[:20] + b"\x34\x12" + whole[22:])
    refused(load_waveform, file, "unreadable_audio")
    file.write_bytes(whole)
    for error in (MemoryError("3.87 TiB"), ValueError("array is too big")):

        def read(*_, error=error, **__):
            raise error

        monkeypatch.setattr("unimoe_jax.data.media.sounds.soundfile.read", read)
        assert len(load_waveform(str(file))) == 2000  # read to its end instead
