"""Manifests, audio of every kind, the prompt byte for byte, and clean batches."""

import dataclasses
import itertools
import json
import math
import os
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import soundfile
import torch
import whisper.audio
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from data import (
    RESPONSE_UNIT,
    BatchBuilder,
    Example,
    answer_ids,
    answer_text,
    build_prompt,
    collate,
    encode_pair,
    encode_question,
    load_audio,
    log_mel,
    prompt_text,
    read_manifest,
    response_length,
    window_samples,
    window_seconds,
)
from model import PRESETS, SPECIAL_TOKENS
from runtime import loading
from runtime.errors import UserError
from runtime.loading import Manifest, Mixture, bucket, cost_of, epoch_length, schedule_of, size_of
from runtime.manifests import ASR_QUESTION, scan
from runtime.pieces import is_transcription
from runtime.recordings import split_clip
from tools.questions import seconds_of


def tone(rate, seconds=0.5, hertz=440.0, channels=1):
    wave = 0.5 * np.sin(2 * np.pi * hertz * np.arange(int(rate * seconds)) / rate)
    return np.repeat(wave[:, None], channels, 1)


# --------------------------------------------------------------------------------------- audio


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 22050, 44100, 48000, 96000, 192000])
def test_any_rate_comes_out_as_16_khz(tmp_path, rate):
    path = str(tmp_path / "a.wav")
    soundfile.write(path, tone(rate), rate)
    audio, notes = load_audio(path)
    assert audio.dtype == np.float32 and not notes and abs(len(audio) - 8000) <= 1
    expected = tone(16000)[: len(audio), 0]
    middle = slice(1000, 7000)
    assert np.abs(audio[middle] - expected[middle]).max() < 0.01


@pytest.mark.parametrize(
    "kind, subtype",
    [("wav", s) for s in ("PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW")]
    + [("flac", "PCM_16"), ("flac", "PCM_24"), ("ogg", "VORBIS"), ("mp3", None)],
)
def test_any_depth_and_format(tmp_path, kind, subtype):
    path = str(tmp_path / f"a.{kind}")
    soundfile.write(path, tone(16000, 1.0), 16000, subtype=subtype)
    audio, _ = load_audio(path)
    assert abs(np.sqrt((audio[3000:13000] ** 2).mean()) - 0.5 / 2**0.5) < 0.02


@pytest.mark.parametrize("channels", range(1, 9))
def test_channels_are_averaged(tmp_path, channels):
    path = str(tmp_path / "a.wav")
    wave = tone(16000, channels=channels) * np.linspace(0, 1, channels + 1)[1:]
    soundfile.write(path, wave, 16000, subtype="FLOAT")
    np.testing.assert_allclose(load_audio(path)[0], wave.mean(1), atol=1e-6)


def test_offset_duration_and_limit(tmp_path):
    path = str(tmp_path / "a.wav")
    ramp = np.linspace(-0.5, 0.5, 32000)
    soundfile.write(path, ramp, 16000, subtype="FLOAT")
    audio, notes = load_audio(path, offset=0.5, duration=0.25)
    np.testing.assert_allclose(audio, ramp[8000:12000], atol=1e-6)
    assert not notes
    audio, notes = load_audio(path, limit=1.0)
    np.testing.assert_allclose(audio, ramp[:16000], atol=1e-6)
    assert "2.0 s long" in notes[0] and "first 1 s" in notes[0]
    with pytest.raises(UserError, match="offset"):
        load_audio(path, offset=5.0)


@pytest.mark.parametrize(
    "part", [{"offset": math.nan}, {"duration": math.inf}, {"offset": -1.0}, {"duration": 1e300}]
)
def test_parts_that_are_none(tmp_path, part):
    soundfile.write(tmp_path / "a.wav", np.zeros(8000), 16000)
    with pytest.raises(UserError, match="no part of a clip"):
        load_audio(str(tmp_path / "a.wav"), **part)


def test_a_name_that_is_not_utf_8(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(16000), 16000)
    os.rename(tmp_path / "a.wav", os.fsencode(tmp_path) + b"/\xff.wav")
    assert len(load_audio(f"{tmp_path}/\udcff.wav")[0]) == 8000


def test_silence_is_noted(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(8000), 16000)
    assert "silent" in load_audio(str(tmp_path / "a.wav"))[1][0]


