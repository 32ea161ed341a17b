"""The web page: what it draws, a client of its interface, and a real browser.

The tests of the served page are skipped without gradio, those in a browser also without Chromium and
playwright, which drives it.  pytest --slow --screenshot assets/page.png draws README's picture anew.
"""

import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from urllib.parse import urlparse

import numpy as np
import pytest
import soundfile
from conftest import sound

from adapters import merge_lora
from decode import Options, ask
from tools.demo import Moment, draw_clip, draw_cost, draw_tokens, main, moments
from weights import load

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
DEMO = os.path.join(ROOT, "assets", "demo")
needs_gradio = pytest.mark.skipif(
    importlib.util.find_spec("gradio") is None, reason="gradio is not installed"
)


# ---------------------------------------------------------------------------------------------
# without the page


def test_tokens_show_how_sure_they_are_and_no_markup():
    moment = Moment([("<b>", 0.75), (None, 0.0), ("", 1.0)], "[0:02 - 0:04]", 3, 0.5, 0.25, "<i>")
    drawn = draw_tokens(moment)
    assert "&lt;b&gt;" in drawn and "<b>" not in drawn
    assert "--sure: 0.75" in drawn and drawn.count("token masked") == 1 and drawn.count("token end") == 1
    assert "call 3 [0:02 - 0:04]" in drawn
    assert "<td>0.250</td><td>&lt;i&gt;</td>" in draw_cost({"factor 1": moment})


def test_the_picture_of_a_long_clip_shows_where_it_is_cut(config):
    """Sound, a pause at 1.5 s, sound: the window is 2 s, so the cut lies in the pause."""
    audio = np.random.default_rng(0).uniform(-0.3, 0.3, 3 * 16000).astype(np.float32)
    audio[22400:25600] = 0
    wave, mel = draw_clip(audio, config).axes
    (line,) = wave.lines
    assert 1.4 <= line.get_xdata()[0] <= 1.6
    first, second = (image.get_extent() for image in mel.images)
    assert first[1] == second[0] == line.get_xdata()[0] and second[1] == 3


def test_moments_are_the_calls_of_ask(small, tokenizer):
    """Masks only become fewer, block by block; the last moment is the answer."""
    audio = np.random.default_rng(0).uniform(-0.3, 0.3, 16000).astype(np.float32)
    options = Options(answer_length=16, block=8, steps=8)
    seen = list(moments(small, tokenizer, audio, "What is said?", options, seed=0))
    masks = [sum(word is None for word, _ in moment.frame) for moment in seen]
    assert masks == [14, 12, 10, 8, 6, 4, 2, 0, 0]
    answer = ask(small, tokenizer, audio, "What is said?", options=options)
    assert seen[-1].text == answer.text and seen[-1].calls == answer.calls == 8
    assert not seen[3].text and answer.text.startswith(seen[4].text) and seen[4].text  # the first block


def test_closing_the_moments_ends_the_work(small, tokenizer):
    calls = 0

    def count(*_):
        nonlocal calls
        calls += 1

    small.backbone.register_forward_hook(count)
    audio = np.random.default_rng(0).uniform(-0.3, 0.3, 60 * 16000).astype(np.float32)
    before = set(threading.enumerate())
    seen = moments(small, tokenizer, audio, "What is said?", Options(32, 32, steps=32), seed=0)
    next(seen)
    (worker,) = set(threading.enumerate()) - before
    seen.close()
    worker.join(60)
    assert not worker.is_alive() and calls < 30 * 32  # the whole has at least 30 pieces


