"""Corpora that are not at hand, as miniature trees in their published layout.

What tools/corpora.py reads out of them is compared with what the trees were made from.
"""

import csv
import inspect
import json
import os

import pytest
from conftest import sound
from test_prepare import SMALL_CORPORA

from data import read_manifest
from tools import corpora, prepare
from tools.corpora import CORPORA, read_corpus
from tools.prepare import main
from tools.spoken_questions import INSTRUCTIONS


def put(path, text):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w", encoding="utf-8") as f:
        f.write(text)


def table(path, rows, delimiter=","):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as f:
        writer = csv.DictWriter(f, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


def lines(path, rows):
    put(path, "".join(json.dumps(row) + "\n" for row in rows))


def esc50(d):
    sound(f"{d}/audio/1-100032-A-0.wav")
    sound(f"{d}/audio/5-9032-A-0.wav")
    rows = [
        {"filename": f"{n}.wav", "fold": n[0], "target": 0, "category": "clock_tick", "esc10": True}
        for n in ("1-100032-A-0", "5-9032-A-0")
    ]
    table(f"{d}/meta/esc50.csv", rows)
    return [({"sound": "clock tick"}, False), ({"sound": "clock tick"}, True)]


def vctk(d):
    sound(f"{d}/wav48_silence_trimmed/p225/p225_001_mic1.flac")
    sound(f"{d}/wav48_silence_trimmed/p230/p230_002_mic1.flac")
    put(f"{d}/txt/p225/p225_001.txt", "Please call Stella.\n")
    put(
        f"{d}/speaker-info.txt",
        "ID  AGE  GENDER  ACCENTS  REGION COMMENTS\n"
        "p225  23  F    English    Southern  England\n"
        "p230  22  F  Irish  Dublin\n",
    )
    return [
        ({"speaker": "p225", "words": "Please call Stella.", "sex": "female", "accent": "English"}, False),
        ({"speaker": "p230", "sex": "female", "accent": "Irish"}, True),
    ]


def voxceleb1(d):
    sound(f"{d}/wav/id10001/1zcIwhmdeo4/00001.wav")
    sound(f"{d}/wav/id10270/5r0dWxy17C8/00001.wav")
    put(
        f"{d}/vox1_meta.csv",
        "VoxCeleb1 ID\tVGGFace1 ID\tGender\tNationality\tSet\n"
        "id10001\tA.J._Buckley\tm\tIreland\tdev\n"
        "id10270\tEartha\tf\tUSA\ttest\n",
    )
    return [
        ({"speaker": "id10001", "sex": "male", "nationality": "Ireland"}, False),
        ({"speaker": "id10270", "sex": "female", "nationality": "USA"}, True),
    ]


def emov_db(d):
    sound(f"{d}/bea/Amused/amused_1-15_0001.wav")
    sound(f"{d}/sam_Neutral/neutral_1.wav")
    return [
        ({"speaker": "bea", "emotion": "amused", "sex": "female"}, True),
        ({"speaker": "sam", "emotion": "neutral", "sex": "male"}, True),
    ]


def iemocap(d):
    for session in (1, 5):
        sound(f"{d}/Session{session}/sentences/wav/Ses0{session}F_impro01/Ses0{session}F_impro01_F000.wav")
        put(
            f"{d}/Session{session}/dialog/EmoEvaluation/Ses0{session}F_impro01.txt",
            "% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]\n\n"
            f"[6.2901 - 8.2357]\tSes0{session}F_impro01_F000\tneu\t[2.5000, 2.5000, 2.5000]\n",
        )
        put(
            f"{d}/Session{session}/dialog/transcriptions/Ses0{session}F_impro01.txt",
            f"Ses0{session}F_impro01_F000 [006.2901-008.2357]: Excuse me.\n",
        )
    facts = {"emotion": "neutral", "words": "Excuse me.", "sex": "female"}
    return [(facts | {"speaker": "session 1 F"}, False), (facts | {"speaker": "session 5 F"}, True)]


def accentdb(d):
    sound(f"{d}/data/american/speaker_01/american_s01_001.wav")
    sound(f"{d}/data/american/speaker_01/american_s01_002.wav")
    return [
        ({"accent": "American", "speaker": "american 01"}, False),
        ({"accent": "American", "speaker": "american 01"}, True),
    ]


def vocalsound(d):
    sound(f"{d}/audio_16k/f0003_0_throatclearing.wav")
    sound(f"{d}/audio_16k/m0010_0_laughter.wav")
    return [
        ({"sound": "throat clearing", "sex": "female", "speaker": "f0003"}, False),
        ({"sound": "laughter", "sex": "male", "speaker": "m0010"}, True),
    ]


def gigaspeech(d):
    sound(f"{d}/audio/youtube/P0000/YOU0001.opus.wav", 1.0)
    os.rename(f"{d}/audio/youtube/P0000/YOU0001.opus.wav", f"{d}/audio/youtube/P0000/YOU0001.wav")
    segments = [
        {
            "sid": "YOU0001_S1",
            "begin_time": 0.1,
            "end_time": 0.4,
            "text_tn": "AS THEY'RE LEAVING <COMMA> CAN KASH <QUESTIONMARK>",
            "subsets": ["{XL}"],
        },
        {
            "sid": "YOU0001_S2",
            "begin_time": 0.5,
            "end_time": 0.9,
            "text_tn": "<NOISE>",
            "subsets": ["{TEST}"],
        },
    ]
    put(
        f"{d}/GigaSpeech.json",
        json.dumps(
            {
                "dataset": "GigaSpeech",
                "audios": [
                    {"aid": "YOU0001", "path": "audio/youtube/P0000/YOU0001.opus", "segments": segments}
                ],
            }
        ),
    )
    return [({"words": "as they're leaving, can kash?"}, False), ({}, True)]


def meld(d):
    for split in ("train_splits", "output_repeated_splits_test"):
        sound(f"{d}/{split}/dia0_utt0.wav")
    row = {
        "Sr No.": 1,
        "Utterance": "Oh!",
        "Speaker": "Joey",
        "Emotion": "joy",
        "Sentiment": "positive",
        "Dialogue_ID": 0,
        "Utterance_ID": 0,
    }
    table(f"{d}/train_sent_emo.csv", [row])
    table(f"{d}/test_sent_emo.csv", [row | {"Emotion": "fear"}])
    return [
        ({"words": "Oh!", "emotion": "happy", "speaker": "Joey"}, False),
        ({"words": "Oh!", "emotion": "fearful", "speaker": "Joey"}, True),
    ]


def meta_fair_asr(d):
    sound(f"{d}/asr_fairness_audio/abc123.wav")
    table(
        f"{d}/downloaded_file.tsv",
        [
            {
                "hash_name": "abc123",
                "transcription": "Call Mom",
                "age": "18-22",
                "gender": "female",
                "ethnicity": "x",
            }
        ],
        "\t",
    )
    return [({"words": "call mom", "sex": "female"}, False)]


def paraspeechcaps(d):
    sound(f"{d}/audio/voxceleb/a/1.wav")
    lines(
        f"{d}/train.jsonl",
        [
            {
                "source": "voxceleb",
                "relative_audio_path": "audio/voxceleb/a/1.wav",
                "text_description": ["A man talks fast."],
                "transcription": "Hi.",
                "gender": "male",
                "accent": "American",
            }
        ],
    )
    return [({"words": "Hi.", "sex": "male", "accent": "American", "caption": "A man talks fast."}, False)]


def speechcraft(d):
    sound(f"{d}/wav/x/1.wav")
    lines(f"{d}/train.jsonl", [{"audio_path": "wav/x/1.wav", "caption": "A calm voice."}])
    return [({"caption": "A calm voice."}, False)]


def tacos(d):
    sound(f"{d}/audio/12.wav")
    sound(f"{d}/audio/13.wav")
    row = {"filename": "12.mp3", "text": "A bell.", "onset": 0.05, "offset": 0.15}
    table(f"{d}/annotations_strong.csv", [row, row | {"filename": "13.mp3", "text": "A dog."}])
    table(f"{d}/annotations_weak.csv", [{"filename": "12.mp3", "text": "A bell rings."}])
    table(f"{d}/metadata.csv", [{"filename": "12.mp3", "author": "x"}])
    table(f"{d}/test_split.csv", [{"filename": "13.mp3"}])
    return [({"caption": "A bell."}, False), ({"caption": "A dog."}, True)]


def compa_r(d):
    sound(f"{d}/audio/Yabc.flac")
    put(
        f"{d}/CompA-R.json",
        json.dumps(
            [
                {
                    "audio_id": "./audio/Yabc.flac",
                    "instruction": "Why does the crowd cheer?",
                    "output": "Someone has won.",
                }
            ]
        ),
    )
    return [({}, False)]


def opens2s(d):
    sound(f"{d}/wav/q1.wav")
    lines(
        f"{d}/en.jsonl", [{"audio": "wav/q1.wav", "emotion": "sad", "response": "I am sorry to hear that."}]
    )
    return [({"emotion": "sad"}, False)]


def nsynth(d):
    for split in ("nsynth-train", "nsynth-test"):
        sound(f"{d}/{split}/audio/{split[7:]}_lead_001-022-075.wav")
        put(
            f"{d}/{split}/examples.json",
            json.dumps(
                {f"{split[7:]}_lead_001-022-075": {"instrument_family_str": "synth_lead", "pitch": 22}}
            ),
        )
    return [({"instrument": "synth lead"}, True), ({"instrument": "synth lead"}, False)]


def fma_medium(d):
    sound(f"{d}/fma_medium/000/000002.flac")
    put(
        f"{d}/fma_metadata/tracks.csv",
        ",set,set,track\n,split,subset,genre_top\ntrack_id,,,\n"
        "2,training,medium,Hip-Hop\n3,test,medium,Rock\n",
    )
    return [({"genre": "hip-hop"}, False)]


def captions(field, name, rows, clips, test):
    def make(d):
        for clip in clips:
            sound(f"{d}/{clip}")
        (lines if name.endswith(".jsonl") else table)(f"{d}/{name}", rows)
        return [({"caption": rows[0][field]}, test)]

    return make


def wavcaps(d):
    sound(f"{d}/audio/FreeSound/180913.flac")
    put(f"{d}/json_files/blacklist/blacklist_exclude_all_ac.json", json.dumps({"FreeSound": ["1"]}))
    put(
        f"{d}/json_files/FreeSound/fsd_final.json",
        json.dumps(
            {
                "num_captions_per_audio": 1,
                "data": [{"id": "180913", "caption": "A dog barks.", "duration": 1.5}],
            }
        ),
    )
    return [({"caption": "A dog barks."}, False)]


def audiomcq(d):
    sound(f"{d}/audio/Clotho/1.wav")
    lines(
        f"{d}/AudioMCQ.jsonl",
        [
            {
                "audio_path": "audio/Clotho/1.wav",
                "question": "What passes by?",
                "choices": ["a car", "a train"],
                "answer": "a train",
            }
        ],
    )
    return [({}, False)]


def speechocean762(d):
    """Kaldi's layout: as published values follow a tab or a blank, the audio is .WAV."""
    sound(f"{d}/WAVE/SPEAKER0001/000010011.wav")
    os.rename(f"{d}/WAVE/SPEAKER0001/000010011.wav", f"{d}/WAVE/SPEAKER0001/000010011.WAV")
    sound(f"{d}/WAVE/SPEAKER0005/000050012.ogg", 0.5)
    for split, speaker, utterance, words, sex, age in (
        ("train", "0001", "000010011", "WE CALL IT BEAR", "m", 6),
        ("test", "0005", "000050012", "IT'S FINE", "f", 13),
    ):
        put(f"{d}/{split}/text", f"{utterance}\t{words}\n")
        put(f"{d}/{split}/wav.scp", f"{utterance}\tWAVE/SPEAKER{speaker}/{utterance}.WAV\n")
        put(f"{d}/{split}/utt2spk", f"{utterance} {speaker}\n")
        put(f"{d}/{split}/spk2gender", f"{speaker}\t{sex}\n")
        put(f"{d}/{split}/spk2age", f"{speaker}\t{age}\n")
    put(f"{d}/resource/scores.json", "{}")
    return [
        ({"words": "we call it bear", "sex": "male", "age": "child", "speaker": "0001"}, False),
        ({"words": "it's fine", "sex": "female", "age": "adult", "speaker": "0005"}, True),
    ]


def neural(d):
    for name in ("1a", "2b", "3c"):
        sound(f"{d}/{name}.flac")
    row = {
        "file": "1a.flac",
        "text": "Well, it's dark—go!",
        "voice": "af_sky",
        "answer": None,
        "split": "train",
    }
    lines(f"{d}/lines0.jsonl", [row, row | {"file": "gone.flac"}])
    question = {
        "file": "2b.flac",
        "text": "What is two plus two?",
        "voice": "bm_lewis",
        "answer": "Four.",
        "split": "test",
    }
    lines(f"{d}/lines1.jsonl", [question, row | {"file": "3c.flac", "voice": "amber"}])
    return [
        ({"words": "well it's dark go", "speaker": "af_sky", "sex": "female", "accent": "American"}, False),
        ({"words": "what is two plus two", "speaker": "bm_lewis", "sex": "male", "accent": "British"}, True),
        ({"words": "well it's dark go", "speaker": "amber"}, False),
    ]


TREES = {
    "esc50": esc50,
    "vctk": vctk,
    "voxceleb1": voxceleb1,
    "emov_db": emov_db,
    "iemocap": iemocap,
    "accentdb": accentdb,
    "vocalsound": vocalsound,
    "gigaspeech": gigaspeech,
    "meld": meld,
    "meta_fair_asr": meta_fair_asr,
    "paraspeechcaps": paraspeechcaps,
    "speechcraft": speechcraft,
    "compa_r": compa_r,
    "opens2s": opens2s,
    "nsynth": nsynth,
    "fma_medium": fma_medium,
    "wavcaps": wavcaps,
    "audiomcq": audiomcq,
    "lp_musiccaps_mtt": captions(
        "caption_writing",
        "train.jsonl",
        [{"path": "f/a-b-1.mp3", "caption_writing": "Calm harp."}],
        ["f/a-b-1.wav"],
        False,
    ),
    "musiccaps": captions(
        "caption",
        "musiccaps-public.csv",
        [{"ytid": "-0Gj8-vB1q4", "start_s": 30, "caption": "A ballad.", "is_audioset_eval": "True"}],
        ["wav/-0Gj8-vB1q4.wav"],
        True,
    ),
    "audiocaps": captions(
        "caption",
        "test.csv",
        [{"audiocap_id": 1, "youtube_id": "vfY_TJq7n_U", "start_time": 130, "caption": "Rain falls."}],
        ["wav/vfY_TJq7n_U.wav"],
        True,
    ),
    "clotho": captions(
        "caption_1",
        "clotho_captions_evaluation.csv",
        [{"file_name": "Bird song.wav", "caption_1": "A bird sings."}],
        ["evaluation/Bird song.wav"],
        True,
    ),
    "tacos": tacos,
    "speechocean762": speechocean762,
    "neural": neural,
}


def test_every_corpus_is_tried():
    assert set(TREES) | set(SMALL_CORPORA) == set(CORPORA)


@pytest.mark.parametrize("name", TREES)
def test_facts_and_split(name, tmp_path, capsys):
    expected = TREES[name](str(tmp_path / "c"))
    clips = read_corpus(name, str(tmp_path / "c"))

    def in_order(pairs):
        return sorted(pairs, key=lambda pair: (sorted(pair[0].items()), pair[1]))

    assert in_order((c.facts, c.is_test) for c in clips) == in_order(expected)
    assert all(os.path.isfile(c.path) for c in clips)
    out = str(tmp_path / "m.jsonl")
    assert main([name, str(tmp_path / "c"), "--out", out]) == 0
    examples = read_manifest(out)  # every clip leads to a question that can be read back
    assert len(examples) == sum(bool(c.facts) + len(c.qa) for c in clips)


def test_segments_are_parts_of_files(tmp_path):
    gigaspeech(str(tmp_path / "c"))
    clips = read_corpus("gigaspeech", str(tmp_path / "c"))
    assert [(c.offset, round(c.duration, 3)) for c in clips] == [(0.1, 0.3), (0.5, 0.4)]
    assert main(["gigaspeech", str(tmp_path / "c"), "--out", str(tmp_path / "m.jsonl")]) == 0
    (e,) = read_manifest(str(tmp_path / "m.jsonl"))
    assert e.offset == 0.1 and abs(e.duration - 0.3) < 1e-6


def test_questions_of_the_corpus_itself(tmp_path):
    audiomcq(str(tmp_path / "c"))
    assert main(["audiomcq", str(tmp_path / "c"), "--out", str(tmp_path / "m.jsonl")]) == 0
    (e,) = read_manifest(str(tmp_path / "m.jsonl"))
    assert (e.question, e.answer) == ("What passes by?\nA. a car\nB. a train", "B. a train")
    assert main(["check", str(tmp_path / "m.jsonl")]) == 0


def test_spoken_questions_bring_their_answers(tmp_path, capsys):
    neural(str(tmp_path))
    clips = {c.facts["speaker"]: c for c in read_corpus("neural", str(tmp_path))}
    assert "neural: 1 clips that its tables list are not there" in capsys.readouterr().err
    ((instruction, answer),) = clips["bm_lewis"].qa
    assert instruction in INSTRUCTIONS["simple"] and answer == "Four." and clips["af_sky"].qa == ()


def test_the_real_speechocean(shared_audio):
    clips = read_corpus("speechocean762", os.path.join(shared_audio, "speechocean762"))
    assert (len(clips), sum(c.is_test for c in clips)) == (3680, 1180)
    assert {c.facts["age"] for c in clips} == {"child", "adult"}
    assert {c.facts["sex"] for c in clips} == {"male", "female"}
    tested = {c.facts["speaker"] for c in clips if c.is_test}
    assert not tested & {c.facts["speaker"] for c in clips if not c.is_test}


def test_kaldi_tables_that_do_not_fit(tmp_path, capsys):
    d = str(tmp_path / "c")
    speechocean762(d)
    put(f"{d}/train/utt2spk", "other 0001\n")
    assert main(["speechocean762", d, "--out", str(tmp_path / "m.jsonl")]) == 2
    assert "train/wav.scp: not one of speechocean762's tables" in capsys.readouterr().err
    os.remove(f"{d}/train/spk2age")
    assert main(["speechocean762", d, "--out", str(tmp_path / "m.jsonl")]) == 2
    assert "spk2age" in capsys.readouterr().err


def test_real_librispeech_brings_its_words(tmp_path):
    sound(f"{tmp_path}/train-clean-100/19/198/19-198-0000.flac")
    put(f"{tmp_path}/train-clean-100/19/198/19-198.trans.txt", "19-198-0000 NORTHANGER ABBEY\n")
    put(f"{tmp_path}/SPEAKERS.TXT", ";ID |SEX| ...\n19   | F | train-clean-100  | 25.19 | Kara Shallenberg\n")
    (clip,) = read_corpus("librispeech", str(tmp_path))
    assert clip.facts == {"speaker": "19", "words": "northanger abbey", "sex": "female"}


def test_tables_that_do_not_fit(tmp_path, capsys):
    d = tmp_path / "c"
    for files, says in (
        ({}, "none was found"),
        ({"train_sent_emo.csv": "a,b\n1,2\n"}, "not one of meld's tables"),
        (
            {"train_sent_emo.csv": "Utterance,Speaker,Emotion,Dialogue_ID,Utterance_ID\nHi,J,joy,7,7\n"},
            "none of the clips",
        ),
    ):
        os.makedirs(d, exist_ok=True)
        for name, text in files.items():
            (d / name).write_text(text)
        assert main(["meld", str(d), "--out", str(tmp_path / "m.jsonl")]) == 2
        err = capsys.readouterr().err.splitlines()
        assert says in err[-1] and err[-1].startswith("prepare: ")
    assert os.listdir(tmp_path) == ["c"]


def test_a_name_of_another_split_is_no_clip_of_this_one(tmp_path, capsys):
    """MELD's tables name the same files; where a split's folder is not there, its clips are missing."""
    sound(f"{tmp_path}/c/train_splits/dia0_utt0.wav")
    head = "Utterance,Speaker,Emotion,Dialogue_ID,Utterance_ID\n"
    for split, emotion in (("train", "joy"), ("dev", "sadness"), ("test", "anger")):
        put(f"{tmp_path}/c/{split}_sent_emo.csv", f"{head}Hi,J,{emotion},0,0\n")
    (clip,) = read_corpus("meld", str(tmp_path / "c"))
    assert clip.facts["emotion"] == "happy" and not clip.is_test
    assert "meld: 2 clips that its tables list are not there" in capsys.readouterr().err


def test_files_that_no_reader_can_read(tmp_path, capsys):
    """A quote that never closes, and letters of another encoding, are one line and exit status 2."""
    for name, path, text in (
        ("meta_fair_asr", "a.tsv", b'hash_name\ttranscription\tgender\n1\t"' + b"x" * 200_000),
        ("librispeech", "19/198/19-198.trans.txt", b"19-198-0000 CAF\xc9\n"),
    ):
        folder = tmp_path / name
        sound(f"{folder}/19/198/19-198-0000.flac")
        (folder / path).write_bytes(text)
        assert main([name, str(folder), "--out", str(tmp_path / "m.jsonl")]) == 2
        err = capsys.readouterr().err
        assert err.startswith("prepare: ") and err.count("\n") == 1


def test_the_docstrings_new_corpus(tmp_path, monkeypatch):
    """The example of tools/corpora.py, run as it stands there."""
    code = inspect.cleandoc(corpora.__doc__.split("whole one:\n\n")[1])
    monkeypatch.setattr(corpora, "CORPORA", dict(CORPORA))
    monkeypatch.setattr(prepare, "CORPORA", corpora.CORPORA)
    exec(code, vars(corpora))
    for name in ("robin/2021_04.wav", "great tit/2023_11.wav"):
        sound(f"{tmp_path}/{name}")
    assert [(c.facts, c.is_test) for c in read_corpus("birds", str(tmp_path))] == [
        ({"sound": "great tit"}, True),
        ({"sound": "robin"}, False),
    ]
    assert main(["birds", str(tmp_path), "--out", str(tmp_path / "m.jsonl"), "--split", "train"]) == 0
    assert len(read_manifest(str(tmp_path / "m.jsonl"))) == 1
