"""A file is whole or not there: atomic writes."""

import os

from safetensors import SafetensorError

from runtime.errors import UserError, first_line


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
