"""Recordings: any format, rate, depth and channel count read as 16 kHz mono, and long ones cut at pauses."""

import math
import os

import numpy as np
import soundfile
import soxr
import torch
from whisper.audio import SAMPLE_RATE

from runtime.errors import UserError

MAX_SECONDS = 1e9  # 30 years: infinity and NaN, which Python's JSON allows, are not below it either


def load_audio(path, offset=0.0, duration=None, limit=None):
    """Reads a clip as 16 kHz mono float32.

    offset, duration: seconds, to read a part; GigaSpeech's clips are parts of recordings of hours, so the
    place is sought and not read up to.  limit: at most this many seconds are returned.
    Returns samples (n,) and notes for the user (clip was cut, clip is silent).  UserError: no recording.
    """
    if not os.path.isfile(path):
        why = "is a folder, not a recording" if os.path.isdir(path) else "no such file"
        raise UserError(f"{path}: {why}")
    if not 0 <= offset < MAX_SECONDS or not 0 <= (duration or 0) < MAX_SECONDS:
        raise UserError(f"{path}: offset {offset} s and duration {duration} s are no part of a clip")
    if os.path.getsize(path) == 0:
        raise UserError(f"{path}: the file is empty")
    try:
        with soundfile.SoundFile(os.fsencode(path)) as f:  # a name need not be UTF-8
            if f.format in ("WAV", "WAVEX") and is_cut_wav(path):
                raise UserError(f"{path}: the file is cut short")
            rate = f.samplerate
            if rate < 1000:  # no recording: at 1 Hz a second file of samples is a day
                raise UserError(f"{path}: has a rate of {rate} Hz")
            start = round(offset * rate)
            available = f.frames - start  # samples of each channel, as are all counts here
            if available < 0:
                raise UserError(f"{path}: offset {offset} s lies behind the end of the clip")
            if duration is not None:
                available = min(available, round(duration * rate))
            wanted = available if limit is None else min(available, math.ceil(limit * rate))
            if wanted > MAX_SECONDS * rate:  # all of a FLAC that was streamed to a pipe
                raise UserError(f"{path}: does not say how long it is")
            f.seek(start)
            audio = f.read(wanted, dtype="float32", always_2d=True)  # (samples, channels)
    # TypeError: .raw has no header; MemoryError: a damaged one claims to be years long
    except (soundfile.LibsndfileError, OSError, TypeError, MemoryError) as e:
        raise UserError(f"{path}: cannot be read as audio ({getattr(e, 'error_string', e)})") from None
    if len(audio) < wanted:
        raise UserError(f"{path}: the file is cut short ({len(audio)} of {wanted} samples)")
    audio = audio.mean(1)
    if rate != SAMPLE_RATE:
        audio = soxr.resample(audio, rate, SAMPLE_RATE)
    if limit is not None:
        audio = audio[: round(limit * SAMPLE_RATE)]
    check_samples(audio, path)
    notes = []
    if wanted < available:
        notes.append(f"{path}: {available / rate:.1f} s long; the first {limit:g} s are used")
    if np.abs(audio).max() < 1e-4:  # -80 dB: below any recording, above the rounding of 16 bits
        notes.append(f"{path}: the clip is silent")
    return audio, notes


def check_samples(audio, name):
    """Raises UserError for what is no 16 kHz mono clip (n,); name: of the clip, for the message."""
    if audio.ndim != 1 or audio.dtype.kind != "f":
        found = f"{audio.dtype} of shape {audio.shape}"
        raise UserError(f"{name}: samples must be floating-point numbers (n,) from -1 to 1, not {found}")
    if len(audio) == 0:  # none in the file, or too few to make one at 16 kHz
        raise UserError(f"{name}: holds no samples at 16 kHz")
    if not np.isfinite(audio).all():  # one NaN makes the whole log-mel NaN, through its maximum
        raise UserError(f"{name}: holds samples that are NaN or infinite")


def as_samples(audio, name):
    """A path, an array or a tensor of 16 kHz samples (n,) -> float32 array (n,), checked."""
    if isinstance(audio, (str, os.PathLike)):
        return load_audio(os.fspath(audio))[0]
    if isinstance(audio, torch.Tensor):
        audio = audio.detach().cpu()
        # numpy has no bf16; integers are refused below
        audio = audio.float().numpy() if audio.is_floating_point() else audio.numpy()
    check_samples(np.asarray(audio), name)
    return np.ascontiguousarray(audio, dtype=np.float32)


def is_cut_wav(path):
    """Whether a RIFF file says that it holds more bytes than it does.

    libsndfile reads what is left of it and says nothing: a broken download would pass for a short clip.
    A program that streams to a pipe cannot know the size and writes 0, or about 2^31 (SoX, arecord) or more.
    """
    with open(path, "rb") as f:
        f.seek(12)  # behind "RIFF", a size and "WAVE" come chunks: four letters, a size, so many bytes
        while len(header := f.read(8)) == 8:
            size = int.from_bytes(header[4:], "little")
            if header[:4] == b"data":  # the samples
                return 0 < size < 0x7FFF0000 and f.tell() + size > os.path.getsize(path)
            f.seek(size + size % 2, os.SEEK_CUR)
    return False


def split_clip(audio, window, quiet=0.3):
    """A clip that may be longer than the window -> [(start, end)], samples, cut at its quietest moments.

    Each piece fits the window, and none but the last is shorter than a quarter of it.  A cut lies in the
    middle of the `quiet` seconds of least energy after that quarter: a pause is worth more than a long piece.
    """
    width = round(quiet * SAMPLE_RATE)
    # running sums, so that the energy of any stretch is one difference; fp64, for the sums grow large
    energy = np.concatenate([[0.0], np.cumsum(np.square(audio, dtype=np.float64))])
    pieces, start = [], 0
    while len(audio) - start > window:
        first, last = start + window // 4, start + window - width  # where the quiet stretch may begin
        loudness = energy[first + width : last + width + 1] - energy[first : last + 1]
        # nothing but digital silence: no pause to find, so the piece is as long as the window allows
        quietest = first + int(loudness.argmin()) if loudness.any() else last
        cut = quietest + width // 2
        pieces.append((start, cut))
        start = cut
    return [*pieces, (start, len(audio))]
