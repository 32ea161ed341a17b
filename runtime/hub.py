"""Where the released models' parts are published, and how they come from there."""

import contextlib
import glob
import os
import sys

from huggingface_hub import snapshot_download

from runtime.errors import UserError, first_line

# preset -> where its three parts lie, and their GB, told without a network; GB of memory that asking takes
RELEASES = {
    "diffa2": {
        "llada": ("GSAI-ML/LLaDA-8B-Instruct", 16.0),
        "whisper": ("openai/whisper-large-v3", 3.1),
        "diffa": ("zhoujiaming777/DIFFA-2", 0.4),
        "memory": 20,
    },
    "diffa1": {
        "llada": ("GSAI-ML/LLaDA-8B-Instruct", 16.0),
        "whisper": ("openai/whisper-small", 1.0),
        "diffa": ("zhoujiaming777/DIFFA", 0.15),
        "memory": 17,
    },
}
PATTERNS = {  # files of each repository that are needed: the hub has the same weights in other formats too
    "llada": ["*.safetensors", "model.safetensors.index.json", "config.json", "tokenizer.json"],
    "whisper": ["model.safetensors"],
    "diffa": ["pytorch_model.bin"],
}


def fetch(name, stage=None, llada=None, whisper=None, diffa=None, adapters=True):
    """Paths of LLaDA's folder, Whisper's file or folder, DIFFA's file: those given, else the hub's.

    adapters=False: LLaDA and Whisper alone, for training from the start; the third path is None.
    Says what it will download and what the model needs before it starts: not every disk has room for
    19.5 GB.  What lies in the hub's cache already is found without a network.
    """
    if stage == 1 and name == "diffa1":
        raise UserError("DIFFA-1 was released after its last stage only")
    # DIFFA-2's root is the model after stage 4; that after stage 1 has a folder of its own
    patterns = PATTERNS | ({"diffa": ["stage1/pytorch_model.bin"]} if stage == 1 else {})
    release = RELEASES[name]
    found = {"llada": llada, "whisper": whisper} | ({"diffa": diffa} if adapters else {})
    for part, path in found.items():
        if path is not None:
            if not os.path.exists(path):
                raise UserError(f"--{part} {path}: no such file or folder")
            continue
        with contextlib.suppress(OSError, ValueError):  # not in the cache
            folder = snapshot_download(release[part][0], allow_patterns=patterns[part], local_files_only=True)
            # the cache holds a folder from its first file on, or with another stage's files alone
            if all(glob.glob(os.path.join(folder, p)) for p in patterns[part]):
                found[part] = folder
    missing = [part for part, path in found.items() if path is None]
    size = sum(release[part][1] for part in missing)
    download = f"{size:.1f} GB to download, " if missing else ""
    print(f"{name}: {download}asking it takes about {release['memory']} GB of memory", file=sys.stderr)
    for part in missing:
        try:
            found[part] = snapshot_download(release[part][0], allow_patterns=patterns[part])
        except Exception as e:  # the hub's errors, the network's, the disk's: all of them end here
            what = f"{release[part][0]} cannot be downloaded ({first_line(e)})"
            raise UserError(f"{what}; give --{part} instead") from None
    if adapters and os.path.isdir(found["diffa"]):
        found["diffa"] = os.path.join(found["diffa"], patterns["diffa"][0])
    return found["llada"], found["whisper"], found.get("diffa")
