"""The embedded data set: deterministic, disjoint, valid, decodable and learnable."""

import ast
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import sentencepiece
import soundfile
from PIL import Image

from unimoe_jax.data import embedded
from unimoe_jax.data.embedded import dataset, images, media, phrases, tasks, tokenizer

COUNTS = embedded.Counts(image=96, sound=72, vowel=80, word=16, video=36, text=60, heldout=36)
TINY = embedded.Counts(image=4, sound=2, vowel=4, word=4, video=1, text=10, heldout=4)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    return embedded.build(tmp_path_factory.mktemp("data"), seed=3, counts=COUNTS)


def files_of(folder: Path) -> list[Path]:
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def rows_of(folder: Path, name: str) -> list[dict]:
    return json.loads((folder / f"{name}.json").read_text())


def frames_of(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def soundtrack_of(path: Path) -> tuple[np.ndarray, int]:
    with av.open(str(path)) as container:
        rate = container.streams.audio[0].rate
        return np.concatenate([f.to_ndarray()[0] for f in container.decode(audio=0)]), rate


# ------------------------------------------------------------------------------------ building


def test_same_seed_same_files(built, tmp_path):
    again = embedded.build(tmp_path, seed=3, counts=COUNTS)
    assert files_of(again) == files_of(built)
    for path in files_of(built):
        assert digest(again / path) == digest(built / path), path


def test_other_seed_other_media_same_tokenizer(built, tmp_path):
    other = embedded.build(tmp_path, seed=4, counts=TINY)
    name = "media/image/train-00000.png"
    assert digest(other / name) != digest(built / name)
    assert digest(other / "tokenizer.model") == digest(built / "tokenizer.model")


def test_complete_folder_is_reused(built, monkeypatch):
    monkeypatch.setattr(dataset, "_write", lambda *args: pytest.fail("built again"))
    assert embedded.build(built.parent, seed=3, counts=COUNTS) == built


@pytest.mark.parametrize("broken", ["media.write", "tokenizer.write", "_manifest"])
def test_interrupted_build_leaves_nothing(broken, tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"unimoe_jax.data.embedded.dataset.{broken}", interrupt)
    with pytest.raises(KeyboardInterrupt):
        embedded.build(tmp_path, counts=TINY)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    assert (embedded.build(tmp_path, counts=TINY) / "manifest.json").is_file()


def test_folder_without_manifest_is_refused(tmp_path):
    (tmp_path / f"embedded-{embedded.VERSION}-0-1").mkdir()
    with pytest.raises(FileExistsError, match="remove it"):
        embedded.build(tmp_path)


def test_the_slower_of_two_processes_uses_the_result_of_the_faster(tmp_path, monkeypatch):
    original = dataset._publish

    def after_the_other(partial: Path, final: Path) -> None:
        final.mkdir()
        (final / "manifest.json").write_text("{}")
        original(partial, final)

    monkeypatch.setattr(dataset, "_publish", after_the_other)
    final = embedded.build(tmp_path, counts=TINY)
    assert list(tmp_path.iterdir()) == [final]
    assert (final / "manifest.json").read_text() == "{}"


def test_two_processes_at_once(tmp_path):
    script = (
        "from unimoe_jax.data import embedded\n"
        f"print(embedded.build({str(tmp_path)!r}, counts=embedded.{TINY!r}))"
    )
    command = [sys.executable, "-c", script]
    options = {"stdout": subprocess.PIPE, "text": True, "cwd": Path(embedded.__file__).parents[3]}
    running = [subprocess.Popen(command, **options) for _ in range(2)]
    printed = {process.communicate(timeout=60)[0].strip() for process in running}
    assert all(process.returncode == 0 for process in running)
    assert [str(path) for path in tmp_path.iterdir()] == list(printed)


def test_resolve(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "Counts", lambda: TINY)
    path = Path(embedded.resolve("embedded:train/image", tmp_path, seed=1, size=2))
    assert path == tmp_path / f"embedded-{embedded.VERSION}-1-2" / "train" / "image.json"
    assert len(list(path.parents[1].glob("media/image/train-*.png"))) == 2 * TINY.image
    assert len(list(path.parents[1].glob("media/image/heldout-*.png"))) == TINY.heldout
    assert Path(embedded.tokenizer_path(tmp_path, seed=1, size=2)).parent == path.parents[1]
    assert embedded.resolve("/data/x.json", tmp_path) == "/data/x.json"
    with pytest.raises(ValueError, match=r"train/sounds.*known:.*train/sound"):
        embedded.resolve("embedded:train/sounds", tmp_path)


def test_imports_neither_jax_nor_torch():
    allowed = {"av", "numpy", "PIL", "sentencepiece", "soundfile", "unimoe_jax"}
    for path in Path(embedded.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = []
            if isinstance(node, ast.Import):
                modules = [name.name for name in node.names]
            if isinstance(node, ast.ImportFrom):
                modules = [node.module]
            for module in modules:
                root = module.split(".")[0]
                assert root in allowed | sys.stdlib_module_names, (path, module)
                assert root != "unimoe_jax" or module.startswith("unimoe_jax.data.embedded")


# ------------------------------------------------------------------------------------- records


@pytest.mark.parametrize("name", [f"{s}/{n}" for s in media.SPLITS for n in embedded.SOURCES])
def test_schema(name, built):
    rows = rows_of(built, name)
    assert len({row["id"] for row in rows}) == len(rows)
    for row in rows:
        assert set(row) <= {"id", "image", "voice", "video", "conversations"}
        turns = row["conversations"]
        assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
        assert all(set(turn) == {"from", "value"} and turn["value"] for turn in turns)
        asked = "".join(turn["value"] for turn in turns if turn["from"] == "human")
        assert asked.count("<image>") == ("image" in row)
        assert asked.count("<video>") == ("video" in row)
        assert asked.count("<audio>") == len(row.get("voice", []))
        paths = [row.get("image"), row.get("video"), *row.get("voice", [])]
        for path in filter(None, paths):
            assert (built / path).is_file()
            assert name.split("/")[0] in Path(path).name


def test_placeholders_and_turns(built):
    def asked(name):
        return [row["conversations"][0]["value"] for row in rows_of(built, f"train/{name}")]

    assert set(asked("image_speech")) == {"<image>\n<audio>"}
    assert all(text.startswith("<audio>\n<video>\n") for text in asked("video_sound"))
    lengths = {len(row["conversations"]) for row in rows_of(built, "train/image")}
    assert lengths == {2, 4}
    assert all(len(row["conversations"]) == 2 for row in rows_of(built, "heldout/image"))


def test_spoken_question_matches_the_answer(built):
    plan = media.plan(COUNTS, 3, 1)["train"]
    labels = {item.path: item.labels for item in plan["image"] + plan["word"]}
    for row in rows_of(built, "train/image_speech"):
        word = labels[row["voice"][0]]["word"]
        assert row["conversations"][1]["value"] == labels[row["image"]][word]


def test_splits_share_no_media_and_no_text(built):
    hashes = [digest(path) for path in built.glob("media/*/*")]
    assert len(hashes) > 400 and len(set(hashes)) == len(hashes)
    prompts = [
        {row["conversations"][0]["value"] for row in rows_of(built, f"{split}/text")}
        for split in media.SPLITS
    ]
    assert prompts[0] and prompts[1] and not prompts[0] & prompts[1]


def test_all_files_have_different_seeds():
    plan = media.plan(embedded.Counts(), 0, 1)
    keys = [item.key for kinds in plan.values() for items in kinds.values() for item in items]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("counts", [embedded.Counts(), COUNTS], ids=["full", "small"])
def test_constant_answers_score_low(seed, counts):
    records = tasks.records(media.plan(counts, seed, 1), counts, seed, 1)
    for name in embedded.SOURCES:
        heldout = records[f"heldout/{name}"]
        assert len(heldout) == counts.heldout
        assert tasks.chance(heldout) <= 0.35, name


def test_manifest(built):
    manifest = json.loads((built / "manifest.json").read_text())
    assert (manifest["version"], manifest["seed"], manifest["size"]) == (embedded.VERSION, 3, 1)
    assert manifest["tokenizer_sha256"] == digest(built / "tokenizer.model")
    for name, count in manifest["records"].items():
        assert len(rows_of(built, name)) == count
    assert set(manifest["chance"]) == {f"heldout/{name}" for name in embedded.SOURCES}


def test_tokenizer(built):
    model = sentencepiece.SentencePieceProcessor(model_file=str(built / "tokenizer.model"))
    assert (model.unk_id(), model.bos_id(), model.eos_id(), model.pad_id()) == (0, 1, 2, -1)
    assert model.vocab_size() == tokenizer.VOCAB <= 512
    for word in phrases.answer_words():
        assert model.encode(word, out_type=str) == [f"▁{word}"]
    for text in ("Grüße,  two spaces\nand a line 漢", "What colour is it?"):
        assert model.decode(model.encode(text)) == text
        assert model.unk_id() not in model.encode(text)


# --------------------------------------------------------------------------------------- media


def test_media_decode(built):
    for path in files_of(built):
        if path.suffix == ".png":
            with Image.open(built / path) as image:
                assert (image.mode, image.size) == ("RGB", (images.SIZE, images.SIZE))
        if path.suffix == ".wav":
            signal, rate = soundfile.read(built / path)
            assert rate == 16_000 and signal.ndim == 1
            assert 0.3 * rate < len(signal) <= 2 * rate
            assert 0.3 < abs(signal).max() < 1
    for path in sorted((built / "media/video").iterdir())[:12]:
        assert frames_of(path).shape == (16, 48, 48, 3)
        signal, rate = soundtrack_of(path)
        assert rate == 16_000 and rate < len(signal) <= 2 * rate
        assert 0.2 < abs(signal).max() < 1.2


def accuracy(built: Path, kind: str, label: str, feature) -> float:
    """Held-out accuracy of the nearest class centroid over standardised features."""
    plan = media.plan(COUNTS, 3, 1)
    xs, ys = {}, {}
    for split in media.SPLITS:
        xs[split] = np.stack([feature(built / item.path) for item in plan[split][kind]])
        ys[split] = np.array([item.labels[label] for item in plan[split][kind]])
    mean, std = xs["train"].mean(0), xs["train"].std(0) + 1e-6
    x = {split: (value - mean) / std for split, value in xs.items()}
    names = sorted(set(ys["train"]))
    centroids = np.stack([x["train"][ys["train"] == name].mean(0) for name in names])
    nearest = ((x["heldout"][:, None] - centroids) ** 2).sum(-1).argmin(1)
    return float(np.mean(np.array(names)[nearest] == ys["heldout"]))


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path), float)


