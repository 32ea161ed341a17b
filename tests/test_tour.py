"""The small model's manifests and tokenizer, from miniature corpora in their published layout."""

import dataclasses
import itertools
import json
import os
import pathlib
import shutil

import pytest
import torch
from conftest import read_lines

from data import build_prompt, prompt_text, read_manifest
from runtime.fresh import build
from runtime.variations import imitate_audio
from tools import imitated
from tools.corpora import DIGITS, Clip, read_corpus
from tools.prepare import main
from tools.questions import askable
from tools.tour import TOUR, sentences_of, tour
from weights import load_tokenizer, save


def test_tour_never_trains_on_the_test_split(toured, corpora):
    test_clips = {
        os.path.abspath(c.path)
        for name in set(TOUR) & set(os.listdir(corpora))
        for c in read_corpus(name, os.path.join(corpora, name))
        if c.is_test
    }
    test_clips |= (held := {os.path.abspath(e.audio) for e in read_manifest(f"{toured}/held_out.jsonl")})
    assert held
    for stage in range(5):
        examples = read_manifest(f"{toured}/stage{stage}.jsonl", stage)
        clips = {os.path.abspath(e.audio) for e in examples if e.audio}
        assert examples and bool(clips) == (stage > 0) and not clips & test_clips
        assert not any("/test_" in path for path in clips)
    examples = read_manifest(f"{toured}/test.jsonl")
    assert test_clips - held <= {os.path.abspath(e.audio) for e in examples}
    assert all(e.answer for e in read_manifest(f"{toured}/stage1.jsonl", 1))
    assert all(e.rejected and e.rejected != e.answer for e in read_manifest(f"{toured}/stage4.jsonl", 4))
    tasks = {e.task for e in read_manifest(f"{toured}/stage3.jsonl", 3)}
    assert any(t.endswith("_choice") for t in tasks) and not any(
        e.task.endswith("_choice") for e in read_manifest(f"{toured}/stage2.jsonl", 2)
    )


def without_folders(data):
    """What a manifest's bytes say, clips by their names alone."""
    found = []
    for e in map(json.loads, data.splitlines()):
        found.append((e["messages"], e["task"], os.path.basename(e.get("audios", ["none"])[0])))
    return found


def test_tour_is_the_same_for_a_seed(toured, corpora, tmp_path):
    again = str(tmp_path / "again")
    assert main(["tour", "--audio", corpora, "--out", again, "--strings", "20"]) == 0
    for name in (
        "stage0.jsonl",
        "stage3.jsonl",
        "stage4.jsonl",
        "test.jsonl",
        "tokenizer.json",
        "clips/train_digits/00003.flac",
    ):
        first, second = (pathlib.Path(folder, name).read_bytes() for folder in (toured, again))
        if name.endswith(".jsonl"):  # the clips lie elsewhere, all else is equal
            first, second = without_folders(first), without_folders(second)
        assert first == second, name


def test_a_stopped_tour_leaves_no_manifest_of_other_clips(toured, corpora, tmp_path, monkeypatch):
    out = str(tmp_path / "again")
    shutil.copytree(toured, out)

    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("tools.tour.compose_clips", stop)
    with pytest.raises(KeyboardInterrupt):
        tour(corpora, out, 1, 20)
    assert not [name for name in os.listdir(out) if name.endswith((".jsonl", "mmau.json"))]


def test_tokenizer_speaks_the_prompt(toured, tokenizer):
    t = load_tokenizer(toured)
    for text in ("Rain.", "seven three", "What do you hear? é ß 漢", "\n\n"):
        assert t.decode(t.encode(text, add_special_tokens=False).ids) == text
    assert len(t.encode("You are a helpful voice assistant.", add_special_tokens=False).ids) == 1
    ids, audio_at = build_prompt(t, "What emotion?")
    assert t.id_to_token(ids[audio_at]) == " <audio>."
    assert t.decode(ids, skip_special_tokens=False) == prompt_text("What emotion?")
    assert t.get_vocab_size() <= 976
    assert t.encode("A. Rain\nB. Seven", add_special_tokens=False).tokens == [
        "A.",
        "ĠRain",
        "Ċ",
        "B.",
        "ĠSeven",
    ]
    assert t.encode("I hear rain.", add_special_tokens=False).tokens[-2:] == ["Ġrain", "."]


def test_show_prints_what_the_model_sees(toured, capsys):
    assert main(["show", f"{toured}/stage2.jsonl", "-n", "2"]) == 0
    out = capsys.readouterr().out
    assert out.count("response of") == 2 and "This is the audio:'" in out and "' <audio>. " in out
    assert askable(Clip("a", "x", {})) == []


