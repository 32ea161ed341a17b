"""The variables in a file of CTranslate2's, the engine of faster-whisper: it gives no tensors out itself."""

import math
import os
import struct

import torch

from runtime.errors import UserError
from runtime.names import once, whisper_name


def read_variables(path):
    """The encoder's tensors in the model.bin of a Whisper: [(CTranslate2's name, tensor)].  UserError."""
    try:
        with open(path, "rb") as f:
            return parse(f, path)
    except struct.error:
        raise UserError(f"{path}: cut short, or not a file of CTranslate2's") from None
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror})") from None


def parse(f, path):
    """read_variables of an open file.  struct.error: it ends too early.

    The file is little-endian: version, name and revision of the model's kind, number of variables; each
    variable's name, rank, sizes, type, bytes, data; then aliases, other names for the same data.  Nothing
    follows.  Of the decoder only the headers are read.
    """

    def read(code):
        layout = struct.Struct("<" + code)
        return layout.unpack(f.read(layout.size))[0]

    def read_string():
        return read(f"{read('H')}s").rstrip(b"\0").decode(errors="replace")

    version = read("I")
    if version != 6:
        raise UserError(f"{path}: not version 6 of CTranslate2's format (it begins with {version})")
    kind = read_string()
    if kind != "WhisperSpec":
        raise UserError(f"{path}: holds a {kind[:40]!r}, not a WhisperSpec")
    read("I")  # revision
    named = []
    for _ in range(read("I")):
        name = read_string()
        shape = [read("I") for _ in range(read("B"))]
        dtype, n = read("B"), read("I")  # n bytes of data
        is_scalar = not shape  # settings, such as the number of heads
        if is_scalar or not name.startswith("encoder/") or name == "encoder/position_encodings/encodings":
            f.seek(n, os.SEEK_CUR)
            continue
        # other types are integers, whose scales lie in variables of their own
        dtypes = {0: torch.float32, 4: torch.float16, 5: torch.bfloat16}
        if dtype not in dtypes:
            how = "convert the model with --quantization float16"
            raise UserError(f"{path}: {name} is of type {dtype}, quantised or unknown; {how}")
        if n == 0 or n != math.prod(shape) * dtypes[dtype].itemsize:
            raise UserError(f"{path}: {name} has {n} bytes for the shape {tuple(shape)}")
        data = bytearray(read(f"{n}s"))  # a tensor wants memory that may be written to
        named.append((name, torch.frombuffer(data, dtype=dtypes[dtype]).view(shape)))
    for _ in range(2 * read("I")):
        read_string()
    n_more = len(f.read())
    if n_more:
        raise UserError(f"{path}: {n_more} bytes follow the last alias")
    return named


def read_encoder(path):
    """The encoder in the model.bin of a Whisper -> {our name: tensor}.  Raises UserError."""
    weights = once(((whisper_name(name), value) for name, value in read_variables(path)), path)
    for name in [key for key in weights if key and ".attn.qkv." in key]:
        stacked = weights.pop(name)  # (3 * width, width), or a bias (3 * width,)
        if len(stacked) % 3:
            raise UserError(f"{path}: {name} has {len(stacked)} rows, which are not q, k and v")
        for part, value in zip(("query", "key", "value"), stacked.chunk(3), strict=True):
            weights[name.replace("qkv", part)] = value.clone()
        # Whisper's keys have no bias (it would add the same to all scores of a query, and softmax takes that
        # out again): the stack holds zeros in its place
        if name.endswith(".bias") and weights.pop(name.replace("qkv", "key")).any():
            raise UserError(f"{path}: {name} has a bias for the keys, which Whisper has not")
    return weights
