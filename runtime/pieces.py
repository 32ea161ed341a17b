"""A clip beyond the encoder's window: cut into pieces, whose answers are then put together again."""

import dataclasses
import itertools
import re

import torch
from whisper.audio import SAMPLE_RATE

from runtime.recordings import load_audio, split_clip
from runtime.terminal import clock


def load_clips(paths, limit, long):
    """Recordings -> samples, notes for the user.  limit: the window in seconds.  long: of cut_clips."""
    clips, notes = [], []
    for path in paths:
        audio, own_notes = load_audio(path, limit=limit if long == "cut" else None)
        clips.append(audio)
        notes += own_notes
        seconds = len(audio) / SAMPLE_RATE
        if seconds > limit:
            notes.append(f"{path}: {seconds:.1f} s long; answered in pieces of at most {limit:g} s")
    return clips, notes


def cut_clips(clips, questions, generators, window, long):
    """Clips, each with a question and a generator -> pieces, (samples, question, generator) each.

    clips: arrays (n,).  window: the most samples of a piece.  long: "split" at pauses, or "cut": only
    a clip's beginning is used.
    Also returns the spans of each clip: [(start, end)] of its pieces, in samples.
    """
    pieces, spans = [], []
    for samples, question, generator in zip(clips, questions, generators, strict=True):
        samples = samples[:window] if long == "cut" else samples
        spans.append(split_clip(samples, window))
        own = generators_of_pieces(generator, len(spans[-1]))
        for (start, end), piece_generator in zip(spans[-1], own, strict=True):
            pieces.append((samples[start:end], question, piece_generator))
    return pieces, spans


def generators_of_pieces(generator, n):
    """One generator for each of a clip's n pieces, so that an answer does not depend on the others."""
    if n == 1:
        return [generator]
    seed = int(torch.randint(2**62, (), generator=generator))
    return [torch.Generator().manual_seed(seed + k) for k in range(n)]


def is_transcription(question):
    """Whether a question asks for a transcript and nothing else: answers about pieces can then be joined."""
    asked = (
        "transcribe|write (down|out) (what is said|the (spoken )?words)|what is( being)? said|"
        "what (does|did) the (speaker|person) say|(give|provide|write)( me)? (a|the) transcript(ion)?"
    )
    rest = (
        "in|of|to|into|as|for|the|this|that|these|following|given|whole|entire|all|everything|an?|it|here|what|is|"
        "was|being|said|you|hear|spoken|written|audio|recording|clip|file|speech|speaker|sentence|conversation|"
        "content|text|english|words?|verbatim|exactly|please"
    )
    return re.fullmatch(rf"\W*(please )?({asked})(\W+({rest}))*\W*", question, re.IGNORECASE) is not None


def join_answers(answers, spans, questions):
    """Answers about pieces -> one Answer about each clip.  spans: of cut_clips.  questions: one a clip."""
    answers, joined = iter(answers), []
    for clip_spans, question in zip(spans, questions, strict=True):
        joined.append(join_pieces(list(itertools.islice(answers, len(clip_spans))), clip_spans, question))
    return joined


def join_pieces(answers, spans, question):
    """The Answers about a clip's pieces, at spans [(start, end)] in samples, as one."""
    if len(answers) == 1:
        return answers[0]
    times = [(start / SAMPLE_RATE, end / SAMPLE_RATE) for start, end in spans]
    pieces = [(*time, answer.text) for time, answer in zip(times, answers, strict=True)]
    if is_transcription(question):
        text = " ".join(said for *_, said in pieces if said)
    else:
        # "Sad." and "Happy." do not add up to an answer about the whole clip
        text = "\n".join(f"{clock(start, end)} {said}" for start, end, said in pieces)
    return dataclasses.replace(
        answers[0],
        text=text,
        calls=sum(answer.calls for answer in answers),
        seconds=sum(answer.seconds for answer in answers),
        audio_seconds=sum(answer.audio_seconds for answer in answers),
        confidence=[c for answer in answers for c in answer.confidence],
        pieces=pieces,
    )