def test_the_tour_passes_its_own_check(toured, capsys):
    names = [
        f"{toured}/{n}.jsonl" for n in ("stage0", "stage1", "stage2", "stage3", "stage4", "held_out", "test")
    ]
    assert main(["check", *names, "--decode"]) == 0
    out = capsys.readouterr().out
    total = sum(len(read_lines(n)) for n in names)
    assert f"{total:,}" in out and "esc10" in out and "mixture" in out and "digit_choice" in out
    hours = {
        line.split()[1]: float(line.split()[3])
        for line in out.splitlines()
        if line.startswith(("sound", "speech", "music"))
    }
    assert hours["fsdd"] == round(50 * 0.2 / 3600, 2)


def test_toy_needs_no_data(tmp_path, capsys):
    if not shutil.which("espeak-ng"):
        pytest.skip("espeak-ng is not installed")
    out = str(tmp_path / "toy")
    assert main(["toy", "--out", out, "--each", "5"]) == 0
    assert main(["check", *(f"{out}/{n}.jsonl" for n in ("stage0", "stage4", "test"))]) == 0
    assert {e.dataset for e in read_manifest(f"{out}/stage0.jsonl")} >= {
        "fsdd",
        "speech_commands",
        "esc10",
        "berklee",
        "mixtures",
    }


def test_benchmark_speaks_the_benchmarks_formats(toured):
    mmsu = read_lines(f"{toured}/mmsu.jsonl")
    with open(f"{toured}/mmau.json") as f:
        mmau = json.load(f)
    assert mmsu and mmau and len(mmsu) + len(mmau) >= 40
    for q in mmsu:
        choices = [q[f"choice_{x}"] for x in "abcd"]
        assert (
            q["answer_gt"] in choices
            and len(set(choices)) == 4
            and all(
                q[k] for k in ("id", "question", "task_name", "category", "sub-category", "sub-sub-category")
            )
        )
        assert os.path.exists(os.path.join(toured, q["audio_path"]))
    for q in mmau:
        assert (q["task"] == "mixture") == (q["sub-category"] in ("background", "louder"))
        assert (
            q["answer"] in q["choices"]
            and q["task"] in ("sound", "music", "speech", "mixture")
            and os.path.exists(os.path.join(toured, q["audio_id"]))
        )
    trained = {
        os.path.realpath(e.audio) for n in range(1, 5) for e in read_manifest(f"{toured}/stage{n}.jsonl")
    }
    assert not trained & {
        os.path.realpath(os.path.join(toured, q.get("audio_path") or q["audio_id"])) for q in mmsu + mmau
    }


def test_stage_0_is_text_alone(toured, tmp_path, corpora):
    """The other stages' questions without clips, facts instead; sentences of the books as transcripts."""
    examples = read_manifest(f"{toured}/stage0.jsonl", 0)
    assert "speaker" not in {e.task for e in examples}  # who speaks is not to be read in imitated audio
    assert all(e.audio is None for e in examples) and {e.task for e in examples} >= {"asr", "digit", "sex"}
    books = tmp_path / "books"
    books.mkdir()
    (books / "a.txt").write_text(
        "It rained. The dog, who’d been out, came home! No\n\nA very " + "long " * 20 + "one.\n"
    )
    assert sentences_of(str(books)) == ["it rained", "the dog who'd been out came home"]
    out = str(tmp_path / "out")
    assert main(["tour", "--audio", corpora, "--out", out, "--strings", "20", "--text", str(books)]) == 0
    read = [e for e in read_manifest(f"{out}/stage0.jsonl", 0) if e.dataset == "books"]
    assert {e.answer for e in read} == {"it rained", "the dog who'd been out came home"}
    assert all(e.facts == {"words": e.answer} for e in read)


def test_sentences_to_copy(tmp_path, capsys):
    """Every sentence of the books once, strings of their words beside; a folder without books is refused."""
    (tmp_path / "a.txt").write_text("It rained. The dog came home!\nIt rained.\n")
    out = str(tmp_path / "m.jsonl")
    assert main(["sentences", str(tmp_path), "--out", out]) == 0
    lines = read_lines(out)
    read = [line["facts"]["words"] for line in lines if line["dataset"] == "books"]
    assert sorted(read) == ["it rained", "the dog came home"]
    strings = [e for e in read_manifest(out, 0) if e.dataset == "strings_in_text"]
    assert len(strings) == 10_000 == len(lines) - 2
    assert {word for e in strings for word in e.answer.split()} == {*DIGITS, *" ".join(read).split()}
    assert all(e.answer == e.facts["words"] and e.audio is None for e in read_manifest(out, 0))
    assert lines != sorted(lines, key=lambda line: line["dataset"])  # shuffled
    (tmp_path / "b").mkdir()
    assert main(["sentences", str(tmp_path / "b"), "--out", out]) == 2
    assert "holds no .txt" in capsys.readouterr().err and read_lines(out) == lines


