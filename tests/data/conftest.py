"""A tiny tokenizer, a tiny model config and a folder for media."""

from __future__ import annotations

import io

import pytest
import sentencepiece

from tests.data.helpers import Folder, model_config
from unimoe_jax.config import ModelConfig
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
