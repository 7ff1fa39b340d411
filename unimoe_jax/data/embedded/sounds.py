"""Short synthesised sound events in six classes."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import soundfile

RATE = 16_000  # samples per second
LONGEST = 2.0  # seconds

Synth = Callable[[int, np.random.Generator], np.ndarray]
"""(samples, random generator) -> a sound float [samples]."""


def _time(length: int) -> np.ndarray:
    """The time of each of `length` samples, in seconds."""
    return np.arange(length) / RATE


def _add(signal: np.ndarray, part: np.ndarray, start: int) -> None:
    """Add `part` to `signal` (in place) from sample `start` on, cut at the end of `signal`."""
    part = part[: max(0, len(signal) - start)]
    signal[start : start + len(part)] += part


def _fade(signal: np.ndarray, seconds: float) -> np.ndarray:
    """Fade both ends in and out, so that nothing clicks."""
    n = min(int(seconds * RATE), len(signal) // 2)
    ramp = np.sin(np.linspace(0, np.pi / 2, n)) ** 2
    return signal * np.concatenate([ramp, np.ones(len(signal) - 2 * n), ramp[::-1]])


def coloured_noise(
    length: int, gain: Callable[[np.ndarray], np.ndarray], rng: np.random.Generator
) -> np.ndarray:
    """Noise whose spectrum follows `gain(frequency in Hz)`, with RMS 1: float [length]."""
    spectrum = np.fft.rfft(rng.normal(size=length))
    noise = np.fft.irfft(spectrum * gain(np.fft.rfftfreq(length, 1 / RATE)), length)
    return noise / np.sqrt(np.mean(noise**2))


def _bell(length: int, rng: np.random.Generator) -> np.ndarray:
    """One or two strokes of slightly inharmonic partials; higher partials fade sooner."""
    ratios = np.array([0.5, 1.0, 1.2, 1.5, 2.0, 2.7, 4.1])
    pitch, decay = rng.uniform(500, 1000), rng.uniform(2.5, 5.0)
    t = _time(length)
    stroke = np.zeros(length)
    for ratio in ratios:
        envelope = rng.uniform(0.5, 1) * np.exp(-decay * np.sqrt(ratio) * t)
        stroke += envelope * np.sin(2 * np.pi * pitch * ratio * t)
    signal = stroke.copy()
    if rng.random() < 0.5:
        _add(signal, stroke, int(rng.uniform(0.4, 0.7) * RATE))
    return signal


def _siren(length: int, rng: np.random.Generator) -> np.ndarray:
    """A tone that sweeps slowly up and down over about an octave."""
    centre, rate, phase = rng.uniform(700, 1100), rng.uniform(0.8, 2.0), rng.uniform(0, 2 * np.pi)
    frequency = centre * 2 ** (
        rng.uniform(0.4, 0.7) * np.sin(2 * np.pi * rate * _time(length) + phase)
    )
    # The phase is the integral of the frequency.
    angle = 2 * np.pi * np.cumsum(frequency) / RATE
    return np.sin(angle) + 0.4 * np.sin(2 * angle) + 0.15 * np.sin(3 * angle)


def _rain(length: int, rng: np.random.Generator) -> np.ndarray:
    """Broadband noise that swells slowly, with the clicks of single drops."""
    # The noise is strongest between a low and a high frequency.
    low, high = rng.uniform(300, 800), rng.uniform(5000, 7500)
    noise = coloured_noise(
        length, lambda f: 1 / (1 + (low / (f + 1)) ** 2) / (1 + (f / high) ** 4), rng
    )
    swell = 1 + 0.3 * np.sin(2 * np.pi * rng.uniform(0.3, 1) * _time(length) + rng.uniform(0, 6))
    drops = np.zeros(length)
    drops[rng.integers(0, length, int(rng.uniform(40, 120)))] = rng.uniform(2, 6)
    return noise * swell + drops


def _drum(length: int, rng: np.random.Generator) -> np.ndarray:
    """Two to five low thumps at a steady tempo, with falling pitch."""
    pitch, beat = rng.uniform(60, 120), rng.uniform(0.25, 0.5)
    t = _time(int(0.4 * RATE))
    angle = 2 * np.pi * pitch * (t + 0.03 * (1 - np.exp(-t / 0.03)))
    thump = np.exp(-t * rng.uniform(9, 16)) * np.sin(angle)
    # The stick adds a short burst of noise.
    thump += 0.3 * np.exp(-t * 90) * rng.normal(size=len(t))
    signal = np.zeros(length)
    for stroke in range(rng.integers(2, 6)):
        _add(signal, thump * rng.uniform(0.7, 1), int(stroke * beat * RATE))
    return signal


def _bird(length: int, rng: np.random.Generator) -> np.ndarray:
    """A series of short, high chirps, which all sweep up or all sweep down."""
    pitch, sweep = rng.uniform(3000, 5000), rng.uniform(0.15, 0.4) * rng.choice([-1, 1])
    duration, gap = rng.uniform(0.06, 0.14), rng.uniform(0.05, 0.12)
    t = _time(int(duration * RATE))
    signal = np.zeros(length)
    for start in np.arange(0, length / RATE, duration + gap):
        frequency = pitch * rng.uniform(0.92, 1.08) * (1 + sweep * (t / duration - 0.5))
        chirp = np.sin(2 * np.pi * np.cumsum(frequency) / RATE) * np.sin(np.pi * t / duration)
        _add(signal, chirp * rng.uniform(0.6, 1), int(start * RATE))
    return signal


def _horn(length: int, rng: np.random.Generator) -> np.ndarray:
    """A steady chord of two low harmonic tones."""
    pitch, interval = rng.uniform(140, 260), rng.choice([1.25, 1.5])
    t = _time(length)
    signal = np.zeros(length)
    for tone in (pitch, pitch * interval):
        for n in range(1, 9):
            signal += np.sin(2 * np.pi * tone * n * t + rng.uniform(0, 6)) / n**0.8
    return _fade(signal, 0.06)


SOUNDS: dict[str, Synth] = {
    "bell": _bell,
    "siren": _siren,
    "rain": _rain,
    "drum": _drum,
    "bird": _bird,
    "horn": _horn,
}


def synthesise(name: str, seconds: float, rng: np.random.Generator) -> np.ndarray:
    """Synthesise a sound event of the class `name` in light noise: float [samples], |x| < 1,
    16 kHz."""
    length = int(seconds * RATE)
    # The event begins after up to 12 % of the recording.
    onset = int(rng.uniform(0, 0.12) * length)
    event = _fade(SOUNDS[name](length - onset, rng), 0.01)
    signal = np.zeros(length)
    signal[onset:] = event / np.abs(event).max()
    return finish(signal, rng)


def finish(signal: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Scale a signal of peak 1 by a random gain and add a light noise floor."""
    signal = rng.uniform(0.35, 0.9) * signal + rng.uniform(0.001, 0.004) * rng.normal(
        size=len(signal)
    )
    return np.clip(signal, -0.999, 0.999)


def save(path: Path, signal: np.ndarray) -> None:
    """Write float [samples] as 16-bit mono WAV at 16 kHz."""
    soundfile.write(path, signal, RATE, subtype="PCM_16", format="WAV")


def write(path: Path, labels: dict[str, str], rng: np.random.Generator) -> None:
    """Write a WAV of the label `sound`, 1.2 to 2 seconds long."""
    save(path, synthesise(labels["sound"], rng.uniform(1.2, LONGEST), rng))
