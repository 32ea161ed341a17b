"""A web page on which one watches an answer emerge.

    python -m tools.demo                                 the shipped small model at http://127.0.0.1:7860
    python -m tools.demo --model diffa2 --port 8000

Drop a recording or speak, type a question, and every network call redraws the answer: masked tokens are
empty boxes, the others are shaded and underlined as far as the model was sure of them.

Gradio draws the page and has the queue: two questions are answered at a time, more wait.  `ask` reports
by callbacks and Gradio wants a generator, so each answer has a thread of its own that hands over what the
callbacks see.  When somebody stops or leaves, Gradio closes the generator and the thread ends at its next
network call.  Uploads and pictures go to a temporary folder that is removed at the end; nothing is asked
of other hosts.
"""

import contextlib
import dataclasses
import html
import importlib.util
import io
import os
import queue
import signal
import sys
import tempfile
import threading
import time
from dataclasses import dataclass

import numpy as np
import torch

from adapters import merge_lora
from data import SAMPLE_RATE, load_audio, log_mel, window_samples
from decode import CACHES, Options, ask
from runtime import command_line
from runtime.errors import Parser, UserError, exit_status, number
from runtime.recordings import split_clip
from runtime.terminal import Stream, clock
from runtime.tutorials import DEMO
from tools.figures import Frames, new_figure
from weights import load

QUESTIONS = {  # examples about the demo clips
    "seven.wav": "Which digit is spoken?",
    "digits.wav": "What is said?",
    "clock.wav": "What do you hear?",
}
AT_ONCE = 2  # questions that are answered at a time; the others wait in the queue

# A word's underline is as long as the model was sure of it, and its box as opaque: legible without colours.
CSS = """
.answer { background: #fbfaf7; color: #1f2933; border-radius: 12px; padding: 12px; min-height: 96px }
.token { display: inline-block; min-width: 30px; margin: 3px; padding: 4px 8px 8px; border-radius: 6px;
         text-align: center; border: 1px solid #1f2933;
         background: linear-gradient(#7a4300, #7a4300) 0 100% / calc(var(--sure) * 100%) 4px no-repeat,
                     rgba(255, 178, 64, calc(var(--sure) * 0.8)) }
.masked { background: #e3e3e3; border-style: dashed }
.end { background: none; border-color: transparent; color: #5a6672; min-width: 0; padding: 4px 2px 8px }
"""


# ---------------------------------------------------------------------------------------------
# watching `ask`


@dataclass
class Moment:
    """What there is to see after a network call."""

    frame: list  # (word, confidence) of each place; the word None: masked, "": behind the end
    where: str  # the piece of a long clip
    calls: int
    seconds: float
    rtf: float  # real-time factor so far: seconds of work per second of the clip
    text: str  # as far as it is final


def moments(model, tokenizer, audio, question, options, seed):
    """`ask` as a generator: a Moment after each network call, and one for the whole answer.

    audio (n,) 16 kHz.  Closing the generator ends the work at the next call.  Raises UserError as `ask`.
    """
    found, is_closed, began = queue.SimpleQueue(), threading.Event(), time.perf_counter()
    pieces = [
        clock(start / SAMPLE_RATE, end / SAMPLE_RATE)
        for start, end in split_clip(audio, window_samples(model.config))
    ]
    frames, stream = Frames(tokenizer, model.config), Stream(tokenizer, model.config, io.StringIO())
    n_pieces = 0

    def report(calls, seconds, text):
        frame = frames.frames[-1] if frames.frames else []  # an autoregressive model shows none
        where = pieces[n_pieces - 1] if len(pieces) > 1 else ""
        found.put(Moment(frame, where, calls, seconds, seconds * SAMPLE_RATE / len(audio), text))

    def on_step(response, confidence, call):
        nonlocal n_pieces
        if is_closed.is_set():
            raise InterruptedError
        n_pieces += call == 1  # calls are counted anew for each piece
        frames(response, confidence, call)
        report(len(frames.frames), time.perf_counter() - began, stream.out.getvalue())

    def work():
        try:
            generator = torch.Generator().manual_seed(seed)
            watch = {"on_step": on_step, "on_block": stream.show}
            answer = ask(model, tokenizer, audio, question, None, options, generator, **watch, batch=1)
            report(answer.calls, answer.seconds, answer.text)
            found.put(None)
        except Exception as e:  # raised again where the moments are read
            found.put(e)

    threading.Thread(target=work, daemon=True).start()
    try:
        while (moment := found.get()) is not None:
            if isinstance(moment, Exception):
                raise moment
            yield moment
    finally:
        is_closed.set()


