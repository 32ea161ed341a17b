"""Checkpoints of a stage that is running: what trains, the optimizers, random states.

These are for --resume alone and go when the stage is done (the model itself is saved by weights.save).  They
are torch's own format, for an optimizer's state is no flat list of tensors; read back with weights_only=True
they are data all the same.
"""

import glob
import os
import re
from concurrent.futures import ThreadPoolExecutor

import torch

from runtime.errors import UserError, first_line, tell
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
    # and what a process that was killed while it wrote has left half
    for old in list_states(out)[:-KEEP] + glob.glob(os.path.join(glob.escape(out), ".state-*.tmp")):
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
        self.out, self.thread = out, ThreadPoolExecutor(1)
        self.last = self.copy = None  # the write that is going on, and what it writes

    def write(self, state, step):
        self.wait()
        self.copy = in_memory(state), self.out, step
        self.last = self.thread.submit(write_state, *self.copy)

    def wait(self):
        """Until the last checkpoint is on the disk.  Where that failed, it is tried once more (UserError)."""
        if self.last is not None:
            try:
                self.last.result()
            except UserError as e:  # there may be room again
                tell(f"{e}; trying again")
                write_state(*self.copy)
            self.last = self.copy = None

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.thread.shutdown()


def snapshot(trained, optimizers, reference, group):
    """What training has changed by now, as `restore` puts it back: tensors, numbers and lists alone."""
    is_cuda = group.device.type == "cuda"
    return {
        "trained": {name: p.detach() for name, p in trained.items()},
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],  # the moments
        "reference": list(reference),  # nobody else has it: the policy has moved away
        "random": group.gather(torch.get_rng_state()),  # dropout, rank by rank
        "random_cuda": group.gather(torch.cuda.get_rng_state(group.device)) if is_cuda else [],
    }


def restore(state, trained, optimizers, group):
    """Puts back what `snapshot` took, into the same tensors; returns the reference."""
    for name, p in trained.items():
        p.data.copy_(state["trained"][name])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        # learning rate and weight decay are this command line's, not the checkpoint's
        optimizer.load_state_dict(saved | {"param_groups": optimizer.state_dict()["param_groups"]})
    reference = tuple(r.to(group.device, copy=True) for r in state["reference"])
    if len(state["random"]) == group.size:  # with another number of processes dropout starts anew
        torch.set_rng_state(state["random"][group.rank])
        if group.device.type == "cuda" and state["random_cuda"]:
            torch.cuda.set_rng_state(state["random_cuda"][group.rank], group.device)
    state.clear()  # all of it was copied: 1.2 GB of diffa2
    return reference


def list_states(out):
    """Checkpoints in `out`, oldest first."""
    names = sorted(os.listdir(out)) if os.path.isdir(out) else []
    return [os.path.join(out, name) for name in names if re.fullmatch(r"state-\d{7}\.pt", name)]


def state_to_go_on_from(out, group, resume, restart):
    """The last whole checkpoint in `out`, or None where a run begins.

    Without --resume or --restart a run is neither continued nor overwritten (UserError).
    """
    old = group.first_only(lambda: list_states(out))  # the same on every rank, after any wait
    if old and not (resume or restart):
        how = "--resume goes on with it, --restart begins anew, --out writes elsewhere"
        raise UserError(f"{out}: holds a run already; {how}")
    if not old or restart:
        return None

    found = {}  # path -> state, on rank 0: 1.2 GB are read once

    def last_whole():
        damaged = []
        for path in reversed(old):
            try:
                found[path] = read_state(path)
            except UserError as e:  # a disk may have lost it, and not the one before
                tell(e)
                damaged.append(path)
                continue
            for newer in damaged:  # the run takes another way now: they must not count as its last ones
                os.rename(newer, f"{newer}.bad")
            return path
        raise UserError(f"{out}: no checkpoint can be read")

    path = group.first_only(last_whole)
    return found.get(path) or read_state(path)


def check_same_run(state, run, out):
    """UserError where the run that `state` (or None) is of is not this one; both say what makes a run."""
    for name, was in (state or {}).get("run", {}).items():
        if was != run[name]:
            raise UserError(f"{out}: the run that --resume goes on with has {name} {was}, not {run[name]}")


def mark_finished(out, step):
    """A mark that the stage is done takes the place of its checkpoints."""
    write_state({"finished": True}, out, step + 1)
    for path in list_states(out)[:-1]:
        os.remove(path)


def remove_run(out):
    """Removes what a run has left in `out`: were its model to stay, the next stage could start from that."""
    old = [os.path.join(out, name) for name in ("model.safetensors", "skipped.jsonl")]
    old += glob.glob(os.path.join(glob.escape(out), "state-*.pt.bad"))
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
