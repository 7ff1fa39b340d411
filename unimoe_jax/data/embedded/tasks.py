"""Records in the LLaVA/Uni-MoE schema: what is asked about which media."""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np

from unimoe_jax.data.embedded.media import DRAWS, SPLITS, Counts, DatasetPlan, Item
from unimoe_jax.data.embedded.phrases import ANSWERS, QUESTIONS, SCENES, TOLD, answer, article

Record = dict[str, object]
Turns = list[tuple[str, str]]  # (question, answer)


class Asker:
    """Draws phrasings; one per source and split, so that sources do not disturb each other."""

    def __init__(self, split: str, rng: np.random.Generator):
        self.train = split == "train"
        self.rng = rng

    def turn(self, kind: str, labels: dict[str, str], prefix: str = "") -> tuple[str, str]:
        """One question of `kind` in a random phrasing, with its answer."""
        return prefix + str(self.rng.choice(QUESTIONS[kind])), answer(kind, labels)

    def kinds(self, item: Item, kinds: tuple[str, ...]) -> tuple[str, ...]:
        """What to ask about an item: everything in training, by its block when held out."""
        return kinds if self.train else (kinds[item.block],)


Source = Callable[[dict[str, list[Item]], Asker], Iterator[tuple[dict, Turns]]]


def _image(items: dict[str, list[Item]], ask: Asker) -> Iterator[tuple[dict, Turns]]:
    for index, item in enumerate(items["image"]):
        kinds = ask.kinds(item, ("colour", "shape"))
        media = {"image": item.path}
        if ask.train and index % 3 == 0:  # both questions in one conversation, in either order
            first, second = ask.rng.permutation(kinds)
            opening = ask.turn(first, item.labels, "<image>\n")
            yield media, [opening, ask.turn(second, item.labels)]
            continue
        for kind in kinds:
            yield media, [ask.turn(kind, item.labels, "<image>\n")]


def _image_speech(items: dict[str, list[Item]], ask: Asker) -> Iterator[tuple[dict, Turns]]:
    spoken = {word: _cycle(items["word"], word) for word in ("colour", "shape")}
    for item in items["image"]:
        for kind in ask.kinds(item, ("colour", "shape")):
            media = {"image": item.path, "voice": [next(spoken[kind]).path]}
            yield media, [("<image>\n<audio>", item.labels[kind])]


def _cycle(items: list[Item], word: str) -> Iterator[Item]:
    return itertools.cycle([item for item in items if item.labels["word"] == word])


def _video(items: dict[str, list[Item]], ask: Asker) -> Iterator[tuple[dict, Turns]]:
    for item in items["video"]:
        for kind in ask.kinds(item, ("colour", "light")):
            yield {"video": item.path}, [ask.turn(kind, item.labels, "<video>\n")]


def _video_sound(items: dict[str, list[Item]], ask: Asker) -> Iterator[tuple[dict, Turns]]:
    for item in items["video"]:
        media = {"video": item.path, "voice": [item.path]}
        yield media, [ask.turn("see_hear", item.labels, "<audio>\n<video>\n")]


def _caption_speech(items: dict[str, list[Item]], ask: Asker) -> Iterator[tuple[dict, Turns]]:
    words = items["word"][: len(items["vowel"]) // 2]  # no word commoner than the vowels together
    for item in items["vowel"] + words:
        media = {"voice": [item.path]}
        yield media, [ask.turn("caption_speech", item.labels, "<audio>\n")]


def _one_question(kind: str, question: str, field: str, placeholder: str) -> Source:
    """A source that asks the same question about every file of a kind."""

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
    """The records of every source, under `train/NAME` and `heldout/NAME`."""
    files: dict[str, list[Record]] = {}
    text = _text_turns(counts, size, np.random.default_rng((DRAWS, seed, 100)))
    for (s, split), (n, name) in itertools.product(enumerate(SPLITS), enumerate(NAMES)):
        rng = np.random.default_rng((DRAWS, seed, 101 + n, s))
        if name == "text":
            rows = [({}, [turn]) for turn in text[split]]
        else:
            rows = list(SOURCES[name](media[split], Asker(split, rng)))
        rows = [rows[i] for i in rng.permutation(len(rows))]
        if split == "heldout":
            rows = rows[: counts.heldout]
        files[f"{split}/{name}"] = [
            _record(f"{name}-{split}-{i:05d}", *row) for i, row in enumerate(rows)
        ]
    return files


def chance(rows: list[Record]) -> float:
    """Share of the commonest last answer: what a model scores that always gives it."""
    answers = Counter(row["conversations"][-1]["value"] for row in rows)
    return max(answers.values()) / len(rows)


def _record(name: str, media: dict, turns: Turns) -> Record:
    conversations = []
    for question, reply in turns:
        conversations.append({"from": "human", "value": question})
        conversations.append({"from": "gpt", "value": reply})
    return {"id": name, **media, "conversations": conversations}


def text_turns() -> dict[str, dict[str, Turns]]:
    """Every text-only question there is, by question kind and answer."""
    result: dict[str, dict[str, Turns]] = {}
    for kind, scenes in SCENES.items():
        by_answer: dict[str, Turns] = {value: [] for value in ANSWERS[kind]}
        cells = itertools.product(*(ANSWERS[field] for field in TOLD[kind]))
        for cell, scene, question in itertools.product(cells, scenes, QUESTIONS[kind]):
            labels = dict(zip(TOLD[kind], cell, strict=True))
            told = scene.format(**labels, article=article(labels.get("sound", "")))
            by_answer[labels[kind]].append((f"{told} {question}", labels[kind]))
        result[kind] = by_answer
    return result


def _text_turns(counts: Counts, size: int, rng: np.random.Generator) -> dict[str, Turns]:
    """Deals the text-only questions out to the splits, equally over kinds and answers.

    No question is in both splits; training repeats questions when there are too few.
    """
    dealt: dict[str, Turns] = {split: [] for split in SPLITS}
    kinds = text_turns()
    for k, by_answer in enumerate(kinds.values()):
        shuffled = [[turns[i] for i in rng.permutation(len(turns))] for turns in by_answer.values()]
        order = [shuffled[i] for i in rng.permutation(len(shuffled))]
        row = list(itertools.chain.from_iterable(zip(*order, strict=True)))
        held = _share(counts.heldout, len(kinds), k)
        dealt["heldout"] += row[:held]
        train = itertools.cycle(row[held:])
        dealt["train"] += itertools.islice(train, _share(counts.text * size, len(kinds), k))
    return dealt


def _share(total: int, parts: int, index: int) -> int:
    return total * (index + 1) // parts - total * index // parts