def test_flac_without_a_length_is_refused(tmp_path):
    """As an encoder that writes to a pipe leaves it: STREAMINFO's total of samples, 36 bits, is 0."""
    path = tmp_path / "pipe.flac"
    soundfile.write(str(path), np.zeros(4000), 16000)
    data = bytearray(path.read_bytes())
    data[21] &= 0xF0
    data[22:26] = bytes(4)
    path.write_bytes(data)
    with pytest.raises(UserError, match="does not say how long"):
        load_audio(str(path))
    assert len(load_audio(str(path), duration=0.1)[0]) == len(load_audio(str(path), limit=0.1)[0]) == 1600
    assert seconds_of(str(path)) is None


@pytest.mark.parametrize("size", [0xFFFFFFFF, 0x7FFFF000, 0x7FFFFF00])  # ffmpeg, SoX, arecord
def test_streamed_wav_without_a_size_is_read(tmp_path, size):
    """A program that writes to a pipe cannot know the size and leaves a large one: no truncation."""
    path = tmp_path / "a.wav"
    soundfile.write(path, tone(16000), 16000)
    data = bytearray(path.read_bytes())
    at = data.find(b"data")
    data[at + 4 : at + 8] = data[4:8] = size.to_bytes(4, "little")
    path.write_bytes(data)
    assert len(load_audio(str(path))[0]) == 8000


@pytest.mark.parametrize("n_bytes", [4, 5, 200_000])
def test_the_word_data_before_the_samples_is_no_header(tmp_path, n_bytes):
    """A chunk of text may hold the word, be of odd length, or be longer than any buffer."""
    path = tmp_path / "a.wav"
    soundfile.write(path, tone(16000), 16000)
    whole = path.read_bytes()
    at = whole.find(b"data")
    text = b"data" + b"\x7f" * (n_bytes - 4)
    chunk = b"junk" + len(text).to_bytes(4, "little") + text + b"\0" * (n_bytes % 2)
    path.write_bytes(whole[:at] + chunk + whole[at:])
    assert len(load_audio(str(path))[0]) == 8000
    path.write_bytes((whole[:at] + chunk + whole[at:])[:-100])
    with pytest.raises(UserError, match="cut short"):
        load_audio(str(path))


def test_a_damaged_mp3_that_claims_to_be_years_long(tmp_path):
    """The number of frames in LAME's header decides how much memory libsndfile's reader is given."""
    path = tmp_path / "a.mp3"
    soundfile.write(path, tone(8000), 16000)
    data = bytearray(path.read_bytes())
    at = data.find(b"Xing")
    data[at + 8 : at + 12] = b"\xff\xff\xff\x7f"
    path.write_bytes(data)
    with pytest.raises(UserError, match="cannot be read as audio"):
        load_audio(str(path))


def test_mel_is_whispers_clip_by_clip():
    c = PRESETS["tiny"]
    rng = np.random.default_rng(0)
    quiet = 0.01 * rng.standard_normal(24000).astype(np.float32)
    loud = rng.standard_normal(50000).astype(np.float32)
    mel, n_frames = log_mel(quiet, c)
    expected = whisper.audio.log_mel_spectrogram(whisper.audio.pad_or_trim(quiet, 160000), n_mels=80)
    assert torch.equal(mel, expected) and mel.shape == (80, 1000) and n_frames == 75
    together = whisper.audio.log_mel_spectrogram(
        np.stack([whisper.audio.pad_or_trim(a, 160000) for a in (quiet, loud)]), n_mels=80
    )
    assert not torch.allclose(together[0], mel)  # the trap: a batch shares one maximum
    assert log_mel(loud, PRESETS["diffa2"])[0].shape == (128, 3000)


def test_frame_counts():
    """mel frames = ceil(samples / 160), encoder frames = (mel frames - 1) // 2 + 1; 30 s -> 1500."""
    c = PRESETS["diffa2"]
    for samples, frames in (
        (1, 1),
        (160, 1),
        (161, 1),
        (320, 1),
        (321, 2),
        (960, 3),
        (961, 4),
        (16000, 50),
        (480000, 1500),
        (500000, 1500),
    ):
        assert log_mel(np.full(samples, 0.1, np.float32), c)[1] == frames
    assert window_seconds(c) == 30 and window_seconds(PRESETS["tiny"]) == 10


# --------------------------------------------------------------------------------------- prompt


