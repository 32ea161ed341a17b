"""Text to speech: spoken questions and sentences, by any of three engines.

An engine has `voices`, and say(text, path, voice, speed), which writes a WAV.  espeak-ng needs nothing but
itself; a command template runs whatever can be run; a speech endpoint is asked over HTTP.  Clips that are
already there are not spoken again, so a stopped run goes on where it was.
"""

import contextlib
import csv
import hashlib
import io
import itertools
import os
import random
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass

import numpy as np
import soundfile
import soxr
from tqdm.contrib.concurrent import thread_map

from data import SAMPLE_RATE, load_audio
from runtime.errors import UserError
from tools.compose import write_clip
from tools.corpora import Clip, audio_files, read_paragraphs
from tools.endpoint import TRIES, post_json
from tools.questions import line_of, make_folder, seconds_of, write_lines
from tools.side_files import rows_of
from tools.spoken_questions import (
    INSTRUCTIONS,
    SIMPLE_WORDS,
    SPOKEN_WORDS,
    TEXTS,
    short_questions,
)

ESPEAK_VOICES = ("en-us", "en-gb", "en-gb-scotland", "en-gb-x-rp")
ESPEAK_VARIANTS = ("m1", "m2", "m4", "m5", "m6", "f1", "f3", "f4")
WORDS_A_MINUTE = 150  # espeak-ng's, at speed 1

# ---------------------------------------------------------------------------------------------
# engines


def draw_voice(rng):
    return rng.choice(ESPEAK_VOICES) + "+" + rng.choice(ESPEAK_VARIANTS)


def speak(text, path, voice="en-us", speed=WORDS_A_MINUTE, pitch=50):
    """text -> WAV by espeak-ng; speed in words a minute."""
    if not shutil.which("espeak-ng"):
        raise UserError("espeak-ng is not installed: apt install espeak-ng, or name another engine by --tts")
    command = ["espeak-ng", "-v", voice, "-s", str(speed), "-p", str(pitch), "-w", path, text]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode or not os.path.exists(path):
        raise UserError(f"espeak-ng, voice {voice}, failed: {last_line(done.stderr, done.returncode)}")


def last_line(stderr, status):
    lines = stderr.strip().splitlines()
    return lines[-1] if lines else f"status {status}, no file"


@dataclass(frozen=True)
class Espeak:
    voices: tuple = tuple(f"{voice}+{variant}" for voice in ESPEAK_VOICES for variant in ESPEAK_VARIANTS)

    def say(self, text, path, voice, speed):
        speak(text, path, voice, round(WORDS_A_MINUTE * speed))


@dataclass(frozen=True)
class Command:
    """A program of the user's; {text}, {out}, {voice} or {speaker_wav}, and {speed} in it are replaced."""

    template: str
    voices: tuple = ("",)  # names, or recordings whose voice is to be imitated

    def say(self, text, path, voice, speed):
        values = {
            "{text}": text,
            "{out}": path,
            "{speaker_wav}": voice,
            "{voice}": voice,
            "{speed}": str(speed),
        }
        command = []
        for part in shlex.split(self.template):
            filled = re.sub(r"\{(text|out|speaker_wav|voice|speed)\}", lambda m: values[m[0]], part)
            command.append(filled)
        try:
            done = subprocess.run(command, check=False, capture_output=True, text=True)
        except OSError as e:
            raise UserError(f"--tts-command {command[0]}: cannot be run ({e.strerror})") from None
        if done.returncode or not os.path.exists(path):
            why = last_line(done.stderr, done.returncode)
            raise UserError(f"--tts-command {command[0]} failed: {why}")


@dataclass(frozen=True)
class SpeechEndpoint:
    """An OpenAI-compatible server that speaks: POST URL/audio/speech."""

    url: str  # up to and with its version: http://localhost:8880/v1
    voices: tuple
    model: str = "tts-1"

    def say(self, text, path, voice, speed):
        body = {"model": self.model, "input": text, "voice": voice, "speed": speed, "response_format": "wav"}
        audio = post_json(self.url, "/audio/speech", body, read_wav)
        if audio is None:
            raise UserError(f"{self.url}: gave no WAV that can be read, voice {voice}, in {TRIES} tries")
        write_clip(audio, path)


def read_wav(data):
    """The bytes of a WAV -> samples (n,) at 16 kHz; ValueError for anything else."""
    try:
        audio, rate = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as e:
        raise ValueError(str(e)) from None
    if len(audio) == 0:
        raise ValueError("an empty WAV")
    return soxr.resample(audio.mean(1), rate, SAMPLE_RATE).astype(np.float32)


def choose_engine(url=None, model=None, voices=(), command=None, speakers=None):
    """The engine that the options --tts, --tts-model, --voices, --tts-command and --speakers name."""
    voices = tuple(voices)
    if url and command:
        raise UserError("--tts and --tts-command are two engines: name one")
    if url:
        if not voices:
            raise UserError("--tts needs the names of the server's voices: --voices a,b,c")
        return SpeechEndpoint(url, voices, model or SpeechEndpoint.model)
    if not command:
        return Espeak(voices or Espeak.voices)
    recordings = tuple(audio_files(speakers)) if speakers else ()
    if "{speaker_wav}" in command and not recordings:
        raise UserError("--tts-command wants {speaker_wav}: give a folder of recordings with --speakers")
    if "{voice}" in command and not voices:
        raise UserError("--tts-command wants {voice}: name them with --voices a,b,c")
    return Command(command, recordings or voices or ("",))


def clip_name(voice, text):
    """A clip is named by what is said in it: a changed source finds the clips of no other text."""
    return hashlib.sha1(f"{voice}|{text}".encode()).hexdigest()[:16]