def test_what_keeps_the_page_from_starting_is_one_line(capsys):
    assert main(["--model", "no/such"]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    has_gradio = importlib.util.find_spec("gradio") is not None
    assert ("no model 'no/such'" if has_gradio else "requirements-demo.txt") in message


# ---------------------------------------------------------------------------------------------
# the served page


@contextlib.contextmanager
def served(model, folder):
    """The program in a process of its own; its address.  All it writes must be gone at the end."""
    temporary = os.path.join(folder, "tmp")
    os.makedirs(temporary)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    env = {**os.environ, "PYTHONPATH": ROOT, "TMPDIR": temporary}
    command = [sys.executable, "-m", "tools.demo", "--model", model, "--port", str(port)]
    log = os.path.join(folder, "log")

    def said():
        with open(log) as f:
            return f.read()

    with open(log, "w") as err:
        process = subprocess.Popen(
            command, cwd=temporary, env=env, stdout=subprocess.PIPE, stderr=err, text=True
        )
    line = process.stdout.readline()
    try:
        assert line.startswith(f"http://127.0.0.1:{port}"), said()
        yield line.split()[0]
        assert os.listdir(temporary), "uploads were expected here"
    finally:
        process.send_signal(signal.SIGTERM)
        status = process.wait(60)
    left = [name for *_, names in os.walk(temporary) for name in names]  # torch leaves an empty folder
    assert status == 130 and left == []
    # Gradio logs the one about a path that a client names; nothing else may
    assert said().count("Traceback") == said().count("InvalidPathError: ")


@pytest.fixture(scope="module")
def address(small_folder, tmp_path_factory):
    with served(small_folder, str(tmp_path_factory.mktemp("page"))) as url:
        yield url


def inputs(
    clip, question="What is said?", sampler="steps", steps=8, length=16, block=8, compare=False, seed=0
):
    """What the page sends when Ask is pressed."""
    from gradio_client import handle_file

    clip = handle_file(clip) if isinstance(clip, str) else clip
    return clip, question, seed, sampler, 1.0, steps, 0.9, length, block, "none", 0.0, compare


def new_client(address):
    from gradio_client import Client

    return Client(address, verbose=False, download_files=False, analytics_enabled=False)


@needs_gradio
def test_a_client_gets_the_answer_call_by_call(address, small_folder, tmp_path):
    clip = str(tmp_path / "c" / "clip.wav")
    sound(clip, 1.5)
    model, tokenizer = load(small_folder, "cpu")
    wanted = ask(model, tokenizer, clip, "What is said?", answer_length=16, block=8, steps=8)
    client = new_client(address)
    job = client.submit(*inputs(clip, compare=True), api_name="/ask")
    job.result(timeout=120)
    outputs = job.outputs()
    drawn = [tokens for tokens, *_ in outputs[1:] if isinstance(tokens, str)]
    masks = [tokens.count("masked") // 2 for tokens in drawn]
    assert masks == sorted(masks, reverse=True) and {14, 12, 10, 8, 6, 4, 2, 0} <= set(masks)
    texts = [text for _, text, *_ in outputs if isinstance(text, str)]
    assert texts[-1] == wanted.text
    cost = [cost for _, _, cost, *_ in outputs if isinstance(cost, str)][-1]
    assert "<td>steps 8</td><td>8</td>" in cost and "<td>16 fixed steps</td><td>16</td>" in cost
    first = client.predict(1, api_name="/replay")
    assert first.count('class="token masked"') == 14 and "Network call 1 " in first


@needs_gradio
@pytest.mark.parametrize(
    "what, message",
    [
        ("none", "there is no clip"),
        ("text", "text.wav: cannot be read as audio"),
        ("silence", "silence.flac: the clip is silent"),
        ("question", "the question is empty"),
        ("block", "answer length 16 is not a multiple of block 5"),
        ("number", "a number under Advanced is missing"),
        ("seed", "the seed is missing"),
    ],
)
def test_bad_input_is_a_message(address, tmp_path, what, message):
    clip = str(tmp_path / "good" / "clip.wav")
    sound(clip)
    job = {"clip": clip}
    if what == "none":
        job["clip"] = None
    elif what == "text":
        job["clip"] = str(tmp_path / "text.wav")
        (tmp_path / "text.wav").write_text("not a recording")
    elif what == "silence":
        job["clip"] = str(tmp_path / "silence.flac")
        soundfile.write(job["clip"], np.zeros(600 * 16000), 16000)
    elif what == "question":
        job["question"] = " "
    elif what == "block":
        job["block"] = 5
    elif what == "number":
        job["steps"] = None
    elif what == "seed":
        job["seed"] = None
    with pytest.raises(Exception, match=re.escape(message)) as raised:
        new_client(address).predict(*inputs(**job), api_name="/ask")
    assert "Traceback" not in str(raised.value) and str(tmp_path) not in str(raised.value)


@needs_gradio
@pytest.mark.parametrize("place", ["path", "address"])
def test_a_recording_that_was_not_uploaded_is_refused(address, tmp_path, place):
    """What a client may send that is no page of ours: it names a file or an address itself."""
    clip = str(tmp_path / "good" / "clip.wav")
    sound(clip)
    named = clip if place == "path" else "http://127.0.0.1:9/clip.wav"
    data = inputs({"path": named, "meta": {"_type": "gradio.FileData"}})
    request = urllib.request.Request(
        f"{address}gradio_api/call/ask",
        json.dumps({"data": data}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as reply:
        event = json.load(reply)["event_id"]
    with urllib.request.urlopen(f"{address}gradio_api/call/ask/{event}") as reply:
        told = reply.read().decode()
    assert "event: error" in told and "event: complete" not in told and "token" not in told


@needs_gradio
def test_a_file_beyond_100_mb_is_refused(address, tmp_path):
    import httpx  # gradio brings it

    with open(tmp_path / "big.wav", "w+b") as f:
        f.truncate(101 << 20)
        reply = httpx.post(f"{address}gradio_api/upload", files={"files": f}, timeout=120)
    assert reply.status_code == 413


@needs_gradio
def test_a_port_that_is_taken_is_one_line(address, small_folder):
    command = [sys.executable, "-m", "tools.demo", "--model", small_folder]
    command += ["--port", str(urlparse(address).port)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch(r"demo: port \d+ is taken.*\n", done.stderr)


@needs_gradio
def test_two_are_answered_at_once_and_a_third_when_one_stops(address, tmp_path):
    clip, short = str(tmp_path / "clips" / "long.wav"), str(tmp_path / "clips" / "short.wav")
    sound(clip, 120)
    sound(short)
    jobs = []
    for n in range(2):
        jobs.append(new_client(address).submit(*inputs(clip, f"Question {n}?", steps=16), api_name="/ask"))
        wait_until(jobs[n].outputs)
    waiting = new_client(address).submit(*inputs(short), api_name="/ask")
    time.sleep(1)
    assert not waiting.outputs() and not any(job.done() for job in jobs)
    jobs[0].cancel()
    waiting.result(timeout=120)
    assert not jobs[1].done()
    jobs[1].cancel()


def wait_until(happens, seconds=60):
    end = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < end
        time.sleep(0.02)


# ---------------------------------------------------------------------------------------------
# in a browser

WATCH = """() => {
    window.seen = [];
    const tokens = document.querySelector('#tokens');
    const note = () => {
        const answer = tokens.querySelector('.answer');
        if (answer && window.seen.at(-1) !== answer.innerText) window.seen.push(answer.innerText);
    };
    new MutationObserver(note).observe(tokens, {childList: true, subtree: true, characterData: true});
}"""


@pytest.fixture
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("no Chromium here")
    # no sandbox: it does not start as root; the microphone hears a demo clip over and over
    flags = ["--no-sandbox", "--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream"]
    flags.append(f"--use-file-for-fake-audio-capture={DEMO}/seven.wav")
    with playwright.sync_playwright() as p:
        found = p.chromium.launch(executable_path=program, args=flags)
        yield found
        found.close()


def open_page(browser, url, requests):
    """A tab of its own user; notes what it asks for."""
    tab = browser.new_context(viewport={"width": 1280, "height": 900}).new_page()
    tab.set_default_timeout(60000)
    tab.on("request", lambda request: requests.append(request.url))
    tab.goto(url)
    return tab


def upload(tab, path):
    tab.locator("#clip input[type=file]").set_input_files(path)


def press_ask(tab, question):
    tab.fill("#question textarea", question)
    tab.evaluate(WATCH)
    tab.click("#ask button, button#ask")


def wait_for_answer(tab, how, text):
    """Until the costs have a row `how` and the answer is `text`: the page draws its parts one by one."""
    tab.wait_for_function("how => document.querySelector('#cost').innerText.includes(how)", arg=how)
    shown = "text => document.querySelector('#text textarea').value === text"
    tab.wait_for_function(shown, arg=text)
    tab.wait_for_function("() => !document.querySelector('#tokens .masked')")


def by_ask(clip, question, **fields):
    model, tokenizer = load("tiny", "cpu")
    merge_lora(model)
    return ask(model, tokenizer, os.path.join(DEMO, clip), question, **fields).text


@needs_gradio
@pytest.mark.slow
def test_the_page_in_a_browser(browser, tmp_path, request):
    requests = []
    with served("tiny", str(tmp_path)) as url:
        tab = open_page(browser, url, requests)
        upload(tab, os.path.join(DEMO, "digits.wav"))
        tab.wait_for_selector("#picture img")
        # 32 calls: several of them are seen on their way
        tab.get_by_text("Advanced").click()
        tab.get_by_label("steps", exact=True).check()
        press_ask(tab, "What is said?")
        wait_for_answer(tab, "steps 32\t32\t", by_ask("digits.wav", "What is said?", steps=32))
        seen = tab.evaluate("window.seen")
        masks = [text.count("?") for text in seen]
        assert len({n for n in masks if 0 < n < 32}) >= 2 and masks[-1] == 0
        assert masks == sorted(masks, reverse=True)

        tab.fill("#replay input[type=range]", "3")
        tab.wait_for_function("/Network call 3\\b/.test(document.querySelector('#tokens').innerText)")
        assert tab.locator("#tokens .masked").count() == 29

        # two people at once, each with a question and an answer of their own
        other = open_page(browser, url, requests)
        upload(other, os.path.join(DEMO, "clock.wav"))
        other.wait_for_selector("#picture img")
        tab.get_by_label("factor", exact=True).check()
        tab.get_by_label("Compare with fixed steps").check()
        press_ask(tab, "What is said?")
        press_ask(other, "What do you hear?")
        wait_for_answer(other, "factor 1\t", by_ask("clock.wav", "What do you hear?"))
        wait_for_answer(tab, "32 fixed steps\t32\t", by_ask("digits.wav", "What is said?"))
        if request.config.getoption("--screenshot"):
            tab.fill("#replay input[type=range]", "1")
            tab.wait_for_function("document.querySelector('#tokens').innerText.includes('Network call 1')")
            tab.get_by_text("Advanced").click()
            tab.screenshot(
                path=request.config.getoption("--screenshot"), full_page=True, animations="disabled"
            )

        # what is wrong is said on the page
        bad = str(tmp_path / "bad.wav")
        with open(bad, "w") as f:
            f.write("not a recording")
        other.reload()
        upload(other, bad)
        other.get_by_text("bad.wav: cannot be read as audio").first.wait_for()
        other.reload()
        press_ask(other, "What do you hear?")
        other.get_by_text("there is no clip").first.wait_for()

        # the microphone
        other.get_by_label("Record audio").click()
        other.get_by_role("button", name="Record", exact=True).click()
        other.wait_for_timeout(2500)
        other.get_by_role("button", name="Stop", exact=True).first.click()
        other.wait_for_selector("#picture img")
        press_ask(other, "Which digit is spoken?")
        other.wait_for_function("document.querySelector('#text textarea').value.length > 0")
    hosts = {urlparse(address).netloc for address in requests if address.startswith("http")}
    assert hosts == {urlparse(url).netloc}
    assert all(address.split(":")[0] in ("http", "blob", "data") for address in requests)
