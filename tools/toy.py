"""Recordings made here, for people with no data at hand: espeak-ng's speech and synthesised sounds.

`toy` is a small corpus named and laid out as the real ones are; `demo` makes the clips of assets/demo.
"""

import os
import random
import re

import numpy as np
import soundfile
from tqdm import tqdm

from data import SAMPLE_RATE
from tools.compose import level, write_clip
from tools.corpora import DIGITS
from tools.prompts import capital
from tools.questions import make_folder
from tools.speech import draw_voice, speak

TOY_SOUNDS = ("clock tick", "helicopter", "rain", "sea waves", "siren")
TOY_INSTRUMENTS = ("bass drum", "bell", "guitar", "theremin")
TOY_WORDS = ("bird", "cat", "dog", "happy", "house", "left", "right", "stop", "tree", "yes")
DEMOS = (("seven", "seven", "en-us+m3"), ("digits", "four, nine, two", "en-us+f2"))  # name, text, voice
PARTIALS = ((1, 1.5), (2.76, 3), (5.4, 5))  # of a bell: frequency over the lowest one's, decay a second


def moving_average(samples, width):
    return np.convolve(samples, np.ones(width) / width, "same")


def hits(t, first, every, decay):
    """An envelope of strokes, every so many seconds."""
    envelope = np.zeros_like(t)
    for start in np.arange(first, t[-1], every):
        envelope += (t >= start) * np.exp(-np.clip(t - start, 0, None) * decay)
    return envelope


def pluck(n, period, generator):
    """Karplus-Strong: a delay line of noise, averaged as it goes round."""
    string, samples = list(generator.uniform(-1, 1, period)), np.zeros(n)
    for i in range(n):
        samples[i] = string[i % period]
        string[i % period] = 0.498 * (string[i % period] + string[(i + 1) % period])
    return samples


def glide(frequency):
    """A sine whose frequency is given at every sample."""
    return np.sin(2 * np.pi * np.cumsum(frequency) / SAMPLE_RATE)


def synthesize(kind, rng):
    """Two seconds or so of a sound or an instrument, different each time -> samples at 16 kHz."""
    n = int(rng.uniform(1.5, 2.5) * SAMPLE_RATE)
    generator = np.random.default_rng(rng.getrandbits(32))
    t, noise = np.arange(n) / SAMPLE_RATE, generator.standard_normal(n)
    pitch, first = rng.uniform(0.8, 1.25), rng.uniform(0, 0.2)
    if kind == "rain":
        return noise - moving_average(noise, 3)
    if kind == "sea waves":
        return moving_average(noise, 12) * (1 + 0.9 * np.sin(np.pi * pitch * t + rng.uniform(0, 6)))
    if kind == "clock tick":
        return hits(t, first, 0.5, 300) * np.sin(2 * np.pi * 2000 * pitch * t) + 0.005 * noise
    if kind == "helicopter":
        return hits(t, first, 0.08 * pitch, 40) * moving_average(noise, 20)
    if kind == "siren":
        return glide(700 * pitch + 300 * np.sin(2 * np.pi * 1.2 * t))
    if kind == "bell":
        return sum(
            np.exp(-t * decay) * np.sin(2 * np.pi * 440 * pitch * ratio * t) for ratio, decay in PARTIALS
        )
    if kind == "guitar":
        return pluck(n, int(SAMPLE_RATE / (130 * pitch)), generator)
    if kind == "bass drum":
        return hits(t, first, 0.45, 12) * np.sin(2 * np.pi * 60 * pitch * t)
    if kind == "theremin":
        return glide(500 * pitch * (1 + 0.03 * np.sin(2 * np.pi * 6 * t)))
    raise ValueError(kind)


def toy(out, each, seed=0):
    """`each` clips of every word and sound under OUT/fsdd, speech_commands, esc10 and berklee."""
    rng = random.Random(seed)
    total = each * (len(DIGITS) + len(TOY_WORDS) + len(TOY_SOUNDS) + len(TOY_INSTRUMENTS))
    with tqdm(total=total, desc="toy", unit=" clips") as progress:
        for word in (*DIGITS, *TOY_WORDS):
            for i in range(each):
                voice = draw_voice(rng)
                if word in DIGITS:
                    name = f"fsdd/recordings/{DIGITS.index(word)}_{re.sub(r'[^a-z]', '', voice)}_{i}.wav"
                else:
                    name = f"speech_commands/{word}/{rng.getrandbits(32):08x}_nohash_{i}.wav"
                path = os.path.join(out, name)
                make_folder(os.path.dirname(path))
                speak(word, path, voice, speed=rng.randint(110, 190), pitch=rng.randint(25, 75))
                progress.update()
        for n, kind in enumerate(TOY_SOUNDS + TOY_INSTRUMENTS, 1):
            for i in range(each):
                if kind in TOY_SOUNDS:
                    name = f"esc10/{n:03} - {capital(kind)}/{i % 5 + 1}-{n}{i:03}-A.wav"
                else:
                    name = f"berklee/{kind.replace(' ', '')}_{i}.wav"
                write_clip(level(synthesize(kind, rng), rng).astype(np.float32), os.path.join(out, name))
                progress.update()


def demo(out):
    """The clips that come with the code: espeak-ng's speech in voices kept out of training, and a clock."""
    make_folder(out)
    for name, text, voice in DEMOS:
        speak(text, os.path.join(out, name + ".wav"), voice, speed=140)
    rng, n = np.random.default_rng(0), 5 * SAMPLE_RATE
    ticks, t = np.zeros(n), np.arange(400) / SAMPLE_RATE
    for i, start in enumerate(range(SAMPLE_RATE // 4, n - 400, SAMPLE_RATE // 2)):
        frequency = 2400 if i % 2 else 1800
        ticks[start : start + 400] += np.exp(-t * 400) * np.sin(2 * np.pi * frequency * t)
    ticks += 0.002 * rng.standard_normal(n)
    soundfile.write(os.path.join(out, "clock.wav"), 0.2 * ticks, SAMPLE_RATE)