def test_prompt_byte_for_byte():
    assert prompt_text("What emotion?") == (
        "<|startoftext|><|start_header_id|>system<|end_header_id|>\n\n"
        "You are a helpful voice assistant.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nThis is the audio: <audio>. What emotion?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def tokens_of(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("trim_offsets", [False, True])
def test_audio_goes_before_the_token_that_begins_the_placeholder(trim_offsets, tokenizer):
    """len(tokens up to and including "This is the audio: ") - 1, whatever the question contains."""
    from tokenizers import processors

    t = Tokenizer.from_str(tokenizer.to_str())
    t.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)  # some trim the space off the offsets
    for question in ("What emotion?", "This is the audio: <audio>. Which one?", "\n\n", " ", "é <audio>"):
        ids, at = build_prompt(t, question)
        head = prompt_text(question).split(" <audio>")[0]
        assert at == len(tokens_of(t, head + " ")) - 1
        assert t.decode(ids[:at], skip_special_tokens=False) == head
        assert t.decode(ids[at:], skip_special_tokens=False).startswith(" <audio>. ")
        assert ids == tokens_of(t, prompt_text(question)) and ids.count(t.token_to_id("<|startoftext|>")) == 1


def test_control_tokens_in_a_question_are_refused(tokenizer):
    for token in SPECIAL_TOKENS.values():
        with pytest.raises(UserError, match="control token"):
            build_prompt(tokenizer, f"hello {token} world")


def test_answer_text_stops_at_the_first_mark(tokenizer, config):
    ids = answer_ids(tokenizer, " Rain. ", config)
    assert ids[-1] == config.eot_id
    assert answer_text(tokenizer, ids + [config.eos_id] * 3, config) == "Rain."
    assert answer_text(tokenizer, ids[:-1] + [config.eos_id] + ids, config) == "Rain."
    assert answer_text(tokenizer, [config.eot_id], config) == ""


def test_response_length(tokenizer, config, tmp_path):
    """The next multiple of 16 after the end of turn plus 0-2 further 16s.

    Always an end mark; never the batch's doing.
    """
    assert [response_length(n, 0) for n in (1, 15, 16, 17, 31, 32)] == [16, 16, 32, 32, 32, 48]
    assert [response_length(n, 1) for n in (1, 15, 16, 33)] == [32, 32, 48, 64]
    (tmp_path / "m.jsonl").write_text(json.dumps({"messages": [user("Hm?"), assistant("Rain.")]}))
    example = read_manifest(str(tmp_path / "m.jsonl"))[0]
    lengths = set()
    for seed in range(40):
        item = encode_question(example, tokenizer, config, torch.Generator().manual_seed(seed))["text"]
        response = [t for t, a in zip(item["ids"], item["is_answer"], strict=True) if a]
        assert len(response) % RESPONSE_UNIT == 0 and item["is_answer"] == sorted(item["is_answer"])
        reply = answer_ids(tokenizer, "Rain.", config)
        assert response[: len(reply)] == reply and set(response[len(reply) :]) == {config.eos_id}
        assert item["ids"][: -len(response)] == build_prompt(tokenizer, "Hm?")[0]
        lengths.add(len(response))
    assert lengths == {16, 32, 48}


def test_text_that_does_not_fit_is_refused(tokenizer, config, tmp_path):
    (tmp_path / "m.jsonl").write_text(json.dumps({"messages": [user("Hm?"), assistant("rain " * 600)]}))
    with pytest.raises(UserError, match="m.jsonl:1"):
        encode_question(read_manifest(str(tmp_path / "m.jsonl"))[0], tokenizer, config)


def test_pairs_that_do_not_fit_are_refused(tokenizer, config):
    """Stage 4 and a causal model have the same limits as stages 1 to 3."""
    long = Example(0, None, "Q?", "a", rejected="word " * config.context)
    with pytest.raises(UserError, match="do not fit|at most"):
        encode_pair(long, tokenizer, config, None)
    causal = dataclasses.replace(config, causal=True)
    with pytest.raises(UserError, match="do not fit|at most"):
        encode_question(dataclasses.replace(long, answer=long.rejected), tokenizer, causal, None)


def test_collate_pads_with_validity_of_its_own(config):
    items = [
        {"ids": [7, 8, config.eos_id], "is_answer": [False, True, True], "audio_at": 1},
        {
            "ids": [7, 8, 9, 10, config.eos_id],
            "is_answer": [False, False, False, True, True],
            "audio_at": 2,
        },
    ]
    batch = collate(items, config)
    assert batch["ids"].tolist() == [[7, 8, config.eos_id] + [config.eos_id] * 2, items[1]["ids"]]
    assert batch["valid"].tolist() == [[True] * 3 + [False] * 2, [True] * 5]
    assert batch["is_answer"].sum(1).tolist() == [2, 2] and not (batch["is_answer"] & ~batch["valid"]).any()
    assert batch["audio_at"].tolist() == [1, 2]


