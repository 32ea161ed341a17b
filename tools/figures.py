"""Pictures by command.

    python -m tools.figures all                                        # the first three below
    python -m tools.figures stages                                     # assets/stages.svg, from train.STAGES
    python -m tools.figures answer assets/demo/digits.wav "What is said?"   # assets/answer.svg, animated
    python -m tools.figures heatmap assets/demo/digits.wav "What is said?" --steps 16   # assets/heatmap.png
    python -m tools.figures curves out/tiny/stage1 out/tiny/stage2     # logged losses -> curves.png
    python -m tools.figures accuracy f1.json s16.json             # outputs of tools.evaluate -> accuracy.png

`answer` and `heatmap` are real runs: every network call is a frame or a row, a word's shade is the confidence
it was kept with.  The picture of the web page is left by its test, see tests/test_demo.py.
"""

import html
import json
import os
import sys

from adapters import merge_lora
from data import load_audio, window_seconds
from decode import ask
from runtime.errors import Parser, UserError, exit_status
from runtime.files import write_file
from tools.benchmarks import wilson
from train import STAGES, VRPO
from weights import load

# ---------------------------------------------------------------------------------------------
# matplotlib's


def new_figure(width, height):
    """An empty figure, inches; matplotlib takes a second to import, and nothing else needs it."""
    from matplotlib.figure import Figure

    return Figure((width, height), layout="constrained")


def save_figure(fig, path, dpi):
    """A figure as a PNG."""
    write_file(path, lambda temporary: fig.savefig(temporary, format="png", dpi=dpi))
    print(f"{path}: written")


def smooth(values, decay):
    """A running mean that forgets: decay 0 leaves the values as they are."""
    curve = []
    for value in values:
        curve.append(decay * curve[-1] + (1 - decay) * value if curve else value)
    return curve


def curves(folders, path):
    """Draws the logged loss, smoothed, and the held-out loss of one or several runs."""
    runs = {}
    for folder in folders:
        log = os.path.join(folder, "log.jsonl")
        if not os.path.exists(log):
            raise UserError(f"{folder}: no log.jsonl; train.py writes one there")
        try:
            with open(log, encoding="utf-8") as f:  # a kill leaves half a line
                runs[folder] = [json.loads(line) for line in f if line.endswith("\n")]
        except ValueError as e:
            raise UserError(f"{log}: a line is not JSON ({e})") from None
    fig = new_figure(11, 4)
    axes = fig.subplots(1, 2)
    kinds = (("loss", "training loss, smoothed", 0.95), ("held_out", "held-out loss, mean over fixed t", 0.0))
    for axis, (key, title, decay) in zip(axes, kinds, strict=True):
        for folder, entries in runs.items():
            points = [(e["step"], e[key]) for e in entries if e.get(key) is not None]
            if points:
                steps, values = zip(*points, strict=True)
                axis.plot(steps, smooth(values, decay), label=folder)
        axis.set(title=title, xlabel="step")
        if axis.lines:
            axis.legend(fontsize=7)
    save_figure(fig, path, 120)


def accuracy(results, path):
    """Right answers against network calls with 95 % intervals: a point for each `evaluate --out FILE`."""
    fig = new_figure(7, 4)
    axis = fig.subplots()
    for name in results:
        try:
            with open(f"{name}.summary.json", encoding="utf-8") as f:
                summary = json.load(f)
            n, calls, right = summary["n"], summary["calls"], summary["right"]
        except (OSError, ValueError, KeyError, TypeError):
            why = "no summary with right answers beside it; python -m tools.evaluate ... --out writes one"
            raise UserError(f"{name}: {why}") from None
        low, high = wilson(round(right * n), n)
        bars = [[100 * max(0, right - low)], [100 * max(0, high - right)]]
        label = f"{os.path.basename(name).removesuffix('.json')}, {n} questions"
        axis.errorbar([calls], [100 * right], bars, fmt="o", capsize=3, label=label)
    axis.set(xscale="log", xlabel="network calls an answer", ylabel="% right, 95 % interval")
    for which in (axis.xaxis.set_major_formatter, axis.xaxis.set_minor_formatter):
        which("{x:g}")  # 2, 3, 4 instead of powers of ten
    fig.legend(loc="outside lower center", ncols=3, fontsize=7)
    save_figure(fig, path, 120)


def draw_heatmap(frames, title):
    """The frames of an answer as a figure: a row a call, a column a place; blank where it is masked."""
    confidence = [[float("nan") if word is None else sure for word, sure in frame] for frame in frames]
    n_calls, n_places = len(frames), len(frames[-1])
    fig = new_figure(2.5 + 0.27 * n_places, 1.4 + 0.2 * n_calls)
    axis = fig.subplots()
    extent = (-0.5, n_places - 0.5, n_calls + 0.5, 0.5)
    shades = axis.imshow(confidence, cmap="YlOrBr", vmin=0, vmax=1, aspect="auto", extent=extent)
    words = [word if word.isprintable() else "\N{REPLACEMENT CHARACTER}" for word, _ in frames[-1]]
    words = [
        word.replace("$", r"\$") or "end" for word in words
    ]  # matplotlib reads $ as the start of a formula
    axis.set_xticks(range(n_places), words, rotation=90, fontsize=7)
    axis.yaxis.get_major_locator().set_params(integer=True)
    axis.set(title=title.replace("$", r"\$"), ylabel="network call")
    fig.colorbar(shades, label="confidence when kept; blank: masked")
    return fig


