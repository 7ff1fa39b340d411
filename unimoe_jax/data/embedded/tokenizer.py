"""A small SentencePiece model of the language of the data set.

Settings follow the LLaMA tokenizer. The model is trained on all wording of the data set, not on a
sample of records, so it is the same for every seed and size, and a checkpoint fits all of them.
"""

import io
import json
from collections.abc import Iterator
from pathlib import Path

import sentencepiece

from unimoe_jax.data.embedded.phrases import ANSWERS, QUESTIONS, answer, answer_words
from unimoe_jax.data.embedded.tasks import text_turns

VOCAB = 512
# Every conversation contains the Vicuna v1 system text, so its words must be in the vocabulary.
TEMPLATE = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)
ANSWER_WEIGHT = 400  # repetitions that make each answer word one piece

CONFIG = {
    "tokenizer_class": "LlamaTokenizer",
    "add_bos_token": True,
    "add_eos_token": False,
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "pad_token": None,
    "clean_up_tokenization_spaces": False,
    "legacy": True,
    "model_max_length": 2048,
    "sp_model_kwargs": {},
}


def corpus() -> Iterator[str]:
    """The sentences that the model is trained on.

    Frequent words become single pieces, so short texts are repeated often.
    """
    for _ in range(200):
        yield TEMPLATE
        yield "USER: ASSISTANT:"
    for by_answer in text_turns().values():
        for turns in by_answer.values():
            yield from (question for question, _ in turns)
    for questions in QUESTIONS.values():
        for question in questions:
            yield from [question] * 50
    # One answer of each kind shows how answers are built; the answer words follow below.
    labels = {kind: values[0] for kind, values in ANSWERS.items()} | {"times": "1"}
    for kind in QUESTIONS:
        yield from [answer(kind, labels)] * 50
    for word in answer_words():
        yield from [word] * ANSWER_WEIGHT


def train() -> bytes:
    """Train the model and return the content of its file.

    Raises RuntimeError if an answer word is not a single piece.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=corpus(),
        model_writer=model,
        # As the LLaMA tokenizer: every character can be encoded, and white space is kept.
        model_type="bpe",
        vocab_size=VOCAB,
        character_coverage=1.0,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        # The ids of LLaMA's control tokens; there is no padding token.
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    _check(model.getvalue())
    return model.getvalue()


def _check(model: bytes) -> None:
    """Raise RuntimeError unless every answer word is a single piece."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    split = [word for word in answer_words() if len(processor.encode(word)) != 1]
    if split:
        raise RuntimeError(f"answer words that are not single pieces: {', '.join(split)}")


def write(folder: Path) -> None:
    """Write `tokenizer.model` and `tokenizer_config.json` into a folder."""
    (folder / "tokenizer.model").write_bytes(train())
    (folder / "tokenizer_config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
