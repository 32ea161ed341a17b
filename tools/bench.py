"""Speed and memory, measured.

    python -m tools.bench fullsize DIR       dress rehearsal of diffa2 with random weights (20 GB of disk)
    python -m tools.bench fullsize DIR --int8          the same with matrices in int8
    python -m tools.bench fullsize DIR --device cuda
    python -m tools.bench int8               one matrix in int8 beside bf16: time and error
    python -m tools.bench train              a training step of each stage beside a naive one
    python -m tools.bench data               a manifest of a million lines, an epoch's order, clips a second
    python -m tools.bench page               the web page beside `ask`
    python -m tools.bench decode             decoding beside a naive reference, 12-layer 1024-wide backbone
    python -m tools.bench decode --data data/test.jsonl      as many tokens a call as on real recordings

What is measured, and how: fullsize.py, bench_train.py, bench_data.py, bench_int8.py, bench_page.py,
bench_decode.py.
"""

import sys

from runtime.errors import Parser, exit_status, number
from runtime.processes import pick_device
from tools.bench_data import data_bench
from tools.bench_decode import decode_bench
from tools.bench_int8 import int8_bench
from tools.bench_page import page_bench
from tools.bench_train import train_bench
from tools.fullsize import fullsize
from tools.measure import SIZES


def main(argv=None):
    parser = Parser(prog="python -m tools.bench", description=__doc__)
    positive = number(int, 1)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    p = commands.add_parser("fullsize", help="diffa2 with random weights: shapes, memory, speed")
    p.set_defaults(run=lambda args: fullsize(args.folder, args.device, args.int8))
    p.add_argument("folder", help="where the weights lie as long as it runs")
    p.add_argument("--device")
    p.add_argument("--int8", action="store_true", help="as in decode.py")
    p = commands.add_parser("int8", help="a matrix in int8 beside bf16")
    p.set_defaults(run=lambda args: int8_bench(args.device, args.size, args.repeats))
    p.add_argument("--size", type=positive, default=4096, help="inputs and outputs")
    p.add_argument("--repeats", type=positive, default=40)
    p.add_argument("--device")
    p = commands.add_parser("train", help="training steps of every stage beside naive ones")
    p.set_defaults(run=train_bench)
    p.add_argument("--size", default="wide", choices=sorted(SIZES))
    p.add_argument("--stages", type=int, nargs="+", default=[1, 2, 3, 4], choices=(1, 2, 3, 4))
    p.add_argument("--batch", type=positive, default=4)
    p.add_argument("--repeats", type=positive, default=3)
    p.add_argument("--recompute", action="store_true", help="activation checkpointing in ours")
    p.add_argument("--precision", choices=("bf16", "fp32"), help="of ours; default as in train.py")
    p.add_argument("--device")
    p = commands.add_parser("data", help="the data path of a long run")
    p.set_defaults(run=data_bench)
    p.add_argument("--lines", type=positive, default=1_000_000, help="of the synthetic manifest")
    p.add_argument("--clips", type=positive, default=64, help="of 12 s")
    p = commands.add_parser("page", help="the web page beside `ask`")
    p.set_defaults(run=page_bench)
    p.add_argument("--model", default="tiny")
    p.add_argument("--port", type=int, default=7860)
    p.add_argument("--repeats", type=positive, default=10)
    p = commands.add_parser("decode", help="decoding beside a naive reference")
    p.set_defaults(run=decode_bench)
    p.add_argument("--size", default="mid", choices=sorted(SIZES))
    types = ("float32", "bfloat16", "float16")
    p.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=types)
    p.add_argument("--repeats", type=positive, default=3)
    p.add_argument("--model", default="tiny", help="the small model, for the number of tokens kept")
    p.add_argument("--data", help="manifest of real recordings")
    p.add_argument("--limit", type=positive, default=100, help="recordings")
    p.add_argument("--device")

    def start():
        args = parser.parse_args(argv)
        if getattr(args, "device", None):
            pick_device(args.device)
        args.run(args)

    return exit_status("bench", start)


if __name__ == "__main__":
    sys.exit(main())
