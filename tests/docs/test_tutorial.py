"""The tutorial: its commands run as they are written, in a small copy of the folder that the demo leaves."""

import random
import re
import shlex
import shutil

import pytest

from minimind_v.core.demo.dataset import write_pictures, write_pretrain, write_sft, write_test
from minimind_v.core.export.folder import export
from minimind_v.core.formats.request import ExportRequest
from minimind_v.core.hub.sources import DATASET_DIR, OUT_DIR, TOKENIZER_DIR, VISION_DIR
from tests.cli.harness import ASSETS, BASE, EYE, ROOT, run_mmv
from tests.docs.conftest import commands

ENGLISH, CHINESE = ((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("tutorial.md", "tutorial_zh.md"))


@pytest.fixture
def demo_folder(tmp_path):
    """What the demo leaves, with few rows."""
    folder = tmp_path / "demo"
    shutil.copytree(EYE, folder / VISION_DIR)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ASSETS / name, folder / TOKENIZER_DIR)
    (folder / OUT_DIR).mkdir()
    export(ExportRequest(BASE), "pth", folder / OUT_DIR / "lm_128.pth")
    write_pretrain(folder / DATASET_DIR, random.Random(0), 32)
    write_sft(folder / DATASET_DIR, random.Random(1), 16)
    for name, held_out_pairs in (("heldout_scenes", False), ("heldout_pairs", True)):
        write_test(folder / DATASET_DIR, name, random.Random(2), 8, set(), held_out_pairs)
    write_pictures(folder / "pictures", random.Random(3), set())
    return folder


@pytest.mark.long
def test_the_commands_run_in_the_demo_folder(demo_folder, monkeypatch):
    first, *lines = commands(ENGLISH)
    assert first == "cd demo"
    assert len(lines) == 8
    monkeypatch.chdir(demo_folder)
    for line in lines:
        ended = run_mmv(*shlex.split(line)[1:])
        assert ended.code == 0, f"{line}\n{ended.err}"
    for name in ("pretrain_vlm_128/report.html", "sft_vlm_128.pth", "sft_vlm_128.safetensors"):
        assert (demo_folder / "again" / name).is_file()


def test_the_paths_in_the_text_exist(demo_folder):
    for path in re.findall(r"`((?:model|out|dataset|pictures)/[^`]*)`", ENGLISH):
        assert (demo_folder / path).exists(), path


def test_both_languages_give_the_same_commands_and_figures():
    assert commands(ENGLISH) == commands(CHINESE)
    english, chinese = (sorted(re.findall(r"\d+(?:[.,]\d+)*", page)) for page in (ENGLISH, CHINESE))
    assert english == chinese