def plans_of(sampler, factor, steps, threshold, length, block, cache, temperature, is_compared):
    """What the page asks for: name of each way to decode -> its Options.  Raises UserError."""
    if None in (factor, steps, threshold, length, block, temperature):
        raise UserError("a number under Advanced is missing")
    value = {"factor": factor, "steps": steps, "threshold": threshold}[sampler]
    options = Options(answer_length=length, block=block, cache=cache, temperature=temperature)
    plans = {f"{sampler} {value:g}": dataclasses.replace(options, **{sampler: value})}
    if is_compared:
        plans[f"{length} fixed steps"] = dataclasses.replace(options, steps=length)
    for plan in plans.values():
        plan.check()
    return plans


def read_clip(path):
    """The samples (n,) of an uploaded clip.  Raises UserError for none, an unusable or a silent one."""
    if path is None:
        raise UserError("there is no clip: upload one, record one, or take an example")
    audio, notes = load_audio(path)
    if notes:  # without a limit the only one: silence
        raise UserError(notes[0])
    return audio


# ---------------------------------------------------------------------------------------------
# drawing


def draw_tokens(moment):
    """The answer's tokens as HTML."""
    boxes = []
    for word, sure in moment.frame:
        if word is None:
            boxes.append('<span class="token masked" title="masked">?</span>')
        elif word:
            style = f'style="--sure: {sure:.2f}" title="{sure:.0%}"'
            boxes.append(f'<span class="token" {style}>{html.escape(word)}</span>')
        else:
            boxes.append('<span class="token end" title="end of the answer">·</span>')
    head = f"Network call {moment.calls} {moment.where}"
    return f'<div class="answer"><div>{head}</div>{"".join(boxes)}</div>'


def draw_cost(rows):
    """What each way to decode has cost so far: name -> Moment, as an HTML table."""
    heads = ("decoding", "calls", "seconds", "real-time factor", "answer")
    lines = ["<tr>" + "".join(f"<th>{head}</th>" for head in heads) + "</tr>"]
    for name, m in rows.items():
        cells = (name, m.calls, f"{m.seconds:.2f}", f"{m.rtf:.3f}", html.escape(m.text))
        lines.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return f"<table>{''.join(lines)}</table>"


