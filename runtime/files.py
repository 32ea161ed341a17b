"""Files: written whole or not at all, and weights opened as data, never as code."""

import hashlib
import json
import os
import pickle

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from runtime.errors import UserError, first_line

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # where this project lies


def check_out(path):
    """Refuses the name of a folder, a pipe or a device: a finished file is renamed, and would replace it."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f"{path}: cannot be written (it is there, and no regular file)")


def write_file(path, write):
    """write(temporary name), then syncs and renames: a reader finds the old file or the new, no half one.

    The order matters.  A rename is atomic, but a file system may do it before the data are on the disk: after
    a power cut the name would stand on an empty file.  Hence the sync before it.  The temporary name lies in
    the same folder, for nothing can be renamed from one disk to another, and begins with a dot, so that no
    pattern for finished files finds it after a kill.

    Raises UserError when it cannot be written, with what was there before still there.
    """
    check_out(path)
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f".{name}.tmp")
    try:
        os.makedirs(folder or ".", exist_ok=True)
        write(temporary)
        sync(temporary)
        os.replace(temporary, path)
        sync(folder or ".")  # the new name itself, which is an entry of the folder
    except (OSError, SafetensorError, RuntimeError, ValueError) as e:  # torch's RuntimeError: a full disk
        why = getattr(e, "strerror", None) or first_line(e)
        raise UserError(f"{folder or '.'}: cannot be written ({why})") from None
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def sync(path):
    """Waits until a file or a folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ---------------------------------------------------------------------------------------------
# weights.  Files are mapped: the operating system reads a page when a number in it is looked at, and may drop
# it again.  What goes to a GPU then never fills the computer's own memory, and what stays on the CPU in the
# type of the file takes none beside the disk's cache.


def open_safetensors(path):
    try:
        return safe_open(path, "pt", device="cpu")
    except (SafetensorError, OSError) as e:
        raise UserError(f"{path}: cut short or not a safetensors file ({e})") from None


def open_pickle(path):
    """A .bin or .pt of tensors, mapped; anything in it that is not data is refused (weights_only).

    These files come from strangers, and an ordinary unpickler calls whatever function they name.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as e:
        raise UserError(f"{path}: holds code or objects, and is not opened ({first_line(e)})") from None
    except Exception as e:  # a damaged pickle may raise anything
        raise UserError(f"{path}: cut short or not a file of weights ({first_line(e)})") from None


def fingerprint(module, with_lora=False):
    """What tells one set of weights from another: 16 hexadecimal digits.

    A hash of the first 256 numbers of each tensor: 16 GB would take long to read, and no training leaves the
    beginning of every tensor as it was.  In bf16, so that it is the same for every file format and
    precision that the weights were read from.
    """
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        if with_lora or "lora_" not in name:  # LoRA is no part of the backbone that it was trained beside
            digest.update(name.encode())
            # as 16-bit integers: numpy has no bf16
            digest.update(value.flatten()[:256].to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def save_sorted(weights, path, metadata):
    """safetensors' save_file, but equal models give equal bytes, so that a SHA-256 can stand on a card.

    The library keeps metadata in a hash map and writes it in another order in each process.  The sorted
    header has the same length, and spaces may follow it: it takes the place of the one that was written.
    """
    save_file(weights, path, metadata=metadata)
    with open(path, "r+b") as f:
        size = int.from_bytes(f.read(8), "little")
        header = json.loads(f.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        assert len(text) <= size, "a header written another way than safetensors does"
        f.seek(8)
        f.write(text.ljust(size))
