"""How the shipped encoder was made, from Whisper tiny.en in any format that weights.py reads.

python -m tools.encoder --whisper FILE --out assets/whisper-tiny.en
"""

import hashlib
import os
import sys

import torch

from model import DIFFA2, PRESETS
from runtime.errors import Parser, exit_status
from runtime.files import save_sorted, write_file
from runtime.names import whisper_file
from weights import load_whisper


def export_encoder(whisper, folder):
    """Writes folder/encoder.safetensors: the encoder of preset tiny in fp16, the type that it was found in.

    The header names the source; the same source gives the same bytes.  Returns both files' SHA-256, for
    the card: a reader can check where the shipped encoder is from.
    """
    whisper = whisper_file(whisper)
    with torch.device("meta"):
        model = DIFFA2(PRESETS["tiny"])
    load_whisper(model, whisper, torch.device("cpu"))
    weights = {k: v.half().contiguous() for k, v in model.state_dict().items() if k.startswith("encoder.")}
    source = {"source": os.path.basename(whisper), "source_sha256": sha256(whisper)}
    path = os.path.join(folder, "encoder.safetensors")
    write_file(path, lambda temporary: save_sorted(weights, temporary, source))
    return source["source_sha256"], sha256(path)


def sha256(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def main(argv=None):
    parser = Parser(prog="tools.encoder", description="Whisper tiny.en's encoder as preset tiny reads it.")
    parser.add_argument("--whisper", required=True, help="tiny.en: .pt, .safetensors or model.bin")
    parser.add_argument("--out", required=True, metavar="DIR", help="where encoder.safetensors is written")

    def run():
        args = parser.parse_args(argv)
        source, result = export_encoder(args.whisper, args.out)
        print(f"{source}  {args.whisper}\n{result}  {os.path.join(args.out, 'encoder.safetensors')}")

    return exit_status("tools.encoder", run)


if __name__ == "__main__":
    sys.exit(main())
