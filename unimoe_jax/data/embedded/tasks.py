"""Records in the LLaVA/Uni-MoE schema: which questions are asked about which media."""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from unimoe_jax.data.embedded.media import DRAWS, SPLITS, Counts, DatasetPlan, Item
from unimoe_jax.data.embedded.phrases import (
    ANSWERS,
    QUESTIONS,
    SCENE_LABELS,
    SCENES,
    answer,
    article,
)

Record = dict[str, Any]
Turns = list[tuple[str, str]]  # (question, answer)


class Asker:
    """Draws phrasings of questions.

    Every source and split has a separate one with a separate generator, so a change of one source
    leaves the others as they are.
    """

    def __init__(self, split: str, rng: np.random.Generator):
        self.train = split == "train"
        self.rng = rng

    def turn(self, kind: str, labels: dict[str, str], prefix: str = "") -> tuple[str, str]:
        """A question of `kind` in a random phrasing, after `prefix`, and its answer."""
        return prefix + str(self.rng.choice(QUESTIONS[kind])), answer(kind, labels)

    def kinds(self, item: Item, kinds: tuple[str, ...]) -> tuple[str, ...]:
        """The kinds of questions to ask about an item: all in training, the one of its block if it
        is held out."""
        return kinds if self.train else (kinds[item.block],)


Source = Callable[[dict[str, list[Item]], Asker], Iterator[tuple[dict, Turns]]]
"""(items by kind, asker) -> the media keys and the turns of each record of a source."""


def _image(items: dict[str, list[Item]], ask: Asker) -> Iterator[tuple[dict, Turns]]:
    """Colour or shape of an image; every third training image has both in one conversation."""
    for index, item in enumerate(items["image"]):
        kinds = ask.kinds(item, ("colour", "shape"))
        media = {"image": item.path}
        if ask.train and index % 3 == 0:
            # The two questions come in random order.
            first, second = ask.rng.permutation(kinds)
            opening = ask.turn(first, item.labels, "<image>\n")
            yield media, [opening, ask.turn(second, item.labels)]
            continue
        for kind in kinds:
            yield media, [ask.turn(kind, item.labels, "<image>\n")]


def _image_speech(items: dict[str, list[Item]], ask: Asker) -> Iterator[tuple[dict, Turns]]:
    """Colour or shape of an image; a spoken word asks the question."""
    spoken = {word: _cycle(items["word"], word) for word in ("colour", "shape")}
    for item in items["image"]:
        for kind in ask.kinds(item, ("colour", "shape")):
            media = {"image": item.path, "voice": [next(spoken[kind]).path]}
            yield media, [("<image>\n<audio>", item.labels[kind])]


def _cycle(items: list[Item], word: str) -> Iterator[Item]:
    """The recordings of a word, over and over again."""
    return itertools.cycle([item for item in items if item.labels["word"] == word])


def _video(items: dict[str, list[Item]], ask: Asker) -> Iterator[tuple[dict, Turns]]:
    """Colour or light of a video."""
    for item in items["video"]:
        for kind in ask.kinds(item, ("colour", "light")):
            yield {"video": item.path}, [ask.turn(kind, item.labels, "<video>\n")]


def _video_sound(items: dict[str, list[Item]], ask: Asker) -> Iterator[tuple[dict, Turns]]:
    """Colour of a video and the sound of its sound track."""
    for item in items["video"]:
        media = {"video": item.path, "voice": [item.path]}
        yield media, [ask.turn("see_hear", item.labels, "<audio>\n<video>\n")]


