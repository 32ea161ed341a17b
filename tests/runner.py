"""Runs train.main on a preset small enough for tests; started by test_train.py in processes of their own.

python runner.py JOBS.json          one list of arguments after the other, in every rank
python runner.py JOBS.json PHASES   the same, telling PHASES (a pipe) what a save is doing, slowly
"""

import json
import os
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch

import model
import train
from runtime import checkpoints

# here, for the imports of conftest.py would take each process five seconds
SMALL = model.Config(
    n_mels=80,
    n_frames=100,
    audio_width=16,
    audio_heads=2,
    audio_layers=3,
    taps=(0, 2, 3),
    qformer_ffn=24,
    n_queries=5,
    n_soft_prompts=4,
    vocab=320,
    width=32,
    layers=2,
    heads=2,
    ffn=48,
    rope_theta=10000.0,
    context=512,
    lora_rank=4,
)

# the stages of `tiny` in their order and kinds, a few steps of a few examples
SMALL_STAGES = {
    # a small rate: Muon makes directions that are all rounding as long as the others, and no two runs
    # would be alike
    0: train.Stage(("backbone.",), 1e-5, 6, 2, steps=20, is_imitated=True, least_t=0.2, muon=True),
    1: train.Stage(("semantic.", "soft_prompts"), 1e-3, 7, 2, steps=20, ctc=0.5, augment=True),
    2: train.Stage(train.ADAPTERS, 1e-3, 7, 2, steps=20, augment=True),
    3: train.Stage((*train.ADAPTERS, "lora"), 1e-3, 7, 2, steps=20, augment=True),
    4: train.Stage((*train.ADAPTERS, "lora"), 1e-3, 3, 2, steps=20, loss=train.VRPO, augment=True),
}


def install():
    model.PRESETS["small"] = SMALL
    train.STAGES["small"] = SMALL_STAGES
    torch.set_num_threads(1)


def slow_saves(pipe):
    """Wraps the calls that a save consists of.

    Each tells the pipe that it has begun, waits, and is really made.
    """
    out = open(pipe, "w", buffering=1)  # noqa: SIM115 - open as long as the process lives

    def tell(what, call, wanted=lambda *_: True):
        def told(*args, **kwargs):
            if wanted(*args):
                out.write(what + "\n")
                time.sleep(0.03)
            return call(*args, **kwargs)

        return told

    real_open = open

    class Halting:
        """A file that pauses half-way through what is written to it."""

        def __init__(self, file):
            self.file, self.n = file, 0

        def write(self, data):
            self.n += 1
            if self.n % 40 == 3:
                out.write("write\n")
                time.sleep(0.03)
            return self.file.write(data)

        def __getattr__(self, name):
            return getattr(self.file, name)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

    checkpoints.open = lambda path, mode="r", **kw: (
        Halting(real_open(path, mode, **kw)) if str(path).endswith(".pt.tmp") else real_open(path, mode, **kw)
    )
    os.fsync = tell("sync", os.fsync)
    os.replace = tell("rename", os.replace, lambda path, *_: str(path).endswith(".pt.tmp"))


if __name__ == "__main__":
    install()
    with open(sys.argv[1]) as f:
        jobs = json.load(f)
    if len(sys.argv) > 2:
        slow_saves(sys.argv[2])
    if "WORLD_SIZE" in os.environ:
        torch.distributed.init_process_group("gloo")  # once: every list of arguments uses it
    code = 0
    for argv in jobs:
        code = code or train.main(argv)
    if "WORLD_SIZE" in os.environ:
        torch.distributed.destroy_process_group()
    train.exit_process(code)
