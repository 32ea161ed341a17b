"""The data path, measured: opening a long manifest, the order of an epoch, clips a second.

Every measurement of a manifest runs in a process of its own, so that its memory is its own.
"""

import json
import os
import tempfile
import time

import numpy as np
import soundfile
import soxr
import torch

from data import SAMPLE_RATE, BatchBuilder, encode_question, load_audio, log_mel, window_seconds
from runtime.files import ROOT
from runtime.loading import MicroBatches, Mixture, schedule_of
from tools.measure import SIZES, anonymous_bytes, in_a_process, machine, spread
from weights import load_tokenizer

EPOCH = 8_500_000  # utterances of the paper's stage 1


def write_lines(path, n):
    """n lines of speech recognition, about as long as LibriSpeech's."""
    with open(path, "w", encoding="utf-8") as f:
        for i in range(n):
            text = f"the {i} quick brown foxes jumped over the lazy dogs and read another sentence to them"
            asked = {"role": "user", "content": "<audio>Please transcribe the audio to text."}
            line = {"messages": [asked, {"role": "assistant", "content": text}]}
            line |= {
                "audios": [f"train/{i // 1000}/{i}.flac"],
                "duration": 12.0,
                "dataset": "x",
                "task": "asr",
            }
            f.write(json.dumps(line) + "\n")


def one_opening(path):
    """Opens a manifest and parses a thousand lines of it -> their number, seconds and bytes."""
    before, start = anonymous_bytes(), time.perf_counter()
    manifest = Mixture([path])
    opened = time.perf_counter() - start
    examples = [manifest[i] for i in range(0, len(manifest), max(1, len(manifest) // 1000))]
    in_all, n_bytes = time.perf_counter() - start, anonymous_bytes() - before
    return {"open": opened, "bytes": n_bytes, "parsed": len(examples), "all": in_all}


def clips_a_second(manifest, tokenizer, config, workers, n):
    """Clips that leave the loader in a second, mel included."""
    builder = BatchBuilder(tokenizer, config, encode_question, 0)
    batches = MicroBatches(manifest, builder, 16, 0, 1, 10**9, 0, 0, -(-n // 16))
    loader = torch.utils.data.DataLoader(batches, batch_size=None, num_workers=workers)
    start, done = time.perf_counter(), 0
    for micro in loader:
        done += len(micro["ids"])
    return done / (time.perf_counter() - start)


def data_bench(args):
    print(f"{machine('cpu')}, torch {torch.__version__}, {args.lines:,} synthetic lines\n")
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "m.jsonl")
        write_lines(path, args.lines)
        size = os.path.getsize(path) / 1e6
        built, again = in_a_process(one_opening, path), in_a_process(one_opening, path)
        print(f"manifest of {size:.0f} MB: index built in {built['open']:.1f} s;", end=" ")
        print(f"opened again in {again['open']:.2f} s and {again['bytes'] / 1e6:.0f} MB of memory")
        print(f"{again['parsed']} lines parsed all over it: {again['all'] - again['open']:.3f} s\n")

        before, start = anonymous_bytes(), time.perf_counter()
        schedule = schedule_of([(EPOCH, 1.0)], 1280, 0, start=EPOCH // 1280 // 2)
        next(schedule)
        seconds = time.perf_counter() - start
        print(f"order of an epoch of {EPOCH:,}, from its middle: {seconds:.2f} s,", end=" ")
        print(f"{(anonymous_bytes() - before) / 1e6:.0f} MB\n")

        rng, clips = np.random.default_rng(0), os.path.join(folder, "clips.jsonl")
        with open(clips, "w", encoding="utf-8") as f:
            for i in range(args.clips):
                noise = rng.uniform(-0.3, 0.3, 12 * SAMPLE_RATE)
                soundfile.write(os.path.join(folder, f"{i}.flac"), noise, SAMPLE_RATE)
                line = {"audio_filepath": f"{i}.flac", "text": "one two three", "duration": 12.0}
                f.write(json.dumps(line) + "\n")
        config = SIZES["diffa2"]
        torch.set_num_threads(1)
        start = time.perf_counter()
        audios = [load_audio(os.path.join(folder, f"{i}.flac"))[0] for i in range(args.clips)]
        middle = time.perf_counter()
        for audio in audios:
            log_mel(audio[: round(window_seconds(config) * SAMPLE_RATE)], config)
        ended = time.perf_counter()
        read, mel = (middle - start) / args.clips, (ended - middle) / args.clips
        other_rate = np.resize(audios[0], 12 * 44_100)
        start = time.perf_counter()
        for _ in range(args.clips):
            soxr.resample(other_rate, 44_100, SAMPLE_RATE)
        resampled = (time.perf_counter() - start) / args.clips
        print(f"a clip of 12 s, FLAC, one thread: decoded in {1e3 * read:.1f} ms, log-mel {1e3 * mel:.1f} ms")
        print(f"at 44.1 kHz, as some are, resampling takes {1e3 * resampled:.1f} ms more")
        tokenizer = load_tokenizer(os.path.join(ROOT, "assets", "tiny"))
        tiny = SIZES["tiny"].with_tokenizer(tokenizer)
        manifest = Mixture([clips])
        for workers in (0, 1, 2):
            rates = [clips_a_second(manifest, tokenizer, tiny, workers, args.clips) for _ in range(3)]
            print(
                f"--workers {workers}: {spread(rates, '{:.0f}')} clips a second (10 s windows, 80 mel bands)"
            )
