"""lmms-eval itself, not a stand-in: one of its tasks on local files, answered by the shipped small model."""

import json
import os
import subprocess
import sys

import pytest
import soundfile

from decode import ask
from weights import load

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
QUESTION = "Classify the human vocal sound to VocalSound in English: "  # what the task asks
TASK = """
include: {vocalsound}
task: local_vocalsound
dataset_path: {folder}
dataset_kwargs: {{}}
lmms_eval_specific_kwargs:
  default:
    pre_prompt: ""
    post_prompt: "{question}"
"""


def test_a_task_through_the_harness(tmp_path):
    """VocalSound's prompt, reader, scoring and metric, with its data replaced by two clips of ours."""
    lmms_eval = pytest.importorskip("lmms_eval", reason="lmms-eval is not installed")
    datasets = pytest.importorskip("datasets")
    clips = [os.path.join(ROOT, "assets", "demo", f"{name}.wav") for name in ("seven", "clock")]
    model, tokenizer = load("tiny", "cpu")
    texts = [a.text for a in ask(model, tokenizer, clips, QUESTION)]
    rows = []
    for i, clip in enumerate(clips):
        samples, rate = soundfile.read(clip, dtype="float32")
        audio = {"array": samples.tolist(), "sampling_rate": rate}
        # the scorer looks for one of six words, none of which the small model says
        rows.append({"audio": audio, "answer": "Cough", "age_group": 1, "spk_id": f"f{i}"})
    (tmp_path / "data").mkdir()
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "data" / "test-00000.parquet"))
    (tmp_path / "tasks").mkdir()
    vocalsound = os.path.join(os.path.dirname(lmms_eval.__file__), "tasks/vocalsound/vocalsound_test.yaml")
    (tmp_path / "tasks" / "local_vocalsound.yaml").write_text(
        TASK.format(vocalsound=vocalsound, folder=tmp_path / "data", question=QUESTION)
    )
    command = [sys.executable, "-m", "tools.harness", "--model", "diffa", "--model_args", "pretrained=tiny"]
    command += ["--tasks", "local_vocalsound", "--include_path", str(tmp_path / "tasks"), "--batch_size", "2"]
    command += ["--device", "cpu", "--output_path", str(tmp_path / "out"), "--log_samples"]
    where = {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    run = subprocess.run(command, cwd=ROOT, env=os.environ | where, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    samples = list((tmp_path / "out").rglob("*samples_local_vocalsound*.jsonl"))
    assert samples, run.stderr[-2000:]  # the harness ends with 0 after an error, too
    lines = [json.loads(line) for line in samples[0].read_text().splitlines()]
    said = [line["filtered_resps"] for line in sorted(lines, key=lambda line: line["doc_id"])]
    assert said == texts
    (results,) = (tmp_path / "out").rglob("*results.json")
    found = json.loads(results.read_text())["results"]["local_vocalsound"]
    assert found["accuracy,none"] == sum("cough" in text.lower() for text in texts) / 2
