"""SentencePiece as the slow LLaMA tokenizer of transformers 4.31 to 4.37 applies it.

Fast tokenizers of later transformers differ (they drop a leading space), so ids come from raw
SentencePiece. Text never yields control ids: `</s>` in a user's text is four ordinary characters.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path

from sentencepiece import SentencePieceProcessor

SPACE = "\u2581"
"""The character that stands for a space in SentencePiece pieces."""


class Tokenizer:
    """Text <-> ids. Picklable.

    model: a serialised SentencePiece model; legacy: False gives text that continues after a control
    token no extra leading space. Raises ValueError if the model lacks bos, eos or unk.
    """

    def __init__(self, model: bytes, legacy: bool = True):
        self.legacy = legacy
        self._model = model
        self._pieces = SentencePieceProcessor(model_proto=model)
        self.vocab_size = self._pieces.vocab_size()
        self.bos_id = self._pieces.bos_id()
        self.eos_id = self._pieces.eos_id()
        self.unk_id = self._pieces.unk_id()
        self.pad_id = self.unk_id
        # SentencePiece gives an id that the model lacks as -1.
        if min(self.bos_id, self.eos_id, self.unk_id) < 0:
            raise ValueError("the SentencePiece model lacks bos, eos or unk")
        # Most models add a space in front of every text that they encode.
        self._adds_space = self._pieces.encode("a", out_type=str)[0].startswith(SPACE)
        self._control = {
            self._pieces.id_to_piece(index): index
            for index in (self.unk_id, self.bos_id, self.eos_id)
        }

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Load a `.model` file, or `tokenizer.model` in a folder.

        `legacy` comes from the `tokenizer_config.json` beside it, if there is one. Raises
        FileNotFoundError if there is no model.
        """
        path = Path(path)
        model = path / "tokenizer.model" if path.is_dir() else path
        if not model.is_file():
            raise FileNotFoundError(f"no SentencePiece model at {model}")
        config_file = model.with_name("tokenizer_config.json")
        config = json.loads(config_file.read_text()) if config_file.is_file() else {}
        return cls(model.read_bytes(), bool(config.get("legacy", True)))

    def __reduce__(self):
        # SentencePiece's object is built again from the bytes of the model.
        return Tokenizer, (self._model, self.legacy)

    @property
    def fingerprint(self) -> str:
        """A digest that changes whenever ids could change."""
        return hashlib.sha256(self._model).hexdigest() + f"/legacy={self.legacy}"

    def encode(self, text: str, start: bool = True, control: bool = False) -> list[int]:
        """Return the ids of `text`, without bos and eos.

        start: the text opens a chunk; False if it continues after a control token such as eos.
        control: turn literal `<s>`, `</s>`, `<unk>` into their ids, as transformers does. Use it
        only for comparisons with transformers, never for text of users.
        """
        if not control:
            return self._encode_plain(text, start)
        ids: list[int] = []
        names = "|".join(re.escape(name) for name in self._control)
        # The group in the pattern makes `split` return the control tokens too.
        for part in re.split(f"({names})", text):
            if part in self._control:
                ids.append(self._control[part])
                start = False
            elif part:
                ids += self._encode_plain(part, start)
        return ids

    def encode_after_text(self, text: str) -> list[int]:
        """Return the ids of `text`, which must begin with a space, where it continues other text.

        SentencePiece merges never cross from a word into the next space, so these are the ids that
        tokenising the whole text would give at this place.
        """
        if not text.startswith(" "):
            raise ValueError(f"only text that begins with a space can continue text: {text!r:.40}")
        # The model adds the space that is removed here.
        return self._pieces.encode(text[1:] if self._adds_space else text)

    def _encode_plain(self, text: str, start: bool) -> list[int]:
        """Ids of `text`, in which control tokens are ordinary characters."""
        if self.legacy or not text:
            return self._pieces.encode(text)
        text = text.replace(SPACE, " ")
        if start or text.startswith(" ") or not self._adds_space:
            return self._pieces.encode(text)
        # Remove the space that the model has added; it may have been a piece by itself.
        first, *rest = self._pieces.encode(text, out_type=str)
        pieces = [first.removeprefix(SPACE), *rest]
        return [self._pieces.piece_to_id(piece) for piece in pieces if piece]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`; unk, bos, eos and ids outside the vocabulary are left out, as
        transformers leaves out special tokens."""
        skip = {self.unk_id, self.bos_id, self.eos_id}
        keep = [int(i) for i in ids if 0 <= i < self.vocab_size and int(i) not in skip]
        return self._pieces.decode(keep)
