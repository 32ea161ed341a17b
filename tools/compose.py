"""New clips out of clips: strings of words, speech over sounds.

All that is drawn is drawn from an `rng` that the caller gives: the same seed writes the same samples.
"""

import os

import numpy as np
import soundfile

from data import SAMPLE_RATE, load_audio
from tools.corpora import Clip
from tools.questions import by_fact


def level(audio, rng, low=-0.8, high=-0.1):
    """The clip at a peak drawn between 10^low and 10^high."""
    return audio / max(np.abs(audio).max(), 1e-3) * 10 ** rng.uniform(low, high)


def silence(rng, low, high):
    """low..high seconds of it."""
    return np.zeros(int(rng.uniform(low, high) * SAMPLE_RATE), np.float32)


def write_clip(audio, path):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    soundfile.write(path, audio.clip(-1, 1), SAMPLE_RATE)


def loop(sound, n, voice, decibels):
    """A sound repeated or cut to n samples, so loud that `voice` is so many decibels above it."""

    def rms(x):
        return float(np.sqrt(np.mean(x**2)) + 1e-5)

    return np.tile(sound, -(-n // len(sound)))[:n] * (rms(voice) / rms(sound) * 10 ** (-decibels / 20))


def lay_under(voice, sound, rng, low=-6.0, high=9.0):
    """The sound behind a voice that is low..high dB louder -> samples (n,), where the voice starts, dB."""
    n = max(len(voice) + int(rng.uniform(0.2, 1.5) * SAMPLE_RATE), min(len(sound), int(3.5 * SAMPLE_RATE)))
    start, decibels = rng.randint(0, n - len(voice)), rng.uniform(low, high)
    return loop(sound, n, voice, decibels), start, decibels


def louder(decibels):
    """Which is louder, as a fact, of a voice so many decibels above a sound; none below 2."""
    return {"louder": "the voice" if decibels > 0 else "the background"} if abs(decibels) >= 2 else {}


def compose(clips, rng, path):
    """Joins the clips with random gaps and levels under a little noise; writes a FLAC at `path`."""
    noise = 10 ** rng.uniform(-4, -2.5)
    parts = [silence(rng, 0.0, 0.3)]
    for clip in clips:
        parts.append(level(load_audio(clip.path)[0], rng))
        parts.append(silence(rng, 0.02, 0.4))
    audio = np.concatenate(parts)
    generator = np.random.default_rng(rng.getrandbits(32))
    audio += noise * generator.standard_normal(len(audio), dtype=np.float32)
    write_clip(audio, path)
    words = " ".join(clip.facts["words"] for clip in clips)
    return Clip(path, clips[0].dataset + "_strings", {"words": words})


def mix(speech, sound, rng, path, low=-6.0, high=9.0, seconds=8.0):
    """Speech low..high dB above a sound; writes a FLAC at `path`.

    The words of a recording that is longer than `seconds` are no fact of what is left of it.
    """
    voice, notes = load_audio(speech.path, limit=seconds)
    under = load_audio(sound.path, limit=seconds)[0]
    mixed, start, ratio = lay_under(voice, under, rng, low, high)
    mixed[start : start + len(voice)] += voice
    write_clip(level(mixed, rng), path)
    said = {kind: fact for kind, fact in speech.facts.items() if kind != "words"} if notes else speech.facts
    facts = said | {"background": sound.facts["sound"]} | louder(ratio)
    return Clip(path, "mixtures", facts)


def strings(clips, n, most, rng, folder, progress, least=1):
    """n strings of least..most clips, their words drawn uniformly."""
    groups = by_fact(clips, "words")
    names = sorted(groups)
    for i in range(n):
        drawn = [rng.choice(groups[rng.choice(names)]) for _ in range(rng.randint(least, most))]
        yield compose(drawn, rng, os.path.join(folder, f"{i:05}.flac"))
        progress.update()
