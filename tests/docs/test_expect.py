"""The page on what to expect: its commands run, and its facts are those of the code and of the public set."""

import json
import math
import random
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from minimind_v.core.config.generation import generation_of
from minimind_v.core.config.presets import PRESETS
from minimind_v.core.demo.dataset import write_pretrain
from minimind_v.core.export.folder import export
from minimind_v.core.formats.request import ExportRequest
from minimind_v.core.hub.sources import DATASET_DIR, OUT_DIR
from tests.cli.harness import BASE, ROOT, run_mmv
from tests.demo_folder import demo_folder
from tests.docs.conftest import commands

ENGLISH, CHINESE = ((ROOT / "docs" / f"expect{name}.md").read_text(encoding="utf-8") for name in ("", "_zh"))
PUBLISHED = {name: config for name, config in PRESETS.items() if not name.startswith("demo")}


def test_both_languages_give_the_same_commands_and_figures():
    assert commands(ENGLISH) == commands(CHINESE)
    english, chinese = (sorted(re.findall(r"\d+(?:[.,]\d+)*", page)) for page in (ENGLISH, CHINESE))
    assert english == chinese


def test_every_published_preset_has_its_rates():
    rows = re.findall(r"^\| `([\w-]+)` \| \w+ \| ([\d.e-]+) → ([\d.e-]+) \|", ENGLISH, re.MULTILINE)
    assert {name for name, _, _ in rows} | {"moe"} == PUBLISHED.keys()
    for name, peak, end in rows:
        assert float(peak) / float(end) == pytest.approx(generation_of(PUBLISHED[name]).cosine.peak(1.0) / 0.1)


def test_guessing_gives_the_loss_that_the_page_names():
    for config in PUBLISHED.values():
        assert f"{math.log(config.vocab_size):.2f}" == "8.76"
    assert "8.76 | ln 6400" in ENGLISH


@pytest.mark.long
def test_the_commands_run_on_the_public_set(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    demo = demo_folder(tmp_path / "demo")
    export(ExportRequest(BASE), "pth", demo / OUT_DIR / "lm_128.pth")
    write_pretrain(demo / DATASET_DIR, random.Random(0), 32)
    shutil.copytree(ROOT / "docs" / "examples", tmp_path / "docs" / "examples")
    download, unpack, convert, enter, train, evaluate, pretrain = commands(ENGLISH)[-7:]
    pip = subprocess.run([sys.executable, *shlex.split(download)[1:]], capture_output=True, text=True, timeout=60)
    if pip.returncode:
        pytest.skip(f"the package index is out of reach: {pip.stderr.strip().splitlines()[-1]}")
    subprocess.run([sys.executable, *shlex.split(unpack)[1:]], check=True)
    written = subprocess.run([sys.executable, *shlex.split(convert)[1:]], check=True, capture_output=True, text=True)
    always, by_question = re.findall(r"([\d.]+)%", written.stdout)
    assert f'| always "yes" | {always} % |' in ENGLISH
    assert f"| the most frequent answer to each question | {by_question} % |" in ENGLISH
    monkeypatch.chdir(enter.removeprefix("cd "))
    for command, shorter in ((pretrain, "--max-steps 2"), (train, "--max-steps 2"), (evaluate, "--limit 12 --json")):
        ended = run_mmv(*shlex.split(command)[1:], *shorter.split())
        assert ended.code == 0, ended.err
    report = json.loads(ended.out)
    assert report["rows"] == 12
    assert report["kinds"].keys() == {"yes or no", "shape", "colour"}