def test_what_an_example_costs(tmp_path):
    """By hand.  A clip of unknown length, or beyond the window, counts as a whole window."""
    c = PRESETS["tiny"]
    example = Example(0, "a.wav", "1234", "567", duration=2.0, rejected="89")
    assert size_of(example) == (4 + 2 * 3 + 2 * 2, 2.0)
    assert cost_of((14, 2.0), c) == (55 + 3, 16 + 25)
    assert cost_of((14, -1.0), c) == cost_of((14, 1e6), c) == cost_of((14, 10.0), c) == (58, 16 + 125)
    # one line of the authors' is a short answer in stage 2, a long transcript in stage 1, a pair in stage 4
    entry = {
        "audio_id": 1,
        "audio_filepath": "a.wav",
        "input": "Hm?",
        "target": "a",
        "transcription": "b" * 9,
    }
    path = tmp_path / "m.jsonl"
    for more, n in (({}, 3 + 2 * 9), ({"rejected": "c" * 50}, 3 + 2 + 2 * 50)):
        path.write_text(json.dumps(entry | more) + "\n")
        assert Manifest(str(path)).size(0) == (n, -1.0)


def test_buckets_keep_to_the_budget():
    """Also where the longest text and the longest audio are of two examples: both are padded."""
    g = torch.Generator().manual_seed(0)
    pairs = [(90, 0), (10, 0), (10, 40), (40, 10), (300, 0), (0, 40), (20, 0)]
    costs = pairs + torch.randint(1, 50, (500, 2), generator=g).tolist()
    batches = bucket(range(len(costs)), costs, 100)
    assert sorted(i for b in batches for i in b) == list(range(len(costs))) and [4] in batches
    for b in batches:
        text, audio = (max(costs[i][kind] for i in b) for kind in (0, 1))
        assert len(b) == 1 or (text + audio) * len(b) <= 100
    assert bucket([], costs, 100) == [[]]


def test_buckets_waste_little():
    lengths = torch.randint(1, 300, (1003,), generator=torch.Generator().manual_seed(0)).tolist()
    batches = bucket(range(1003), [(n, 0) for n in lengths], 2000)
    assert sorted(i for b in batches for i in b) == list(range(1003))

    def waste(groups):
        return sum(max(lengths[i] for i in b) * len(b) for b in groups) / sum(lengths)

    assert waste(batches) < 1.1 < 1.5 < waste([list(range(i, min(i + 8, 1003))) for i in range(0, 1003, 8)])


# --------------------------------------------------------------------------------------- manifests


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


@pytest.fixture
def clip(tmp_path):
    os.makedirs(tmp_path / "clips", exist_ok=True)
    soundfile.write(tmp_path / "clips" / "a.wav", tone(16000), 16000)
    return "clips/a.wav"


def manifest(tmp_path, *lines, name="m.jsonl"):
    path = tmp_path / name
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines) + "\n")
    return str(path)


def test_canonical_manifest(tmp_path, clip):
    line = {
        "messages": [user("<audio>What emotion?"), assistant("Sad.")],
        "audios": [clip],
        "rejected_response": "Happy.",
    }
    (e,) = read_manifest(manifest(tmp_path, line, ""), stage=4)
    assert (e.question, e.answer, e.rejected) == ("What emotion?", "Sad.", "Happy.")
    assert e.audio == str(tmp_path / "clips" / "a.wav") and e.where.endswith("m.jsonl:1")


def test_nemo_manifest(tmp_path, clip):
    (e,) = read_manifest(
        manifest(tmp_path, {"audio_filepath": clip, "duration": 0.2, "offset": 0.1, "text": "one two"})
    )
    assert (e.question, e.answer, e.offset, e.duration) == (ASR_QUESTION, "one two", 0.1, 0.2)
    assert e.facts == {"words": "one two"}  # a transcript, for CTC and for stage 0