def test_strings_in_text(toured):
    """A string of words is its own answer."""
    strings = [e for e in read_manifest(f"{toured}/stage0.jsonl", 0) if e.dataset == "strings_in_text"]
    assert strings and all(e.answer == e.facts["words"] and 1 <= len(e.answer.split()) <= 8 for e in strings)


def test_an_autoregressive_model_reads_no_facts(toured, config, tokenizer, tmp_path, capsys):
    model = build(dataclasses.replace(config, causal=True), seed=0)
    model.stage = 0
    save(model, tokenizer, str(tmp_path / "ar"), dtype=torch.float32)
    assert imitated.main([f"{toured}/test.jsonl", "--model", str(tmp_path / "ar")]) == 2
    assert "is autoregressive" in capsys.readouterr().err


def test_questions_are_answered_from_facts(toured, tmp_path, capsys):
    """A line a task and corpus; a manifest without facts is refused, and one without some is no trouble."""
    lines = read_lines(f"{toured}/test.jsonl")
    digits = [line for line in lines if line["task"] == "digit"]
    bare = [{k: v for k, v in line.items() if k != "facts"} | {"task": "bare"} for line in digits]
    manifest = tmp_path / "m.jsonl"
    manifest.write_text("".join(json.dumps(line) + "\n" for line in digits + bare))
    assert imitated.main([str(manifest)]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    n, share = line.split()[2:4]
    assert line.startswith("digit") and int(n) == len(digits) and float(share.rstrip("%")) >= 90
    manifest.write_text("".join(json.dumps(line) + "\n" for line in bare))
    assert imitated.main([str(manifest)]) == 2 and "no line has facts" in capsys.readouterr().err


def test_an_imitated_clip_holds_its_facts(tokenizer, config):
    """The transcript's pieces stand in their order among the semantic tokens, the facts among the acoustic.

    Equal pieces are parted by a blank; there is nothing else; what is drawn depends on the generator alone.
    """
    config = dataclasses.replace(config, n_frames=500)  # room for all of it
    facts = {"words": "seven qqq rain", "sex": "speaker", "sound": "dog", "speaker": "jackson"}
    pieces = tokenizer.encode(facts["words"], add_special_tokens=False).ids
    assert any(a == b for a, b in itertools.pairwise(pieces))
    known = [i for v in ("speaker", "dog") for i in tokenizer.encode(" " + v, add_special_tokens=False).ids]
    firsts = set()

    def make(seed, is_transcript=True):
        generator = torch.Generator().manual_seed(seed)
        return imitate_audio(facts, tokenizer, config, generator, is_transcript)

    for seed in range(60):
        made, again = make(seed), make(seed)
        assert all(torch.equal(made[k], again[k]) for k in made)
        ids = made["ids"][:, 0].tolist()
        shown = any(i in known for i in ids[: config.n_queries])
        n_first = config.n_queries if shown else config.n_soft_prompts
        firsts.add(n_first)
        if shown:
            assert set(made["ids"][:n_first].flatten().tolist()) <= set(known)
            assert len(set(ids[:n_first])) == min(len(known), config.n_queries)
        # CTC's reading: repeats, then blanks go
        spoken = [key for key, _ in itertools.groupby(ids[n_first:])]
        assert [i for i in spoken if i != config.eos_id] == pieces
        loud = made["weights"].sum(1)
        assert loud.min() > 0.39 and loud.max() < 1.41 and made["noise"].shape == (len(ids), config.width)
        asked = make(seed, is_transcript=False)["ids"]  # a question about a fact can always be answered
        assert set(asked[: config.n_queries].flatten().tolist()) <= set(known)
    assert firsts == {config.n_queries, config.n_soft_prompts}


def test_imitated_audio_is_mixed_loud_and_noisy_in_many_ways(tokenizer, config):
    """Loudness from 0.4 to 1.4, noise up to 0.8, up to half of a second fact; words are not mixed."""
    facts, shares, loudness, noise, most = {"words": "two", "sex": "rain", "sound": "dog"}, [], [], [], set()
    for seed in range(200):
        made = imitate_audio(facts, tokenizer, config, torch.Generator().manual_seed(seed))
        loudness += made["weights"].sum(1).tolist()
        noise.append(made["noise"].std().item())
        share = made["weights"][:, 0] / made["weights"].sum(1)
        shares += share[: config.n_queries].tolist()
        assert torch.equal(share[config.n_queries :], torch.ones(len(share) - config.n_queries))
        first = made["ids"][: config.n_queries, 0].tolist()
        most.add(max(set(first), key=first.count))  # of five queries, three say the same
    for drawn, low, high in ((loudness, 0.4, 1.4), (shares, 0.5, 1.0), (noise, 0.0, 0.8)):
        edge = 0.05 * (high - low)
        assert low - edge < min(drawn) < low + edge and high - edge < max(drawn) < high + edge
        assert abs(sum(drawn) / len(drawn) - (low + high) / 2) < edge
    assert len(most) == 2  # neither fact always comes first
