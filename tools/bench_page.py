"""What the web page costs beside `ask`: the same questions by way of Gradio's server and queue.

Its own client asks, so what a browser needs to draw is not counted.
"""

import os
import time

from adapters import merge_lora
from decode import Options, ask
from tools.demo import DEMO, need_gradio, serving
from tools.measure import Laps, machine, spread
from weights import load

CLIP, QUESTION = os.path.join(DEMO, "digits.wav"), "What is said?"


def ask_alone(model, tokenizer, options):
    """Seconds until the first network call is done and until the answer is whole."""
    start, laps = time.perf_counter(), Laps("cpu")
    ask(model, tokenizer, CLIP, QUESTION, options=options, on_step=laps)
    return laps.seconds[0], time.perf_counter() - start


def ask_page(client, sampler):
    """The same by way of the page."""
    from gradio_client import handle_file

    start, first = time.perf_counter(), None
    rest = (1.0, 32, 0.9, 32, 32, "none", 0.0, False)  # the page's defaults, in its order
    for tokens, *_ in client.submit(handle_file(CLIP), QUESTION, 0, sampler, *rest, api_name="/ask"):
        if first is None and "Network call" in tokens:
            first = time.perf_counter() - start
    return first, time.perf_counter() - start


def page_bench(args):
    """Prints seconds to the first call and to the answer, of `ask` and of the page in turn."""
    need_gradio()
    model, tokenizer = load(args.model, "cpu")
    merge_lora(model)
    with serving(model, tokenizer, args.port) as address:
        from gradio_client import Client

        client = Client(address, verbose=False, download_files=False, analytics_enabled=False)
        print(f"{machine(None)}; {args.repeats} repeats in turn, median (least - most); seconds\n")
        print(f"{'':30}{'to the first call':>24}{'to the answer':>24}")
        for sampler, options in (("factor", Options()), ("steps", Options(steps=32))):
            times = {"ask": [], "page": []}
            for repeat in range(args.repeats + 1):
                alone = ask_alone(model, tokenizer, options)
                seen = ask_page(client, sampler)
                if repeat:  # the first is for warming up
                    times["ask"].append(alone)
                    times["page"].append(seen)
            for name, pairs in times.items():
                first, whole = zip(*pairs, strict=True)
                print(f"{f'{name}, {sampler}':30}{spread(first, '{:.3f}'):>24}{spread(whole, '{:.3f}'):>24}")
