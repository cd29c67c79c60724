"""lmms-eval measures an exported folder and a model of this package, by the task's file that `mmv eval` reads, too."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset, Features, Image, Value

from minimind_v.core.config.schema import MLP
from minimind_v.core.data.tokenizer import Tokenizer
from minimind_v.core.formats.checkpoint import export_tensors, load_into, read_checkpoint, write_checkpoint
from minimind_v.core.formats.vision_tower import load_encoder
from minimind_v.core.model.vlm import VLM
from tests.cli.harness import ASSETS, ROOT, run_mmv

# `make interop` brings it; a path of one's own may name another environment with lmms-eval.
PYTHON = Path(os.environ.get("LMMS_PYTHON", Path(sys.prefix) / "lmms/bin/python"))
TASK = """
task: scenes
dataset_path: {data}
test_split: test
output_type: generate_until
doc_to_visual: image
doc_to_text: question
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 16, temperature: 0, do_sample: false}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true, ignore_case: true, ignore_punctuation: true}}
metadata: {{version: 1.0}}
"""


def imports():
    """Why lmms-eval cannot be imported; empty if it can."""
    if not PYTHON.is_file():
        return f"no lmms-eval at {PYTHON}; `make interop` brings it"
    ended = subprocess.run([PYTHON, "-c", "import lmms_eval.evaluator"], capture_output=True, text=True)
    return f"lmms-eval cannot be imported: {ended.stderr.strip()[-200:]}" if ended.returncode else ""


pytestmark = [pytest.mark.long, pytest.mark.skipif(bool(reason := imports()), reason=reason or "it can be imported")]


@pytest.fixture(scope="module")
def task(seeing, tmp_path_factory):
    """A folder with the file of a task, whose data are twenty questions that the demo's model has not met."""
    folder = tmp_path_factory.mktemp("task")
    (folder / "data").mkdir()
    rows = [
        {"question": question, "answer": answer, "image": {"bytes": picture.read_bytes(), "path": None}}
        for question, answer, picture in seeing.rows
    ]
    features = Features({"question": Value("string"), "answer": Value("string"), "image": Image()})
    Dataset.from_list(rows, features=features).to_parquet(folder / "data/test-00000-of-00001.parquet")
    (folder / "scenes.yaml").write_text(TASK.format(data=folder / "data"))
    return folder


def theirs(task, out, model, **arguments):
    """The answers and the exact matches that lmms-eval finds."""
    options = ",".join(f"{name}={value}" for name, value in {**arguments, "device": "cpu"}.items())
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(out / "home"), "PYTHONPATH": path}
    command = [PYTHON, "-m", "lmms_eval", "--model", model, "--model_args", options, "--tasks", "scenes"]
    command += ["--include_path", task, "--batch_size", "1", "--log_samples", "--output_path", out / "logs"]
    ended = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=os.environ | offline, cwd=out)
    samples = list((out / "logs").rglob("*samples_scenes.jsonl"))
    assert samples, (ended.stdout + ended.stderr)[-2000:]
    lines = sorted(map(json.loads, samples[0].read_text().splitlines()), key=lambda line: line["doc_id"])
    return [line["filtered_resps"].strip() for line in lines], [line["exact_match"] for line in lines]


def ours(task, out, *model):
    done = run_mmv("eval", "--task", task / "scenes.yaml", "--model", *model, "--device", "cpu", "--out", out)
    assert done.code == 0, done.err
    lines = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["variant"] == "seen"]
    return [line["answer"] for line in lines], [line["score"] for line in lines]


def test_an_exported_folder_answers_as_the_model_does(seeing, task, tmp_path):
    done = run_mmv("convert", "--to", "hf", "--model", seeing.weights, *seeing.sight, "--out", tmp_path / "hf")
    assert done.code == 0, done.err
    expected = ours(task, tmp_path / "ours", seeing.weights, *seeing.sight)
    model = {"pretrained": tmp_path / "hf", "device_map": "cpu", "dtype": "float32"}
    assert theirs(task, tmp_path, "llava_hf", **model) == expected
    assert sum(expected[1]) > 10, "the model has learnt something, so equal answers are no accident"


def sighted_3v(folder):
    """Weights of minimind-3v that can be talked to: the demo's base behind a projector that has learnt nothing."""
    torch.manual_seed(0)
    base, encoder = read_checkpoint(ASSETS / "3v/llm_128.safetensors"), load_encoder(ASSETS / "3v/vision")
    placeholder = Tokenizer.load(ASSETS / "3v").placeholder_id
    model = VLM(base.config, encoder.spec, placeholder, encoder, projector=MLP)
    load_into(model, base, new_projector=True)
    path = folder / "sft_vlm_128.pth"
    write_checkpoint(path, export_tensors(model), model.model_config, "sft")
    return path


@pytest.mark.parametrize("generation", ["2025", "3v"])
def test_the_adapter_answers_as_the_model_does(seeing, task, tmp_path, generation):
    weights, vision, tokenizer = seeing.weights, seeing.sight[1], seeing.sight[3]
    if generation == "3v":
        weights, vision, tokenizer = sighted_3v(tmp_path), ASSETS / "3v/vision", ASSETS / "3v"
    expected = ours(task, tmp_path / "ours", weights, "--vision-model", vision, "--tokenizer", tokenizer)
    assert theirs(task, tmp_path, "mmv", pretrained=weights, vision_model=vision, tokenizer=tokenizer) == expected
    assert len(set(expected[0])) > 1