def draw_clip(audio, config):
    """A figure of a clip: waveform above, log-mel below as the model reads it, lines where it is cut."""
    fig = new_figure(9, 3.2)
    wave, mel = fig.subplots(2, 1, sharex=True)
    step = max(1, len(audio) // 2000)
    columns = audio[: len(audio) // step * step].reshape(-1, step)
    at = np.arange(len(columns)) * step / SAMPLE_RATE
    wave.fill_between(at, columns.min(1), columns.max(1), color="#2f5d8a")
    for start, end in split_clip(audio, window_samples(config)):
        values, n_frames = log_mel(audio[start:end], config)
        values = values[:, : 2 * n_frames : 1 + n_frames // 500].numpy()
        extent = (start / SAMPLE_RATE, end / SAMPLE_RATE, 0, len(values))
        mel.imshow(values, origin="lower", aspect="auto", extent=extent, vmin=-1, vmax=1.5)
        for axis in (wave, mel):
            if start:
                axis.axvline(start / SAMPLE_RATE, color="crimson", linestyle="--")
    wave.set(ylabel="waveform", xlim=(0, len(audio) / SAMPLE_RATE))
    mel.set(ylabel="log-mel band", xlabel="seconds; dashed: where a long clip is cut")
    return fig


# ---------------------------------------------------------------------------------------------
# the page


@contextlib.contextmanager
def shown_on_page(clip):
    """A UserError inside becomes a message on the page, which names the clip without its folder."""
    import gradio

    try:
        yield
    except UserError as e:
        message = str(e).replace(str(clip), os.path.basename(str(clip)))
        raise gradio.Error(html.escape(message), print_exception=False) from None


def build_page(model, tokenizer):
    """The page, a gradio.Blocks."""
    import gradio as gr

    def look(clip):
        if clip is None:
            return None
        with shown_on_page(clip):
            return draw_clip(read_clip(clip), model.config)

    def answer(clip, question, seed, *settings):
        with shown_on_page(clip):
            audio = read_clip(clip)
            if not question.strip():
                raise UserError("the question is empty")
            if seed is None:
                raise UserError("the seed is missing")
            plans = plans_of(*settings)
            frames, rows = [], {}
            yield "", "", "", gr.Slider(visible=False), frames
            for name, options in plans.items():
                for moment in moments(model, tokenizer, audio, question, options, seed):
                    rows[name] = moment
                    if len(rows) == 1 and moment.calls > len(frames):
                        frames.append(draw_tokens(moment))
                    tokens = frames[-1] if frames else ""
                    text = next(iter(rows.values())).text
                    yield tokens, text, draw_cost(rows), gr.skip(), gr.skip()
            n = len(frames)
            slider = gr.Slider(maximum=max(n, 2), value=n, visible=n > 1)
            yield gr.skip(), gr.skip(), gr.skip(), slider, frames

    def replay(call, frames):
        return frames[min(int(call), len(frames)) - 1] if frames else ""

    with gr.Blocks(title="DIFFA-2", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown("# DIFFA-2\nAsk a recording a question and watch the answer emerge, surest words first.")
        frames = gr.State([])
        with gr.Row():
            with gr.Column(scale=2):
                clip = gr.Audio(type="filepath", label="Recording", elem_id="clip", buttons=[])
                only_uploads(clip)
                picture = gr.Plot(show_label=False, elem_id="picture")
            with gr.Column(scale=3):
                question = gr.Textbox(label="Question", max_length=2000, elem_id="question")
                gr.Examples(
                    [[os.path.join(DEMO, name), q] for name, q in QUESTIONS.items()], [clip, question]
                )
                with gr.Row():
                    button = gr.Button("Ask", variant="primary", elem_id="ask")
                    stop = gr.Button("Stop", elem_id="stop")
                tokens = gr.HTML(elem_id="tokens")
                text = gr.Textbox(label="Answer", interactive=False, elem_id="text")
                cost = gr.HTML(elem_id="cost")
                slider = gr.Slider(1, 2, step=1, label="Replay: call", visible=False, elem_id="replay")
                with gr.Accordion("Advanced", open=False):
                    with gr.Row():
                        sampler = gr.Radio(["factor", "steps", "threshold"], value="factor", label="Sampler")
                        compared = gr.Checkbox(label="Compare with fixed steps, one token each")
                    with gr.Row():
                        factor = gr.Number(1.0, label="Factor")
                        steps = gr.Number(32, label="Steps", precision=0)
                        threshold = gr.Number(0.9, label="Threshold")
                        temperature = gr.Number(0.0, label="Temperature")
                    with gr.Row():
                        length = gr.Number(32, label="Answer length, tokens", precision=0)
                        block = gr.Number(32, label="Block, tokens", precision=0)
                        cache = gr.Dropdown(list(CACHES), value="none", label="Cache")
                        seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**31 - 1)
        clip.change(look, clip, picture, api_name="look")
        settings = [sampler, factor, steps, threshold, length, block, cache, temperature, compared]
        asked = button.click(
            answer,
            [clip, question, seed, *settings],
            [tokens, text, cost, slider, frames],
            concurrency_limit=AT_ONCE,
            show_progress="minimal",
            api_name="ask",
        )
        stop.click(None, cancels=asked)
        slider.input(replay, [slider, frames], tokens, show_progress="hidden", api_name="replay")
    return page.queue(max_size=20)


def only_uploads(clip):
    """Refuses an address in the place of an upload, which Gradio would fetch; paths it refuses itself."""
    import gradio

    move = clip.async_move_resource_to_block_cache

    async def move_file(path):
        if "://" in str(path):
            raise gradio.Error("a recording must be uploaded", print_exception=False)
        return await move(path)

    clip.async_move_resource_to_block_cache = move_file


@contextlib.contextmanager
def serving(model, tokenizer, port, share=False):
    """Serves the page while the block runs; gives its address.  Raises UserError for a port that is taken."""
    with tempfile.TemporaryDirectory(prefix="demo-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # read when Gradio is imported
        from gradio import themes

        page = build_page(model, tokenizer)
        plain = themes.Base(font="system-ui", font_mono="monospace")  # no fonts from elsewhere
        where = {"server_name": "127.0.0.1", "server_port": port, "share": share}
        off = {"ssr_mode": False, "run_history": False, "footer_links": [], "quiet": True}
        try:
            page.launch(prevent_thread_lock=True, max_file_size="100mb", theme=plain, css=CSS, **where, **off)
        except OSError:
            raise UserError(f"port {port} is taken: choose another by --port") from None
        try:
            yield page.share_url or page.local_url
        finally:
            page.close(verbose=False)


def need_gradio():
    if importlib.util.find_spec("gradio") is None:
        raise UserError("gradio is missing: pip install -r requirements-demo.txt")


def run(args):
    need_gradio()
    files = {"llada": args.llada, "whisper": args.whisper, "diffa": args.diffa}
    model, tokenizer = load(args.model, **files, int8=args.int8)
    merge_lora(model)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the temporary folder goes then, too
    with serving(model, tokenizer, args.port, args.share) as address:
        print(f"{address} (Ctrl-C ends it)", flush=True)
        threading.Event().wait()


def main(argv=None):
    parser = Parser(prog="demo", description=__doc__)
    command_line.add_model(parser)
    parser.add_argument("--port", type=number(int, 1, 65535), default=7860)
    parser.add_argument("--share", action="store_true", help="a public address by way of Gradio's servers")
    return exit_status("demo", lambda: run(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
