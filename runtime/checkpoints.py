"""Checkpoints of a stage that is running: what trains, the optimizers, random states.

These are for --resume alone and go when the stage is done (the model itself is saved by weights.save).  They
are torch's own format, for an optimizer's state is no flat list of tensors; read back with weights_only=True
they are data all the same.
"""

import os
import re
from concurrent.futures import ThreadPoolExecutor

import torch

from runtime.errors import UserError, first_line
from runtime.files import write_file

KEEP = 2  # the last ones: should a disk lose the newest, the one before goes on from a little earlier


def write_state(state, out, step):
    """Writes out/state-STEP.pt and drops all but the last KEEP.

    Whatever moment the process dies at, a whole checkpoint is there: the old ones go only after the new
    one has its name.  Raises UserError when the disk is full; the older checkpoints stay.
    """

    def write(path):
        with open(path, "wb") as f:
            torch.save(state, f)

    try:
        # seven digits, so that the order of names is the order of steps
        write_file(os.path.join(out, f"state-{step:07}.pt"), write)
    except UserError as e:
        raise UserError(f"{e}; older checkpoints are kept") from None
    for old in list_states(out)[:-KEEP]:
        os.remove(old)


def in_memory(thing):
    """A copy, on the CPU, of the tensors in dicts and lists: training goes on changing the originals.

    Without it the file would hold some tensors of this step and some of the next ones.
    """
    if torch.is_tensor(thing):
        return thing.detach().to("cpu", copy=True)
    if isinstance(thing, dict):
        return {key: in_memory(value) for key, value in thing.items()}
    if isinstance(thing, (list, tuple)):
        return type(thing)(in_memory(value) for value in thing)
    return thing


class StateWriter:
    """write_state in a thread: training waits for a copy in memory, not for the disk.

    In stage 3 of diffa2 it is 1.2 GB (99 million parameters in fp32, and AdamW's two moments of each).  One
    thread and one checkpoint at a time: a slow disk holds training up sooner than it fills the memory.
    """

    def __init__(self, out):
        self.out, self.thread, self.last = out, ThreadPoolExecutor(1), None

    def write(self, state, step):
        self.wait()
        self.last = self.thread.submit(write_state, in_memory(state), self.out, step)

    def wait(self):
        """Until the last checkpoint is on the disk.  What went wrong with it is raised here."""
        if self.last is not None:
            self.last.result()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.thread.shutdown()


def list_states(out):
    """Checkpoints in `out`, oldest first."""
    names = sorted(os.listdir(out)) if os.path.isdir(out) else []
    return [os.path.join(out, name) for name in names if re.fullmatch(r"state-\d{7}\.pt", name)]


def remove_run(out):
    """Removes what a run has left in `out`: were its model to stay, the next stage could start from that."""
    old = [os.path.join(out, name) for name in ("model.safetensors", "skipped.jsonl")]
    for path in list_states(out) + old:
        if os.path.exists(path):
            os.remove(path)


def read_state(path):
    """What write_state wrote, its tensors on the CPU: the run may go on on another GPU."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not (state.get("finished") or state.keys() >= {"step", "trained", "optimizers", "random"}):
            raise ValueError("parts are missing")
        return state
    except Exception as e:  # a damaged file fails in as many ways as it has bytes
        raise UserError(f"{path}: not a checkpoint of a running stage ({first_line(e)})") from None
