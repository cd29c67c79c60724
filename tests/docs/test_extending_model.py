"""A vision tower and a projector from outside the package: the files of docs/extending.md, copied elsewhere and run."""

import json
import os
import random
import shutil
import subprocess
import sys
from functools import partial

import pytest
import torch

from minimind_v.core.config.schema import VisionSpec
from minimind_v.core.demo import world
from minimind_v.core.model.projector import PROJECTORS
from tests.cli.harness import ASSETS, BASE, EYE, ROOT, installed, run_mmv, tiny_data

EXAMPLES = ROOT / "docs" / "examples"
PAGE = ROOT / "docs" / "extending.md"
NAMES = ("extend_tower", "extend_projector")

TRAIN_AND_OPEN = """
import sys
from functools import partial
from pathlib import Path

import {extension}  # adds to the table

from minimind_v.core.config.load import build_config
from minimind_v.core.evaluate.run import evaluate, held_out_dataset
from minimind_v.core.export.folder import export
from minimind_v.core.formats.request import ExportRequest
from minimind_v.core.formats.load import load
from minimind_v.core.generate.sampling import GREEDY
from minimind_v.core.generate.session import Session
from minimind_v.core.monitor.metrics import Listener
from minimind_v.core.rows.stores import open_rows
from minimind_v.core.train.run import train

data, base, vision, tokenizer, image = map(Path, sys.argv[1:])
options = {{"preset": "demo", "data": data / "pretrain_data.jsonl", "images": data / "pretrain_images.zip",
           "vision_model": vision, "tokenizer": tokenizer, "init": base, "out": Path("out"), "max_steps": 3,
           "batch_size": 4, "workers": 0, "device": "cpu", "features": "exact"}}
train(build_config("pretrain", options=options, sets={sets}), Listener())
export(ExportRequest(Path("out/pretrain_vlm_128.pth")), "safetensors", Path("w.safetensors"))
loaded = load(Path("w.safetensors"), vision, tokenizer, "cpu")
words = loaded.tokenizer
print(loaded.config.vision.model_type, loaded.config.projector, loaded.model.spec.tokens_per_image)
rows = open_rows(options["data"], options["images"])
dataset = held_out_dataset(loaded.model, words, rows, 640)
assert evaluate(loaded.model, dataset, words.pad_id, words.eos_id, limit=4).loss > 0
print(len("".join(Session(loaded.model, loaded.tokenizer, GREEDY).ask("what?", [image], 4))))
"""


def run_script(folder, *command):
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{folder}"}
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def patches(tmp_path_factory):
    """The folder of the example's vision tower, as its own program writes it."""
    folder = tmp_path_factory.mktemp("tower")
    shutil.copy(EXAMPLES / "extend_tower.py", folder)
    done = run_script(folder, "extend_tower.py", folder / "patches")
    assert done.returncode == 0, done.stderr
    return folder / "patches"


@pytest.fixture(params=NAMES)
def example(request, tmp_path, patches):
    """A copy of the example outside the package, the vision folder that it takes, and its settings."""
    shutil.copy(EXAMPLES / f"{request.param}.py", tmp_path)
    vision = patches if request.param == "extend_tower" else EYE
    sets = ("projector=shuffle",) if request.param == "extend_projector" else ()
    return request.param, vision, sets


def test_the_page_shows_the_files_that_are_tested():
    text = PAGE.read_text(encoding="utf-8")
    for name in NAMES:
        source = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
        assert f"```python\n{source}```" in text, f"docs/extending.md does not show docs/examples/{name}.py as it is"
        assert source.count("\n") < 80


@pytest.mark.long
def test_an_extension_is_trained_converted_opened_evaluated_and_asked(example, tmp_path):
    name, vision, sets = example
    (tmp_path / "script.py").write_text(TRAIN_AND_OPEN.format(extension=name, sets=sets))
    image = tmp_path / "image.jpg"
    image.write_bytes(some_image())
    done = run_script(tmp_path, "script.py", tiny_data().folder, BASE, vision, ASSETS, image)
    assert done.returncode == 0, done.stderr
    expected = {"extend_tower": "patch_means linear 10", "extend_projector": "clip_vision_model shuffle 16"}[name]
    assert done.stdout.splitlines()[0] == expected
    described = json.loads((tmp_path / "out" / "pretrain_vlm_128.json").read_text())
    assert described["projector"]["tokens_per_image"] == int(expected.split()[-1])


@pytest.mark.long
def test_an_extension_is_used_by_the_commands_that_name_it(example, tmp_path):
    name, vision, sets = example
    extended = partial(installed, cwd=tmp_path, MMV_EXTENSIONS=str(tmp_path / f"{name}.py"))
    line = tiny_data().train("out", vision_model=vision, max_steps=2, workers=1)
    trained = extended(*line, *(word for setting in sets for word in ("--set", setting)))
    assert trained.code == 0, trained.err
    weights = "out/pretrain_vlm_128.pth"
    refused = extended("convert", "--to", "hf", "--model", weights, "--out", "hf")
    assert refused.code == 2, refused.err
    assert "--to hf can hold clip_vision_model with linear" in refused.err
    assert not (tmp_path / "hf").exists()
    if name == "extend_tower":
        assert "normalised with mean 0.5, 0.5, 0.5 and deviation 0.5, 0.5, 0.5" in trained.err, "the tower's own"
    unknown = installed("chat", "--model", weights, "--greedy", "hello", cwd=tmp_path)
    assert unknown.code in (1, 2)
    assert "MMV_EXTENSIONS" in unknown.error


@pytest.mark.parametrize(
    ("extension", "why"),
    [("broken.py", "ZeroDivisionError"), ("absent.py", "FileNotFoundError"), ("no_such_module", "ModuleNotFoundError"),
     ("random.py", "ImportError: another module is called random: rename the file")],
)  # fmt: skip
def test_an_extension_that_cannot_be_imported_ends_in_one_line(tmp_path, monkeypatch, extension, why):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.py").write_text("1 / 0")
    monkeypatch.setenv("MMV_EXTENSIONS", extension)
    done = run_mmv("doctor")
    assert done.code == 2
    assert f"MMV_EXTENSIONS: {extension} cannot be imported ({why}" in done.error


def test_pixel_shuffle_joins_the_four_neighbours(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import extend_projector

    PROJECTORS.pop("shuffle")
    projector = extend_projector.PixelShuffle(VisionSpec(4, 1, 1), 1)
    projector.shuffle = torch.nn.Identity()
    features = torch.arange(16.0).view(1, 16, 1)  # a square of 4 × 4
    assert projector(features).tolist() == [[[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]]


def some_image() -> bytes:
    return world.jpeg(world.draw(world.make_scene(random.Random(1)), random.Random(1)))