def mean_colour(picture: np.ndarray) -> np.ndarray:
    """Mean colour where the shape is."""
    return picture[picture.max(-1) > 0.7 * picture.max()].mean(0)


def outline(path: Path) -> np.ndarray:
    """Filled share of the bounding box, height of the centre of mass, filled share of corners."""
    mask = pixels(path).max(-1) > 110
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    height, width = box.shape
    corner = box[: height // 4, : width // 4].mean() + box[-(height // 4) :, -(width // 4) :].mean()
    return np.array([box.mean(), np.argwhere(box)[:, 0].mean() / height, corner])


def log_spectrum(signal: np.ndarray) -> np.ndarray:
    """Spectrum averaged over time in 32 bands of equal ratio, as logarithms, level removed."""
    frames = np.lib.stride_tricks.sliding_window_view(signal, 512)[::256] * np.hanning(512)
    power = (np.abs(np.fft.rfft(frames)) ** 2).mean(0)
    edges = np.unique(np.geomspace(2, 257, 33).astype(int))
    bands = np.log(np.add.reduceat(power, edges[:-1]) / np.diff(edges) + 1e-4)
    return bands - bands.mean()


def heard(path: Path) -> np.ndarray:
    return log_spectrum(soundfile.read(path)[0])


def flicker(path: Path) -> np.ndarray:
    """Mean brightness of the brightest pixels of the mean over all frames, divided by that of the
    maximum over all frames."""
    frames = frames_of(path)[::2].max(-1).astype(float)
    bright = np.sort(frames.max(0).ravel())[-200:].mean()
    return np.array([np.sort(frames.mean(0).ravel())[-200:].mean() / bright])


@pytest.mark.parametrize(
    ("kind", "label", "feature", "least"),
    [
        ("image", "colour", lambda path: mean_colour(pixels(path)), 0.9),
        ("image", "shape", outline, 0.8),
        ("sound", "sound", heard, 0.8),
        ("vowel", "vowel", heard, 0.7),
        ("word", "word", heard, 0.9),
        ("video", "colour", lambda path: mean_colour(frames_of(path)[::2].mean(0)), 0.6),
        ("video", "light", flicker, 0.9),
        ("video", "sound", lambda path: log_spectrum(soundtrack_of(path)[0]), 0.8),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_classes_are_separable(kind, label, feature, least, built):
    assert accuracy(built, kind, label, feature) >= least
