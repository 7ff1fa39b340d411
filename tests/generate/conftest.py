"""A checkpoint of a tiny model with every encoder, as an import writes it, and media for it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import yaml
from PIL import Image

from tests.golden_dir import golden_dir
from tests.models.tiny import decoder_config, model_config, random_params
from unimoe_jax.checkpoints.checksums import seal
from unimoe_jax.checkpoints.final import save_final
from unimoe_jax.config import ModelConfig
from unimoe_jax.data.tokenizer import Tokenizer
from unimoe_jax.generate.engine.settings import Sampling
from unimoe_jax.generate.loader import LoadOptions, load
from unimoe_jax.generate.model import Model
from unimoe_jax.generate.request import Media, Request, ask
from unimoe_jax.models.declare import full_batch
from unimoe_jax.models.unimoe import UniMoE
from unimoe_jax.nn.linear import LayerOptions

TOKENIZER = "tokenizers/tok_legacy_true"
TRACED = LoadOptions(trace=frozenset({"experts", "logits"}))


def tokenizer_folder() -> Path:
    return next(path.parent for path in golden_dir("preprocessing").rglob("tokenizer.model"))


def write_checkpoint(folder: Path, config: ModelConfig, **manifest: Any) -> Path:
    """A model with random parameters, written as `unimoe_jax.convert import` does."""
    merged = config.model_copy(update={"lora": ()})
    params = random_params(UniMoE(merged, LayerOptions()), full_batch(merged), scale=0.7)
    shapes = {path: list(value.shape) for path, value in params.items()}
    manifest = {"family": "unimoe-speech", "shapes": shapes, "moe_layers": [], **manifest}
    save_final(folder, {path: np.asarray(value) for path, value in params.items()}, manifest)
    content = {"model": config.model_dump(mode="json")}
    (folder / "model.yaml").write_text(yaml.safe_dump(content))
    for file in tokenizer_folder().iterdir():
        shutil.copyfile(file, folder / file.name)
    seal(folder)
    return folder


@pytest.fixture(scope="session")
def config() -> ModelConfig:
    vocabulary = Tokenizer.load(tokenizer_folder()).vocab_size
    return model_config(media=True, decoder=decoder_config(vocab_size=vocabulary))


@pytest.fixture(scope="session")
def checkpoint(config, tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny", config)


@pytest.fixture(scope="session")
def model(checkpoint) -> Model:
    return load(checkpoint, TRACED)


@pytest.fixture(scope="session")
def files(tmp_path_factory) -> dict[str, Path]:
    """Two images, a short and a long sound, a video as a folder of frames."""
    folder, random = tmp_path_factory.mktemp("media"), np.random.default_rng(0)
    found = {}
    for name in ("a", "b"):
        found[name] = folder / f"{name}.png"
        pixels = random.integers(0, 255, (12, 10, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(found[name])
    for name, seconds in (("short", 0.5), ("long", 2.2)):
        found[name] = folder / f"{name}.wav"
        wave = 0.3 * random.standard_normal(int(16000 * seconds))
        soundfile.write(found[name], wave, 16000)
    found["video"] = folder / "video"
    found["video"].mkdir()
    for number in range(3):
        pixels = random.integers(0, 255, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(found["video"] / f"{number}.png")
    return found


@pytest.fixture(scope="session")
def mixed(files) -> list[Request]:
    """Four requests: text, one image, two images, speech and video."""

    def media(kind: str, name: str) -> Media:
        return Media(kind, (str(files[name]),))

    sampling = Sampling(max_new_tokens=9)
    return [
        ask("Where is the fox?", sampling=sampling),
        ask("What is this?", [media("image", "a")], sampling),
        ask("Compare <image> with <image>", [media("image", "a"), media("image", "b")], sampling),
        ask("Describe.", [media("speech", "long"), media("video", "video")], sampling),
    ]
