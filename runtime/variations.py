"""The small model's variations of a clip: heard through another microphone, or told in words (stage 0).

The paper has neither.  A few hours of recordings are made to look like more (`train.py --augment`), and a
backbone that comes from no release has to learn from text what LLaDA-8B can do before it hears anything.
"""

import random

import numpy as np
import soxr
import torch
from whisper.audio import SAMPLE_RATE


def augment(audio, generator, facts, window):
    """Another speed, level, a moment of silence in front, a little noise: for few recordings.

    audio (n,), n at most `window`, as what is returned: no word may leave the window and stay in the label.
    """
    use_speed, speed, level, pause, use_noise, noise = torch.rand(6, generator=generator).tolist()
    if use_speed < 0.5:
        # a voice's sex and feeling are in its pitch, which the speed changes; a sound alone bears more
        spread = 0.25 if facts and facts.keys() <= {"sound", "instrument"} else 0.1
        rate = SAMPLE_RATE * min(1 + spread * (2 * speed - 1), window / len(audio))
        # QQ: soxr's quickest.  It may round a length up
        audio = soxr.resample(audio, SAMPLE_RATE, rate, quality="QQ")[:window]
    audio = audio * 10 ** ((level - 0.5) * 0.8)  # 8 dB up or down
    if pause < 0.5:
        silence = min(int(pause * 0.6 * SAMPLE_RATE), window - len(audio))  # up to 0.3 s
        audio = np.pad(audio, (silence, 0))
    if use_noise < 0.5:
        hiss = 10 ** (-4 + 2 * noise) * torch.randn(len(audio), generator=generator).numpy()
        audio = audio + hiss * max(np.abs(audio).max(), 1e-3)  # 80 to 40 dB below the peak
    return audio.astype(np.float32)


def mask_mel(mel, generator):
    """Another microphone: treble up or down by 6 dB, bass the other way; then SpecAugment.

    That blanks out bands of time and of frequency with the mean (Park et al., 2019), so that an answer
    cannot rest on one moment or one pitch.
    """
    tilt = 0.15 * (2 * torch.rand((), generator=generator) - 1)  # Whisper's scale: 40 dB are 1
    mel = mel + tilt * torch.linspace(-1, 1, len(mel))[:, None]
    mean = mel.mean()
    # two bands below 25 mel frames of 10 ms, then two below 8 of frequency's bins
    for axis, widest in ((1, 25), (1, 25), (0, 8), (0, 8)):
        width = int(torch.randint(widest, (1,), generator=generator))
        start = int(torch.randint(mel.size(axis) - width, (1,), generator=generator))
        mel.narrow(axis, start, width).fill_(mean)
    return mel


def imitate_audio(facts, tokenizer, config, generator, is_transcript=False):
    """Imitates the audio tokens of a clip by word embeddings: the facts known of it.

    LLaDA-8B can answer questions about a description before it hears anything, and the adapters only have to
    learn to describe.  A small backbone learns this from text alone (stage 0) if the description looks as
    adapters write: mixtures of facts for acoustic tokens, the transcript for semantic ones, all of them
    louder or softer than words, under noise.  is_transcript: the answer is the words alone, so now and then
    the other facts are hidden.

    Returns ids (A, 2), weights (A, 2), both mixed as weights @ embeddings, and noise (A, width) in units of
    the embeddings' root mean square.
    """
    # Python's own random numbers, which can shuffle and choose, seeded by torch's generator
    rng = random.Random(int(torch.randint(1 << 62, (1,), generator=generator)))
    transcript = tokenizer.encode(facts.get("words", ""), add_special_tokens=False).ids
    known = []
    for kind, value in facts.items():
        if kind not in ("words", "speaker", "caption"):  # no acoustic token stands for these
            known += tokenizer.encode(" " + value, add_special_tokens=False).ids
    tokens = imitate_acoustic(known, config, rng, is_transcript)
    tokens += [(token, token, 1.0) for token in imitate_semantic(transcript, config, rng)]
    tokens = tokens[: config.n_queries + config.n_frames // 4]  # as many as a clip can have
    loudness = torch.tensor([rng.uniform(0.4, 1.4) for _ in tokens])
    noise = rng.uniform(0.0, 0.8) * torch.randn(len(tokens), config.width, generator=generator)
    first, second, share = map(torch.tensor, zip(*tokens, strict=True))
    weights = torch.stack([share, 1 - share], 1) * loudness[:, None]
    return {"ids": torch.stack([first, second], 1), "weights": weights, "noise": noise}


def imitate_acoustic(known, config, rng, is_transcript):
    """-> (id, another id, share of the first) for each acoustic token; known: ids of what the facts say.

    In no order, for which query of a Q-Former says what is not known before it is trained.  From facts in a
    fixed order the adapters learned nothing acoustic (docs/LOG.md).
    """
    blank = config.eos_id
    rng.shuffle(known)
    if is_transcript and rng.random() < 0.25:
        tokens = [(blank, blank, 1.0)] * config.n_soft_prompts  # stage 1 shows soft prompts and no facts
    else:
        tokens = []
        for place in range(config.n_queries):
            first = known[place % len(known)] if known else blank  # in turn: none is left out
            tokens.append((first, rng.choice(known) if known else blank, rng.uniform(0.5, 1.0)))
    rng.shuffle(tokens)
    return tokens


def imitate_semantic(transcript, config, rng):
    """-> an id for each semantic token: the transcript's tokens between blanks, as CTC aligns them.

    There are 12.5 tokens a second, more than are spoken, so most are blanks and one of the transcript may
    stand twice; equal ones are parted by a blank.  The blank is the end mark, as in runtime/ctc.py.
    """
    blank = config.eos_id
    gap = rng.choice((1, 2, 3, 4))  # slow speech has more blanks
    ids = [blank] * rng.randint(0, 4)
    for token in transcript:
        ids += [blank] * rng.randint(int(ids[-1:] == [token]), gap)
        ids += [token] * rng.choice((1, 1, 1, 1, 2))
    ids += [blank] * rng.randint(0, 4)
    if not transcript:  # a sound makes the semantic adapter write anything
        is_talkative = rng.random() < 0.5
        for _ in range(rng.randint(4, 40)):
            is_word = is_talkative and rng.random() < 0.3
            ids.append(rng.randrange(config.vocab) if is_word else blank)
    return ids