# ---------------------------------------------------------------------------------------------
# SVG.  Pictures stand on a light card of their own, so they can be read on a dark page too.

INK, CARD, FROZEN, TRAINED, MASKED = "#1f2933", "#fbfaf7", "#d5dde6", "#ffd9a0", "#e3e3e3"
FONT = 'font-family="system-ui, Helvetica, Arial, sans-serif"'


def text(x, y, words, size=13, anchor="middle", weight="normal"):
    words = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in words)  # XML forbids some
    style = f'font-size="{size}" text-anchor="{anchor}" font-weight="{weight}"'
    return f'<text x="{x}" y="{y}" {style}>{html.escape(words)}</text>'


def box(x, y, width, height, lines, fill):
    """A rounded box with lines of text in its middle, the first one bold."""
    parts = [f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="8" fill="{fill}" stroke="{INK}"/>']
    first = y + height / 2 + 5 - 8.5 * (len(lines) - 1)
    for n, line in enumerate(lines):
        weight = "normal" if n else "bold"
        parts.append(text(x + width / 2, first + 17 * n, line, 13 if n == 0 else 11.5, weight=weight))
    return "".join(parts)


def picture(width, height, parts, style=""):
    """The parts on a card, as the text of an SVG file."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" {FONT} fill="{INK}"><style>{style}</style>'
        f'<rect width="{width}" height="{height}" rx="12" fill="{CARD}"/>{"".join(parts)}</svg>\n'
    )


def write_svg(content, path):
    def write(temporary):
        with open(temporary, "w", encoding="utf-8") as f:
            f.write(content)

    write_file(path, write)
    print(f"{path}: written")


PARTS = {  # name -> prefix of its parameters, as in a Stage's `trains`; the stages that use it (model.adapt)
    "Whisper's encoder": ("encoder.", (1, 2, 3, 4)),
    "semantic adapter": ("semantic.", (1, 2, 3, 4)),
    "soft prompts": ("soft_prompts", (1,)),
    "acoustic adapter": ("acoustic.", (2, 3, 4)),
    "LLaDA": ("backbone.", (0, 1, 2, 3, 4)),
    "LoRA": ("lora", (3, 4)),
}


def stages():
    """Which parts train in which stage of the small model, and by which loss."""
    parts = []
    for column, name in enumerate([*PARTS, "loss"]):
        parts.append(text(175 + 132 * column, 34, name, 12, weight="bold"))
    for stage, row in STAGES["tiny"].items():
        y = 50 + 46 * stage
        parts.append(text(20, y + 23, f"stage {stage}", 13, "start", "bold"))
        for column, (prefix, used) in enumerate(PARTS.values()):
            if stage in used:
                trains = prefix in row.trains
                fill, words = (TRAINED, "trains") if trains else (FROZEN, "frozen")
                parts.append(box(113 + 132 * column, y, 124, 36, [words], fill))
        loss = "VRPO, Eq. 3 to 5" if row.loss is VRPO else "1/t, Eq. 1, 2"
        parts.append(text(175 + 132 * len(PARTS), y + 23, loss, 12))
    return picture(1050, 290, parts)


class Frames:
    """`generate`'s on_step: what the response looked like after each call."""

    def __init__(self, tokenizer, config):
        self.tokenizer, self.config, self.frames = tokenizer, config, []

    def __call__(self, response, confidence, call):
        frame = []
        for token, sure in zip(response[0].tolist(), confidence[0].tolist(), strict=True):
            if token == self.config.mask_id:
                frame.append((None, 0.0))
            elif token not in (self.config.eos_id, self.config.eot_id):
                frame.append((self.tokenizer.decode([token]).strip(" "), sure))
            else:
                frame.append(("", sure))  # end marks are shown as empty places
        self.frames.append(frame)


def draw_answer(frames, question, seconds=1.1):
    """The frames of an answer as an animated SVG: a box a place, one frame a call."""
    # the last frame's words, and three of its end marks
    n_places = min(sum(word != "" for word, _ in frames[-1]) + 3, len(frames[-1]))
    frames = [[(None, 0.0)] * n_places] + [frame[:n_places] for frame in frames]
    width, total = 40 + 74 * min(n_places, 12), seconds * (len(frames) + 1)
    rows = -(-n_places // 12)
    parts = [text(20, 30, question, 15, "start", "bold")]
    style = []
    for k, frame in enumerate(frames):
        begin = 100 * k * seconds / total
        end = 100 if k + 1 == len(frames) else 100 * (k + 1) * seconds / total
        visible = f"{begin:.2f}%,{end - 0.01:.2f}%{{opacity:1}}"
        before = f"0%,{begin - 0.01:.2f}%{{opacity:0}}" if k else ""
        after = f"{end:.2f}%,100%{{opacity:0}}" if end < 100 else ""
        style.append(
            f"@keyframes f{k}{{{before}{visible}{after}}}.f{k}{{animation:f{k} {total:.1f}s infinite}}"
        )
        parts.append(f'<g class="f{k}"' + ("" if k + 1 == len(frames) else ' opacity="0"') + ">")
        parts.append(text(width - 20, 30, f"network call {k} of {len(frames) - 1}", 12, "end"))
        for n, (word, sure) in enumerate(frame):
            x, y = 20 + 74 * (n % 12), 48 + 46 * (n // 12)
            if word is None:
                parts.append(box(x, y, 70, 36, ["?"], MASKED))
            elif word:
                parts.append(f'<rect x="{x}" y="{y}" width="70" height="36" rx="8" fill="{CARD}"/>')
                shade = f'fill="{TRAINED}" fill-opacity="{max(0.15, sure):.2f}" stroke="{INK}"'
                parts.append(f'<rect x="{x}" y="{y}" width="70" height="36" rx="8" {shade}/>')
                parts.append(text(x + 35, y + 18, word, 13, weight="bold"))
                parts.append(text(x + 35, y + 31, f"{sure:.0%}", 9.5))
        parts.append("</g>")
    return picture(width, 58 + 46 * rows, parts, "".join(style))


def watch(clip, question, model_name, **fields):
    """The frames of a real answer, one a call, and a title; fields: decode.Options'."""
    model, tokenizer = load(model_name, "cpu")
    merge_lora(model)
    audio, _ = load_audio(clip, limit=window_seconds(model.config))
    frames = Frames(tokenizer, model.config)
    ask(model, tokenizer, [audio], [question], on_step=frames, **fields)
    if not frames.frames:
        raise UserError(f"{model_name}: an autoregressive model writes from left to right; nothing to draw")
    return frames.frames, f"{os.path.basename(clip)}: {question}"


DEMO_QUESTION = (os.path.join("assets", "demo", "digits.wav"), "What is said?")


def draw_all(_):
    """The pictures in assets/ that are drawn from this project alone; architecture.svg is its own source."""
    write_svg(stages(), "assets/stages.svg")
    write_svg(draw_answer(*watch(*DEMO_QUESTION, "tiny")), "assets/answer.svg")
    save_figure(draw_heatmap(*watch(*DEMO_QUESTION, "tiny", steps=16)), "assets/heatmap.png", 100)


def watch_asked(args):
    return watch(args.clip, args.question, args.model, factor=args.factor, steps=args.steps)


def run_answer(args):
    write_svg(draw_answer(*watch_asked(args)), args.out)


def run_heatmap(args):
    save_figure(draw_heatmap(*watch_asked(args)), args.out, 100)


def main(argv=None):
    parser = Parser(prog="figures", description=__doc__)
    kinds = parser.add_subparsers(dest="kind", required=True)
    kind = kinds.add_parser("all", help="stages, answer and heatmap in assets/; run where assets/ is")
    kind.set_defaults(run=draw_all)
    kind = kinds.add_parser("curves", help="logged losses of training runs")
    kind.set_defaults(run=lambda args: curves(args.folders, args.out))
    kind.add_argument("folders", nargs="+", metavar="FOLDER", help="of a run, with its log.jsonl")
    kind.add_argument("--out", default="curves.png")
    kind = kinds.add_parser("accuracy", help="right answers against network calls")
    kind.set_defaults(run=lambda args: accuracy(args.results, args.out))
    kind.add_argument("results", nargs="+", metavar="FILE", help="that tools.evaluate --out has written")
    kind.add_argument("--out", default="accuracy.png")
    kind = kinds.add_parser("stages", help="what trains when")
    kind.set_defaults(run=lambda args: write_svg(stages(), args.out))
    kind.add_argument("--out", default="assets/stages.svg")
    for name, out, run in (
        ("answer", "assets/answer.svg", run_answer),
        ("heatmap", "assets/heatmap.png", run_heatmap),
    ):
        kind = kinds.add_parser(name, help="an answer as it emerges")
        kind.set_defaults(run=run)
        kind.add_argument("clip")
        kind.add_argument("question")
        kind.add_argument("--model", default="tiny")
        how = kind.add_mutually_exclusive_group()
        how.add_argument("--factor", type=float, help="default 1")
        how.add_argument("--steps", type=int, help="fixed steps instead")
        kind.add_argument("--out", default=out)

    def start():
        args = parser.parse_args(argv)
        args.run(args)

    return exit_status("figures", start)


if __name__ == "__main__":
    sys.exit(main())