def test_authors_manifest(tmp_path, clip):
    entry = {
        "audio_id": "x",
        "audio_filepath": clip,
        "input": "Q?",
        "target": "T",
        "transcription": "words",
        "rejected": "R",
        "chosen": "ignored",
        "duration": 0.5,
        "dataset": "d",
        "seed_transcript": "s",
    }
    path = tmp_path / "m.json"
    path.write_text(json.dumps([entry, entry]))
    assert [e.answer for e in read_manifest(str(path), stage=1)] == ["words", "words"]
    e = read_manifest(str(path), stage=4)[1]
    assert (e.id, e.question, e.answer, e.rejected, e.dataset) == (1, "Q?", "T", "R", "d")
    path.write_text(json.dumps([{**entry, "input": ""}]))
    assert read_manifest(str(path), stage=1)[0].question == ASR_QUESTION


@pytest.mark.parametrize(
    "line, says",
    [
        ("{not json", "not JSON"),
        ("[1]", "not a JSON object"),
        ('"text"', "not a JSON object"),
        ({"foo": 1}, "messages"),
        ({"messages": [user("Q")], "audios": []}, "one of role user and one of role assistant"),
        ({"messages": [user("Q"), {"role": "assistant"}]}, "content"),
        ({"messages": [user("<audio>"), assistant("A")]}, "question is empty"),
        ({"messages": [user("Q"), assistant("A")], "audios": ["a.wav", "b.wav"]}, "more than one audio"),
        ({"messages": [user("<audio><audio>Q"), assistant("A")], "audios": ["a.wav"]}, "more than one audio"),
        ({"messages": [user("Q"), assistant("A")], "audios": ["missing.wav"]}, "missing.wav"),
        ({"messages": [user("Q <|eot_id|>"), assistant("A")]}, "control token"),
        ({"audio_filepath": "clips/a.wav", "target": "T"}, "audio_id"),
        ({"audio_filepath": "clips/a.wav", "audio_id": 1}, "target"),
        ({"audio_filepath": "clips/a.wav", "text": 5}, "text"),
        ({"audio_filepath": "clips/a.wav", "text": "a", "offset": -1}, "offset"),
        ({"audio_filepath": "clips/a.wav", "text": "a", "duration": "x"}, "duration"),
        ({"audio_filepath": "clips/a.wav", "text": "a", "duration": 1e305}, "duration"),
        ({"audio_filepath": "clips/a.wav", "text": "a", "offset": 10**400}, "offset"),
        ('{"text": ' + "9" * 5000 + "}", "not JSON"),
        ({"audio_filepath": "clips/a.wav", "text": "\ud800"}, "not text in UTF-8"),
        ({"messages": [user("\udce9?"), assistant("A")]}, "not text in UTF-8"),
        ({"messages": [user("Q?"), assistant("A")], "facts": {"words": "\ud800"}}, "not text in UTF-8"),
        ({"messages": [user("Q?"), assistant("A")], "facts": {"words": 5}}, "facts must be text"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_bad_manifest_lines_name_file_and_line(tmp_path, clip, line, says):
    good = {"audio_filepath": clip, "text": "a"}
    with pytest.raises(UserError) as e:
        read_manifest(manifest(tmp_path, good, good, line))
    assert "m.jsonl:3" in str(e.value) and says in str(e.value) and "\n" not in str(e.value)


def test_bad_manifests(tmp_path, clip):
    with pytest.raises(UserError, match="no such manifest"):
        read_manifest(str(tmp_path / "none.jsonl"))
    with pytest.raises(UserError, match="holds no example"):
        read_manifest(manifest(tmp_path, ""))
    with pytest.raises(UserError, match="entry 2"):
        read_manifest(
            manifest(
                tmp_path,
                json.dumps([{"audio_id": 1, "audio_filepath": clip, "target": "T"}, 5]),
                name="m.json",
            )
        )
    with pytest.raises(UserError, match="not JSON"):
        read_manifest(manifest(tmp_path, '[{"audio_id": 1}', name="m.json"))
    (tmp_path / "b.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not a text file"):
        read_manifest(str(tmp_path / "b.jsonl"))
    with pytest.raises(UserError, match="rejected"):
        read_manifest(
            manifest(tmp_path, {"messages": [user("Q"), assistant("A")], "audios": [clip]}), stage=4
        )


def test_llada_style_tokenizer_position():
    """A byte-level tokenizer with no merges: the position still falls before the space of ' <audio>'."""
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    t = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    t.add_special_tokens(list(SPECIAL_TOKENS.values()))
    ids, at = build_prompt(t, "Hm?")
    assert t.decode(ids[at : at + 8]) == " <audio>"


# ------------------------------------------------------------------------- clips beyond the window


@pytest.mark.parametrize("seconds", [0.01, 1.99, 2.0, 2.01, 3.0, 4.3, 61.7])
def test_split_clip_uses_each_sample_once(config, seconds):
    """Pieces are whole, in order, fit the window; none but the last is shorter than a quarter of it."""
    window = config.n_frames * 320
    audio = np.random.default_rng(0).uniform(-1, 1, int(seconds * 16000)).astype(np.float32)
    pieces = split_clip(audio, window_samples(config))
    assert pieces[0][0] == 0 and pieces[-1][1] == len(audio)
    assert all(a[1] == b[0] for a, b in zip(pieces[:-1], pieces[1:], strict=True))
    assert all(0 < end - start <= window for start, end in pieces)
    assert all(end - start >= window // 4 for start, end in pieces[:-1])
    assert (len(pieces) == 1) == (len(audio) <= window)


def test_split_clip_cuts_where_it_is_quiet(config):
    """Silences of 0.4 s at 1.3, 2.6 and 4.2 s: the cuts lie within them."""
    audio = np.random.default_rng(0).uniform(-1, 1, 5 * 16000).astype(np.float32)
    for start in (1.3, 2.6, 4.2):
        audio[int(start * 16000) : int((start + 0.4) * 16000)] = 0
    cuts = [end / 16000 for _, end in split_clip(audio, window_samples(config))[:-1]]
    assert len(cuts) == 3
    for cut, start in zip(cuts, (1.3, 2.6, 4.2), strict=True):
        assert start < cut < start + 0.4


def test_of_equal_pauses_the_first_is_cut(config):
    """Words parted by digital silence: short pieces, for a small model reads a long one worse."""
    window = window_samples(config)
    audio = np.tile(np.concatenate([tone(16000, 0.1)[:, 0], np.zeros(6400)]), 60)  # 0.1 s in every 0.5 s
    pieces = split_clip(audio, window)
    for start, end in pieces[:-1]:
        assert window // 4 <= end - start <= window // 4 + 8000 and not audio[end - 2000 : end + 2000].any()


def test_silence_is_cut_into_as_few_pieces_as_noise(config):
    window = window_samples(config)
    pieces = split_clip(np.zeros(20 * window, np.float32), window)
    assert len(pieces) <= 23 and all(end - start > 0.9 * window for start, end in pieces[:-1])


# ------------------------------------------------------------------------- manifests of any length


def lines_in(kind):
    """Entries of each format, with letters of more than a byte and empty lines between."""
    texts = ["Ä dog?", "Was hört man — ja?", '"quoted" [x], {y}', "日本語" * 50]
    if kind == "messages":
        return [
            {"messages": [user(t), assistant(t[::-1])], "audios": ["a.wav"], "duration": 2.5} for t in texts
        ]
    if kind == "nemo":
        return [{"audio_filepath": "a.wav", "text": t, "duration": 1.5, "offset": 0.5} for t in texts]
    return [{"audio_id": i, "audio_filepath": "a.wav", "input": t, "target": t} for i, t in enumerate(texts)]


def write_entries(path, entries, kind):
    if kind == "list":
        path.write_text(json.dumps(entries, indent=2, ensure_ascii=False), encoding="utf-8")
    else:
        path.write_text("\n\n".join(json.dumps(e, ensure_ascii=False) for e in entries), encoding="utf-8")


@pytest.mark.parametrize("kind", ["messages", "nemo", "authors", "list"])
def test_a_manifest_is_opened_and_not_read(kind, config, tmp_path):
    """Example by example what read_manifest reads whole; costs are those of the examples."""
    path = tmp_path / "m.json"
    write_entries(path, lines_in(kind), kind)
    whole, opened = read_manifest(str(path), check=False), Manifest(str(path))
    assert [opened[i] for i in range(len(opened))] == whole and len(whole) == 4
    mixture = Mixture([str(path)])
    costs = [cost_of(mixture.size(i), config) for i in range(4)]
    assert costs == [cost_of(size_of(e), config) for e in whole]
    with pytest.raises(IndexError):
        opened[4]


def write_numbered(path, letter, n):
    entries = [{"audio_filepath": f"{letter}.wav", "text": f"{letter} {i}"} for i in range(n)]
    write_entries(path, entries, "nemo")


def test_shares_of_several_manifests(tmp_path):
    """In four epochs: all of one in each, every example of a quarter's manifest once, of 1.5 six times."""
    (tmp_path / "other").mkdir()
    paths = [tmp_path / "a.jsonl", tmp_path / "other" / "b.jsonl", tmp_path / "c.jsonl"]
    for path, n in zip(paths, (30, 40, 10), strict=True):
        write_numbered(path, path.stem, n)
    sources = [str(paths[0]), f"{paths[1]}:0.25", f"{paths[2]}:1.5"]
    mixture = Mixture(sources)
    assert len(mixture) == 80 and epoch_length(mixture.shares) == 30 + 10 + 15
    assert [mixture[i].id for i in range(80)] == list(range(80))
    assert mixture[29].answer == "a 29" and mixture[30].answer == "b 0" and mixture[79].answer == "c 9"
    assert mixture[30].audio == str(tmp_path / "other" / "b.wav") and mixture.where(31) == f"{paths[1]}:3"
    epochs = [[], [], [], []]
    schedule = list(itertools.islice(schedule_of(mixture.shares, 8, 5), 4 * 7))
    for _, epoch, ids in schedule:
        epochs[epoch] += ids
    for ids in epochs:
        counts = Counter(mixture[i].answer[0] for i in ids)
        assert counts == {"a": 30, "b": 10, "c": 15} and ids != sorted(ids)
        assert sorted(i for i in ids if i < 30) == list(range(30))
        assert set(range(70, 80)) <= set(ids)
    read = Counter(i for ids in epochs for i in ids)
    assert all(read[i] == 4 for i in range(30)) and all(read[i] == 1 for i in range(30, 70))
    assert all(read[i] == 6 for i in range(70, 80))
    assert list(itertools.islice(schedule_of(mixture.shares, 8, 5, start=9), 19)) == schedule[9:]


@pytest.mark.parametrize(
    "source, says",
    [
        ("a.jsonl:0", "above 0"),
        ("a.jsonl:1" + "0" * 30, "at the most"),
        ("a.jsonl:0.1", "none of them"),
        ("a.jsonl:x", "no such manifest"),
    ],
)
def test_a_share_that_makes_no_sense(source, says, tmp_path):
    write_numbered(tmp_path / "a.jsonl", "a", 3)
    with pytest.raises(UserError, match=says):
        Mixture([str(tmp_path / source)])


def test_a_long_list_is_cut_a_chunk_at_a_time(tmp_path):
    entries = lines_in("list") * 30
    path = tmp_path / "m.json"
    write_entries(path, entries, "list")
    for chunk in (1, 7, 64, 1000):
        with open(path, "rb") as f:
            found = [json.loads(raw) for _, _, raw in scan(f, str(path), chunk)]
        assert found == entries
    data = path.read_bytes()
    for start, number, raw in scan(open(path, "rb"), str(path)):  # noqa: SIM115
        assert data[start : start + len(raw)] == raw and json.loads(raw) == entries[number - 1]
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="entry [0-9]+: not JSON"):
        Manifest(str(path))


@pytest.mark.parametrize("rate", [8000, 16000, 48000])
def test_a_segment_begins_at_its_second_at_any_rate(tmp_path, rate):
    path = str(tmp_path / "steps.wav")
    soundfile.write(path, np.repeat([0.1, 0.2, 0.3, 0.4], rate // 2), rate)  # half a second each
    audio, _ = load_audio(path, offset=1.0, duration=0.5)
    assert len(audio) == 8000 and np.abs(audio[500:-500] - 0.3).max() < 1e-3


@pytest.mark.parametrize("extension, subtype", [("ogg", "OPUS"), ("flac", "PCM_16"), ("wav", "PCM_16")])
def test_a_segment_of_a_long_recording_is_sought(tmp_path, extension, subtype):
    """The last seconds of three minutes (GigaSpeech's Opus among them): a small part of the file is read."""
    path = str(tmp_path / f"long.{extension}")
    noise = np.random.default_rng(0).uniform(-0.3, 0.3, 180 * 16000)
    soundfile.write(path, noise, 16000, subtype=subtype)

    def bytes_read():
        with open("/proc/self/io") as f:
            return int(f.readline().split()[1])

    before = bytes_read()
    audio, _ = load_audio(path, offset=170.0, duration=2.0)
    assert len(audio) == 32000 and bytes_read() - before < 0.25 * os.path.getsize(path)


def test_the_index_is_built_once_and_again_when_it_must(tmp_path, monkeypatch):
    path, built = tmp_path / "m.jsonl", []
    write_entries(path, lines_in("messages"), "messages")
    real = loading.build_index

    def counted(*args):
        built.append(1)
        return real(*args)

    monkeypatch.setattr(loading, "build_index", counted)
    index = tmp_path / "m.jsonl.index.npy"
    assert len(Manifest(str(path))) == len(Manifest(str(path))) == 4 and len(built) == 1
    index.write_bytes(index.read_bytes()[:-10])  # cut
    assert len(Manifest(str(path))) == 4 and len(built) == 2
    write_entries(path, lines_in("messages") * 2, "messages")  # changed
    assert len(Manifest(str(path))) == 8 and len(built) == 3
    # a folder that cannot be written: the index lies elsewhere
    index.unlink()
    os.mkdir(index)
    assert len(Manifest(str(path))) == 8 and len(built) == 4
    assert len(Manifest(str(path))) == 8 and len(built) == 4


def test_a_bad_line_is_told_of_when_it_is_met(config, tokenizer, tmp_path):
    path = tmp_path / "m.jsonl"
    soundfile.write(str(tmp_path / "a.wav"), np.zeros(1600), 16000)
    good = json.dumps({"messages": [user("Hm?"), assistant("Rain.")], "audios": ["a.wav"]})
    path.write_text("\n".join([good, "{not json", good, json.dumps({"messages": []})]))
    manifest = Mixture([str(path)])
    examples, skipped = manifest.read([0, 1, 2, 3])
    micro = BatchBuilder(tokenizer, config, encode_question, 0)(examples, 0)
    assert micro["ids"] == [0, 2] and [s["id"] for s in skipped] == [1, 3]
    assert [s["where"] for s in skipped] == [f"{path}:2", f"{path}:4"]
    assert "not JSON" in skipped[0]["why"]
    with pytest.raises(UserError, match="holds no example"):
        (tmp_path / "empty.jsonl").write_text("\n")
        Manifest(str(tmp_path / "empty.jsonl"))
    with pytest.raises(UserError, match="no such manifest"):
        Manifest(str(tmp_path / "gone.jsonl"))


def test_a_list_with_something_behind_it_is_refused(tmp_path):
    path = tmp_path / "m.json"
    entries = json.dumps(lines_in("list"))
    path.write_text(" " * 100 + entries + "\n")
    assert len(Manifest(str(path))) == 4
    path.write_text(entries + entries)
    with pytest.raises(UserError, match="follows the list"):
        Manifest(str(path))


@pytest.mark.parametrize("field, value", [("facts", {"words": 3}), ("rejected_response", 5)])
def test_fields_of_the_wrong_type_are_refused(field, value, tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text(json.dumps({"messages": [user("Hm?"), assistant("Rain.")], field: value}))
    with pytest.raises(UserError, match="must be text"):
        read_manifest(str(path))
    with pytest.raises(UserError, match="must be text"):
        Manifest(str(path))[0]


def test_which_questions_are_transcriptions():
    for question in (
        "Please transcribe the audio to text.",
        "What is said?",
        "Transcribe the recording.",
        "Write down what is said.",
        "What does the speaker say?",
        "Transcribe the following audio.",
        "Transcribe what you hear, word for word.",
        "What is said here?",
        "Give a transcript of the audio.",
    ):
        assert is_transcription(question), question
    for question in (
        "Answer what is said in the audio.",
        "Choose: A. a transcript",
        "Is this speech?",
        "What is said about the price?",
        "What is said first?",
        "Transcribe and translate it.",
        "Transcribe the emotion of the speaker",
    ):
        assert not is_transcription(question), question


@pytest.mark.parametrize("argv, says", [(["none.wav"], "no such file"), ([__file__], "cannot be read as")])
def test_the_program_refuses_bad_input_in_one_line(argv, says):
    command = [sys.executable, os.path.join(os.path.dirname(__file__), "..", "data.py"), *argv]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and says in done.stderr and done.stderr.count("\n") == 1


def test_messages_in_another_order_are_refused(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text(json.dumps({"messages": [assistant("Rain."), user("Hm?")]}))
    with pytest.raises(UserError, match="in this order"):
        read_manifest(str(path))


def test_an_index_of_another_form_is_built_anew(tmp_path):
    """One that an older version of this code wrote, with the manifest's own time."""
    path, index = tmp_path / "m.jsonl", tmp_path / "m.jsonl.index.npy"
    write_entries(path, lines_in("messages"), "messages")
    np.save(index, np.zeros(9, dtype=[("start", "i8"), ("size", "i4")]))
    changed = os.stat(path).st_mtime_ns
    os.utime(index, ns=(changed, changed))
    assert len(Manifest(str(path))) == 4 and len(np.load(index)) == 4