def say_once(engine, path, text, voice, speed):
    """Has `path` spoken unless it is there: 16 kHz, in the format of its suffix, renamed when it is whole."""
    if os.path.exists(path):
        return
    spoken, whole = path + ".spoken.wav", path + ".part" + os.path.splitext(path)[1]
    try:
        engine.say(text, spoken, voice, speed)
        audio, _ = load_audio(spoken)  # an engine may end well and have written nothing that can be read
        write_clip(audio, whole)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(spoken)
    os.replace(whole, path)


def say_all(engine, jobs, workers):
    """Has every clip of jobs {path: (text, voice, speed)} spoken, `workers` at a time."""
    each = list(jobs.items())
    how = {"max_workers": workers, "desc": "speaking", "unit": " clips"}
    thread_map(lambda job: say_once(engine, job[0], *job[1]), each, **how)


# ---------------------------------------------------------------------------------------------
# text questions, answered in text


def speak_questions(corpus, source, out, engine, empathetic=False, limit=None, seed=0, workers=2):
    """A manifest of questions read aloud and answered in text: the paper's second part of stages 2 and 3.

    Returns the number of its lines.
    """
    rng = random.Random(seed)
    to_pair = TEXTS[corpus][1]
    try:
        pairs = [to_pair(row) for row in rows_of(source)]
    except OSError as e:
        raise UserError(f"{source}: cannot be read ({e.strerror})") from None
    except (KeyError, TypeError, AttributeError, ValueError, csv.Error) as e:
        raise UserError(
            f"{source}: not one of {corpus}'s files as published ({type(e).__name__}: {e})"
        ) from None
    pairs = [(q, a) for q, a in pairs if q and a and len(q.split()) <= SPOKEN_WORDS][:limit]
    if not pairs:
        raise UserError(f"{source}: holds no question with an answer that can be spoken")
    folder = os.path.splitext(out)[0] + "_clips"
    make_folder(folder)
    jobs, lines = {}, []
    for question, answer in pairs:
        kind = "simple" if len(answer.split()) <= SIMPLE_WORDS else "complex"
        if empathetic:
            kind = "empathetic"
        voice, speed = rng.choice(engine.voices), round(rng.uniform(0.8, 1.2), 2)
        path = os.path.join(folder, clip_name(voice, question) + ".wav")
        jobs[path] = (question, voice, speed)
        lines.append((path, f"{kind}_qa", rng.choice(INSTRUCTIONS[kind]), answer))
    say_all(engine, jobs, workers)
    return write_lines((line_of(Clip(path, corpus), *rest, out) for path, *rest in lines), out)


# ---------------------------------------------------------------------------------------------
# sentences of books, and short questions


def read_sentences(source, least=4, most=14):
    """Sentences of so many words, none twice, of a .txt or of all in a folder (a paragraph a line)."""
    found = {}
    for paragraph in read_paragraphs(source):
        for sentence in re.split(r"(?<=[.!?])[\"”’']?\s+", paragraph.strip()):
            sentence = re.sub(r"[“”\"_]", "", sentence).replace("’", "'").replace("‘", "'").strip()
            if least <= len(sentence.split()) <= most and re.fullmatch(r"[A-Za-z ,.;:!?'\-]+", sentence):
                found[sentence] = None
    if not found:
        raise UserError(f"{source}: holds no sentence of {least} to {most} words")
    return list(found)


def spoken_jobs(sentences, voices, rng):
    """(text, voice, answer or None) without end of questions before the sentences are used up.

    Three sentences, then a question; both go round the voices, and nothing is said twice by one voice.
    """
    sentences, questions = list(sentences), short_questions()
    rng.shuffle(sentences)
    rng.shuffle(questions)
    asked = 0
    for n, sentence in enumerate(sentences):
        yield sentence, voices[n % len(voices)], None
        if n % 3 == 2 and asked < len(questions) * len(voices):
            turn, at = divmod(asked, len(questions))
            question, answer = questions[at]
            # a voice further at every round, or a question would meet the same voice again
            yield question, voices[(at + turn) % len(voices)], answer
            asked += 1


def speak_sentences(source, out, engine, test_voices=(), limit=None, seed=0, workers=2):
    """Clips beside `out` and their listing there, which the corpus "neural" reads.

    Every fourth clip is a short question with its answer.  Stops after `limit` clips, or when all sentences
    are spoken.  Returns the number of clips, and their hours.
    """
    if not re.fullmatch(r"lines.*\.jsonl", os.path.basename(out)):
        raise UserError(
            f"{out}: must be called lines.jsonl or lines_NAME.jsonl, or the corpus neural does not see it"
        )
    if unknown := set(test_voices) - set(engine.voices):
        raise UserError(f"--test-voices: {', '.join(sorted(unknown))} is none of the voices")
    folder, rows, jobs = os.path.dirname(os.path.abspath(out)), [], {}
    spoken = spoken_jobs(read_sentences(source), engine.voices, random.Random(seed))
    for text, voice, answer in itertools.islice(spoken, limit):
        name = clip_name(voice, text) + ".flac"
        split = "test" if voice in test_voices else "train"
        rows.append({"file": name, "text": text, "voice": voice, "answer": answer, "split": split})
        speed = round(random.Random(text + voice).uniform(0.9, 1.2), 2)
        jobs[os.path.join(folder, name)] = (text, voice, speed)
    make_folder(folder)
    say_all(engine, jobs, workers)
    return write_lines(rows, out), sum(seconds_of(path) or 0.0 for path in jobs) / 3600
