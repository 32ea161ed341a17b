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


def rms(audio):
    return float(np.sqrt(np.mean(audio**2)) + 1e-5)


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
    n = max(len(voice) + int(rng.uniform(0.2, 1.5) * SAMPLE_RATE), min(len(under), int(3.5 * SAMPLE_RATE)))
    start, ratio = rng.randint(0, n - len(voice)), rng.uniform(low, high)
    # the sound repeated or cut to n samples, so loud that the voice is `ratio` dB above it
    mixed = np.tile(under, -(-n // len(under)))[:n] * (rms(voice) / rms(under) * 10 ** (-ratio / 20))
    mixed[start : start + len(voice)] += voice
    write_clip(level(mixed, rng), path)
    said = {kind: fact for kind, fact in speech.facts.items() if kind != "words"} if notes else speech.facts
    facts = said | {"background": sound.facts["sound"]}
    if abs(ratio) >= 2:
        facts["louder"] = "the voice" if ratio > 0 else "the background"
    return Clip(path, "mixtures", facts)


def strings(clips, n, most, rng, folder, progress, least=1):
    """n strings of least..most clips, their words drawn uniformly."""
    groups = by_fact(clips, "words")
    names = sorted(groups)
    for i in range(n):
        drawn = [rng.choice(groups[rng.choice(names)]) for _ in range(rng.randint(least, most))]
        yield compose(drawn, rng, os.path.join(folder, f"{i:05}.flac"))
        progress.update()
