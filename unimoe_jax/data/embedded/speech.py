"""Spoken vowels, by source-filter synthesis (Fant, Acoustic Theory of Speech Production, 1960).

Pulses of the glottis, with gliding pitch and jitter, pass through formant resonators. Formants
scale with the speaker's pitch, because a speaker with a higher voice has a shorter vocal tract. The
five vowels are real vowels. The two question words are pseudo-words of two vowels each (see
`WORDS`).
"""

from pathlib import Path

import numpy as np

from unimoe_jax.data.embedded.sounds import RATE, finish, save

# F1 to F3 in Hz of men's vowels: Hillenbrand et al., JASA 97(5), 1995, table V.
VOWELS: dict[str, tuple[int, int, int]] = {
    "ah": (768, 1333, 2522),
    "ee": (342, 2322, 3000),
    "eh": (580, 1799, 2605),
    "oh": (497, 910, 2459),
    "oo": (378, 997, 2343),
}
# Pseudo-words that stand for "colour" and "shape", so that speech can ask a question.
WORDS: dict[str, tuple[str, str]] = {"colour": ("oh", "ah"), "shape": ("eh", "ee")}

BANDWIDTHS = (70.0, 90.0, 130.0, 200.0)  # Hz, F1 to F4
FOURTH = 3500.0  # Hz, F4 of every vowel
TILT = 500.0  # Hz, from which on the glottal spectrum falls


def _pulses(pitch: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A pulse wherever the phase of `pitch` (Hz, one value per sample) wraps around, with 1 %
    jitter and shimmer."""
    phase = np.cumsum(pitch) / RATE
    wraps = np.flatnonzero(np.diff(np.floor(phase)) > 0)
    period = RATE / pitch[wraps]
    # Jitter moves a pulse, shimmer changes its height.
    sample = np.rint(wraps + rng.normal(0, 0.01, len(wraps)) * period).astype(int)
    source = np.zeros(len(pitch))
    source[np.clip(sample, 0, len(pitch) - 1)] = rng.normal(1, 0.01, len(wraps))
    return source


def _transfer(vowel: str, scale: float, frequency: np.ndarray) -> np.ndarray:
    """Cascade of second-order resonators times glottal tilt: complex, one per frequency in Hz."""
    response = 1 / (1 + 1j * frequency / TILT)
    for centre, width in zip((*VOWELS[vowel], FOURTH), BANDWIDTHS, strict=True):
        pole = np.pi * width + 2j * np.pi * centre * scale  # in 1/s
        s = 2j * np.pi * frequency
        response = response * abs(pole) ** 2 / ((s + pole) * (s + pole.conjugate()))
    return response


def _syllable(
    vowels: tuple[str, ...],
    seconds: float,
    pitch: float,
    scale: float,
    rng: np.random.Generator,
) -> np.ndarray:
    """The vowels joined smoothly, one after another: float [samples].

    pitch: in Hz, at the beginning; scale: factor on all formants.
    """
    length = int(seconds * RATE)
    # The source: pulses of gliding pitch, and a little breath noise.
    glide = np.linspace(1, 2 ** rng.uniform(-0.3, 0.2), length)
    source = _pulses(pitch * glide, rng) + 0.01 * rng.normal(size=length)
    spectrum, frequency = np.fft.rfft(source), np.fft.rfftfreq(length, 1 / RATE)
    position = np.linspace(0, len(vowels), length)
    # Filter the whole source by every vowel, and blend the results over time.
    signal = np.zeros(length)
    for index, vowel in enumerate(vowels):
        voiced = np.fft.irfft(spectrum * _transfer(vowel, scale, frequency), length)
        # Neighbouring vowels blend within a quarter of a vowel. The first vowel has none before
        # it and the last has none after it.
        rise = np.clip((position - index) * 4 + 0.5, 0, 1) if index else 1.0
        fall = np.clip((index + 1 - position) * 4 + 0.5, 0, 1) if index + 1 < len(vowels) else 1.0
        signal += voiced * rise * fall / np.abs(voiced).max()
    # Fade in within 30 ms and out within 60 ms.
    t = np.arange(length) / RATE
    return signal * np.minimum(1, t / 0.03) * np.minimum(1, (seconds - t) / 0.06)


def synthesise(syllables: list[tuple[str, ...]], rng: np.random.Generator) -> np.ndarray:
    """Synthesise one speaker who says the syllables: float [samples], |x| < 1, 16 kHz, at most 2
    seconds."""
    pitch = rng.uniform(95, 190)
    # A higher voice has higher formants. The formants in VOWELS belong to a pitch of 130 Hz.
    scale = (pitch / 130) ** 0.22 * rng.uniform(0.97, 1.03)
    longest = 0.85 if len(syllables) == 1 else 0.6
    # Silence before the first syllable and after each.
    parts = [np.zeros(int(rng.uniform(0.05, 0.2) * RATE))]
    for syllable in syllables:
        parts.append(_syllable(syllable, rng.uniform(0.4, longest), pitch, scale, rng))
        parts.append(np.zeros(int(rng.uniform(0.08, 0.2) * RATE)))
    signal = np.concatenate(parts)
    return finish(signal / np.abs(signal).max(), rng)


def write_vowel(path: Path, labels: dict[str, str], rng: np.random.Generator) -> None:
    """Write a WAV of the label `vowel`, said `times` times (once or twice)."""
    save(path, synthesise([(labels["vowel"],)] * int(labels["times"]), rng))


def write_word(path: Path, labels: dict[str, str], rng: np.random.Generator) -> None:
    """Write a WAV of the question word `word`."""
    save(path, synthesise([WORDS[labels["word"]]], rng))
