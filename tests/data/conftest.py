"""A tiny tokenizer, a tiny model config, a folder for media, a small data set, and its loader."""

from __future__ import annotations

import io

import pytest
import sentencepiece

from tests.data.helpers import LOADER, Folder, data_config, model_config, talk
from unimoe_jax.config import DataConfig, ModelConfig
from unimoe_jax.data.pipeline import Pipeline
from unimoe_jax.data.tokenizer import Tokenizer

WORDS = "A chat between curious user and assistant gives helpful polite answers what is this sound"


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    model = io.BytesIO()
    text = [f"{WORDS} USER: ASSISTANT: {number} red door bird" for number in range(50)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text),
        model_writer=model,
        vocab_size=340,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return Tokenizer(model.getvalue())


@pytest.fixture
def model() -> ModelConfig:
    return model_config()


@pytest.fixture
def folder(tmp_path) -> Folder:
    root = tmp_path / "data"
    root.mkdir()
    return Folder(root)


@pytest.fixture
def mixed(folder):
    """40 records with every combination of media that occurs in practice."""
    for number in range(4):
        folder.image(f"i{number}.png", value=40 * number)
    folder.sound("long.wav", 5.5)
    folder.sound("short.flac", 0.7, rate=44100, channels=2)
    frames = ["i0.png", "i1.png", "i2.png"]
    records = []
    for number in range(10):
        answer = f"a red bird {number} " * (1 + number % 3)
        records += [
            talk(f"what is this {number}", answer),
            talk("<image>\nwhat", answer, image=f"i{number % 4}.png"),
            talk("<video> and <audio>", answer, video=frames, voice=["short.flac"]),
            talk("<audio> or <audio>", answer, voice=["long.wav", "short.flac"]),
        ]
        if number % 2:
            records[-1]["voice_modality"] = "audio"
    return folder.write("mixed.json", records)


@pytest.fixture
def build(tokenizer, model):
    def build(path, loader=LOADER, shards=2, seed=3, model=model, mixture=None, **settings):
        data = path if isinstance(path, DataConfig) else data_config(path, voice="speech")
        mixture = mixture or {"all": 1.0}
        return Pipeline(data, model, mixture, tokenizer, loader, seed, shards, **settings)

    return build
