"""All wording of the data set: questions, answers, and the scenes of text-only records."""

from unimoe_jax.data.embedded.images import COLOURS, SHAPES
from unimoe_jax.data.embedded.sounds import SOUNDS
from unimoe_jax.data.embedded.speech import VOWELS, WORDS
from unimoe_jax.data.embedded.videos import LIGHTS

QUESTIONS: dict[str, tuple[str, ...]] = {
    "colour": (
        "What colour is it?",
        "What colour is the shape?",
        "Which colour do you see?",
        "Name the colour.",
    ),
    "shape": (
        "What shape is it?",
        "Which shape do you see?",
        "What is the shape?",
        "Name the shape.",
    ),
    "light": (
        "Is it steady or blinking?",
        "How does the shape shine?",
        "Does the shape blink?",
        "Name the light.",
    ),
    "sound": (
        "What do you hear?",
        "What makes the sound?",
        "Which sound is it?",
        "Name the sound.",
    ),
    "vowel": (
        "Which vowel is spoken?",
        "What vowel do you hear?",
        "Which vowel is it?",
        "Name the vowel.",
    ),
    "see_hear": (
        "What do you see and hear?",
        "Name the colour and the sound.",
        "Which colour and which sound is it?",
    ),
    "caption_image": (
        "Describe the image.",
        "What is in the image?",
        "What does the image show?",
    ),
    "caption_sound": (
        "Describe the sound.",
        "What is in the recording?",
        "What does the recording hold?",
    ),
    "caption_speech": (
        "Write down what is said.",
        "What is said?",
        "What does the speaker say?",
    ),
    "caption_video": (
        "Describe the video.",
        "What is in the video?",
        "What does the video show?",
    ),
}

# The statement before the question of a text-only record; its fields are filled from ANSWERS.
SCENES: dict[str, tuple[str, ...]] = {
    "colour": (
        "A picture shows a {colour} {shape}.",
        "There is a {colour} {shape}.",
        "You see a {colour} {shape}.",
        "Here is a {shape}, and it is {colour}.",
    ),
    "light": (
        "A video shows a {light} {shape}.",
        "You see a {light} {shape}.",
        "There is a {shape}, and it is {light}.",
    ),
    "sound": (
        "You hear {article}{sound}.",
        "There is {article}{sound}.",
        "The recording holds {article}{sound}.",
        "Listen, {article}{sound}.",
    ),
    "vowel": (
        "You hear {vowel}.",
        "The speaker says {vowel}.",
        "Somebody says {vowel} and then {vowel}.",
        "Listen: {vowel}.",
    ),
}
SCENES["shape"] = SCENES["colour"]
# The labels that the scenes of each kind mention.
SCENE_LABELS: dict[str, tuple[str, ...]] = {
    "colour": ("colour", "shape"),
    "shape": ("colour", "shape"),
    "light": ("shape", "light"),
    "sound": ("sound",),
    "vowel": ("vowel",),
}

ANSWERS: dict[str, tuple[str, ...]] = {
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "light": LIGHTS,
    "sound": tuple(SOUNDS),
    "vowel": tuple(VOWELS),
}


def article(sound: str) -> str:
    """`a ` before a countable sound: a bell, but rain."""
    return "" if sound == "rain" else "a "


def answer(kind: str, labels: dict[str, str]) -> str:
    """The answer to a question of `kind` about media with these labels."""
    match kind:
        case "see_hear":
            return f"{labels['colour']} {labels['sound']}"
        case "caption_image":
            return f"a {labels['colour']} {labels['shape']}"
        case "caption_sound":
            return f"the sound of {article(labels['sound'])}{labels['sound']}"
        case "caption_speech":
            return labels.get("word") or " ".join([labels["vowel"]] * int(labels["times"]))
        case "caption_video":
            return f"a {labels['light']} {labels['colour']} shape"
    return labels[kind]


def answer_words() -> list[str]:
    """Return every word that occurs in an answer to a question, sorted."""
    words = {word for kind in ANSWERS.values() for text in kind for word in text.split()}
    return sorted(words | set(WORDS))
