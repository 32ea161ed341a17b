"""What the measurements share: sizes of models, a clock, the peak of memory, the naive forward pass."""

import multiprocessing
import statistics
import threading
import time
from concurrent.futures import ProcessPoolExecutor

import torch

from model import PRESETS, Config, splice_order

SIZES = PRESETS | {  # beside the presets: the real vocabulary on backbones that a CPU can run
    "wide": Config(  # and the real window
        n_mels=80,
        audio_width=384,
        audio_heads=6,
        audio_layers=4,
        taps=(1, 2, 3, 4),
        qformer_ffn=1536,
        width=512,
        layers=6,
        heads=8,
        ffn=1536,
    ),
    "mid": Config(  # 0.4 billion parameters
        n_mels=80,
        n_frames=500,
        audio_width=192,
        audio_heads=4,
        audio_layers=4,
        taps=(1, 2, 3, 4),
        qformer_ffn=768,
        width=1024,
        layers=12,
        heads=16,
        ffn=3072,
        lora_rank=0,
    ),
}


class Peak:
    """Samples this process's memory while a block runs.

    bytes: the most of its anonymous memory (mapped files are not counted); resident: of all that it holds.
    """

    def __enter__(self):
        self.bytes, self.resident, self.done = 0, 0, threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()
        return self

    def watch(self):
        while not self.done.wait(0.02):
            self.sample()

    def sample(self):
        self.bytes = max(self.bytes, anonymous_bytes())
        self.resident = max(self.resident, resident_bytes())

    def __exit__(self, *error):
        self.done.set()
        self.thread.join()
        self.sample()

    def words(self):
        anonymous, everything = self.bytes / 1e9, self.resident / 1e9
        return f"peak memory: anonymous {anonymous:.2f} GB, with mapped files {everything:.2f} GB"


def status_bytes(name):
    """A line of the kernel's account of this process."""
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith(name))


def anonymous_bytes():
    return status_bytes("RssAnon:")


def resident_bytes():
    return status_bytes("VmRSS:")


def bandwidth(device, n=1 << 28, times=5):
    """Bytes a second at which this machine reads a gigabyte of memory: the best of `times` sums."""
    x, best = torch.ones(n, device=device), float("inf")
    for _ in range(times):
        best = min(best, seconds_of(lambda: x.sum(), device))
    return x.nbytes / best


def seconds_of(work, device):
    """Seconds that work() takes, its kernels included."""
    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


def in_a_process(work, *args):
    """What work(*args) returns in a new process, whose memory is its own.  Its errors are raised here."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *args).result()


class Laps:
    """An on_step that keeps the seconds between network calls; the first call's from the start of the run."""

    def __init__(self, device):
        self.seconds, self.device, self.last = [], torch.device(device), time.perf_counter()

    def __call__(self, *_):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds.append(now - self.last)
        self.last = now


def spread(values, form="{:.2f}"):
    """Median (least - most)."""
    middle = form.format(statistics.median(values))
    if len(values) == 1:
        return middle
    return f"{middle} ({form.format(min(values))} - {form.format(max(values))})"


def machine(device):
    """What the numbers were measured on, in words."""
    if (device or "").startswith("cuda"):
        return torch.cuda.get_device_name()
    return f"{torch.get_num_threads()} CPU threads"


def everywhere(model, noisy, text, audio, is_audio):
    """The naive forward pass: logits (B, T + A, vocab) in fp32 at every position, and the splice's order.

    order (B, T + A): where each column comes from, as an index into [text | audio].
    """
    order = splice_order(noisy.size(1), audio.size(1), text["audio_at"])
    x = torch.cat([model.backbone.wte(noisy), audio], 1)
    x = x.gather(1, order[:, :, None].expand(-1, -1, x.size(2)))
    valid = torch.cat([text["valid"], is_audio], 1).gather(1, order)
    return model.backbone.ff_out(model.backbone(x, valid)).float(), order