def _caption_speech(items: dict[str, list[Item]], ask: Asker) -> Iterator[tuple[dict, Turns]]:
    """The vowels or the word of a recording, to align the speech encoder."""
    # Few enough words that no word is more frequent than all vowels together.
    words = items["word"][: len(items["vowel"]) // 2]
    for item in items["vowel"] + words:
        media = {"voice": [item.path]}
        yield media, [ask.turn("caption_speech", item.labels, "<audio>\n")]


def _one_question(kind: str, question: str, field: str, placeholder: str) -> Source:
    """Make a source that asks questions of one kind about every file of a kind."""

    def source(items: dict[str, list[Item]], ask: Asker) -> Iterator[tuple[dict, Turns]]:
        for item in items[kind]:
            media = {field: [item.path] if field == "voice" else item.path}
            yield media, [ask.turn(question, item.labels, f"{placeholder}\n")]

    return source


SOURCES: dict[str, Source] = {
    "image": _image,
    "sound": _one_question("sound", "sound", "voice", "<audio>"),
    "speech": _one_question("vowel", "vowel", "voice", "<audio>"),
    "video": _video,
    "image_speech": _image_speech,
    "video_sound": _video_sound,
    "caption_image": _one_question("image", "caption_image", "image", "<image>"),
    "caption_sound": _one_question("sound", "caption_sound", "voice", "<audio>"),
    "caption_speech": _caption_speech,
    "caption_video": _one_question("video", "caption_video", "video", "<video>"),
}
NAMES = ("text", *SOURCES)


def records(media: DatasetPlan, counts: Counts, seed: int, size: int) -> dict[str, list[Record]]:
    """Return the records of every source, under `train/NAME` and `heldout/NAME`."""
    files: dict[str, list[Record]] = {}
    # The third number of a seed is the number of a kind for media, and 100 or above for records.
    text = _text_turns(counts, size, np.random.default_rng((DRAWS, seed, 100)))
    for split_number, split in enumerate(SPLITS):
        for source_number, name in enumerate(NAMES):
            rng = np.random.default_rng((DRAWS, seed, 101 + source_number, split_number))
            if name == "text":
                rows = [({}, [turn]) for turn in text[split]]
            else:
                rows = list(SOURCES[name](media[split], Asker(split, rng)))
            rows = [rows[i] for i in rng.permutation(len(rows))]
            if split == "heldout":
                rows = rows[: counts.heldout]
            files[f"{split}/{name}"] = [
                _record(f"{name}-{split}-{i:05d}", media_keys, turns)
                for i, (media_keys, turns) in enumerate(rows)
            ]
    return files


def chance(rows: list[Record]) -> float:
    """Share of the most frequent last answer: the score of a model that always gives it."""
    answers = Counter(row["conversations"][-1]["value"] for row in rows)
    return max(answers.values()) / len(rows)


def _record(name: str, media: dict, turns: Turns) -> Record:
    """A record in the schema of LLaVA and Uni-MoE."""
    conversations = []
    for question, reply in turns:
        conversations.append({"from": "human", "value": question})
        conversations.append({"from": "gpt", "value": reply})
    return {"id": name, **media, "conversations": conversations}


def text_turns() -> dict[str, dict[str, Turns]]:
    """Return all text-only questions, by kind of question and answer."""
    result: dict[str, dict[str, Turns]] = {}
    for kind, scenes in SCENES.items():
        by_answer: dict[str, Turns] = {value: [] for value in ANSWERS[kind]}
        # Every combination of labels, scene and phrasing of the question.
        combinations = itertools.product(*(ANSWERS[field] for field in SCENE_LABELS[kind]))
        for values, scene, question in itertools.product(combinations, scenes, QUESTIONS[kind]):
            labels = dict(zip(SCENE_LABELS[kind], values, strict=True))
            statement = scene.format(**labels, article=article(labels.get("sound", "")))
            by_answer[labels[kind]].append((f"{statement} {question}", labels[kind]))
        result[kind] = by_answer
    return result


def _text_turns(counts: Counts, size: int, rng: np.random.Generator) -> dict[str, Turns]:
    """Distribute the text-only questions over the splits, equally over kinds and answers.

    No question is in both splits. The training split repeats questions if there are too few.
    """
    splits: dict[str, Turns] = {split: [] for split in SPLITS}
    kinds = text_turns()
    for number, by_answer in enumerate(kinds.values()):
        # Shuffle the questions of each answer, and the answers.
        shuffled = [[turns[i] for i in rng.permutation(len(turns))] for turns in by_answer.values()]
        order = [shuffled[i] for i in rng.permutation(len(shuffled))]
        # Take one question of every answer in turn, so that any beginning of the list is balanced.
        mixed = list(itertools.chain.from_iterable(zip(*order, strict=True)))
        num_heldout = _share(counts.heldout, len(kinds), number)
        num_train = _share(counts.text * size, len(kinds), number)
        splits["heldout"] += mixed[:num_heldout]
        splits["train"] += itertools.islice(itertools.cycle(mixed[num_heldout:]), num_train)
    return splits


def _share(total: int, parts: int, index: int) -> int:
    """Size of part `index` when `total` is divided as evenly as possible: 10 in 4 parts are 2, 3, 2
    and 3."""
    return total * (index + 1) // parts - total * index // parts
