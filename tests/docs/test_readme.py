"""Every command of the README is run as it stands there, in a folder laid out as the README says."""

import random
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minimind_v.core.config.presets import PRESETS
from minimind_v.core.curate.convert import convert
from minimind_v.core.demo import world
from minimind_v.core.demo.dataset import write_pictures, write_pretrain, write_sft
from minimind_v.core.errors import RowError
from minimind_v.core.formats.checkpoint import export_tensors, write_checkpoint
from minimind_v.core.hub.sources import SOURCES
from minimind_v.core.model.vision.encoder import read_vision_spec
from minimind_v.core.model.vlm import VLM
from minimind_v.core.paths import TOKENIZER_DIR, VISION_DIR
from minimind_v.core.rows.stores import open_rows
from tests.cli.harness import ASSETS, ROOT, installed, read_rows, write_rows
from tests.docs.conftest import commands
from tests.hub.server import Hub

ENGLISH, CHINESE = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README_zh.md"))


def blank_weights(path: Path, preset: str, projector: bool) -> None:
    torch.manual_seed(0)
    model = VLM(PRESETS[preset], read_vision_spec(ASSETS / "vision"), placeholder_id=34)
    tensors = export_tensors(model)
    if not projector:
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("vision_proj.")}
    write_checkpoint(path, tensors, PRESETS[preset], "sft" if projector else "lm")


@pytest.fixture(scope="module")
def working_folder(tmp_path_factory):
    """A working folder as the demo leaves it, with rows and pictures of one's own."""
    folder = tmp_path_factory.mktemp("readme")
    shutil.copytree(ASSETS / "vision", folder / "demo" / VISION_DIR)
    shutil.copy(ASSETS / "tokenizer.json", folder / "demo" / TOKENIZER_DIR)
    write_pictures(folder / "demo" / "pictures", random.Random(4), set())
    blank_weights(folder / "demo" / "out" / "sft_vlm_128.pth", "demo", projector=True)
    sft, _ = write_sft(folder / "mine", random.Random(2), 3)
    rows = [row | {"conversations": row["conversations"][:2]} for row in read_rows(sft.data)]  # soon learnt by heart
    for name in ("mine.jsonl", "held_out.jsonl"):
        write_rows(folder / name, rows)
    shutil.unpack_archive(sft.images, folder / "unpacked")
    shutil.move(folder / "unpacked" / "sft_images", folder / "pictures")
    picture = world.jpeg(world.draw(world.make_scene(random.Random(3)), random.Random(3)))
    (folder / "dog.jpg").write_bytes(picture)
    return folder


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A hub on loopback with stand-ins for what is published: a tiny eye, a small tokenizer, blank weights."""
    folder = tmp_path_factory.mktemp("published")
    blank_weights(folder / "lm_512.pth", "small", projector=False)
    torch.save(load_file(ASSETS / "vision" / "model.safetensors"), folder / "pytorch_model.bin")
    for written, _ in (write_pretrain(folder, random.Random(1), 4), write_sft(folder, random.Random(2), 4)):
        name = written.data.name.replace("_data.jsonl", "_i2t.parquet")
        convert(open_rows(written.data, written.images), folder / name)
    shutil.copytree(ASSETS / "vision", folder, dirs_exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ASSETS / name, folder)
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".zip"}
    everything = {
        f"{'datasets' if source.kind == 'dataset' else 'models'}/{source.hubs['hf'].repo}": files
        for source in SOURCES.values()
    }
    with Hub(everything) as hub:
        yield hub


@pytest.mark.long
def test_every_mmv_command_runs_as_it_stands(working_folder, hub, monkeypatch):
    monkeypatch.chdir(working_folder)
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    lines = [line for line in commands(ENGLISH) if line.startswith(("mmv ", "cd demo", "cd .."))]
    assert len(lines) >= 16
    for line in lines:
        if line.startswith("cd "):
            monkeypatch.chdir(line.removeprefix("cd "))
            continue
        done = installed(*shlex.split(line)[1:])
        assert done.code == 0, f"{line}\n{done.err}"
    assert "parquet" in (working_folder / "out" / "pretrain_vlm_512" / "config.yaml").read_text()
    assert (working_folder / "out" / "sft_vlm_512.safetensors").is_file()
    assert (working_folder / "mine" / "sft_vlm_512.pth").is_file()
    assert (working_folder / "demo" / "few" / "sft_vlm_128.pth").is_file()
    assert (working_folder / "few" / "sft_vlm_512.pth").is_file()


@pytest.mark.parametrize("page", [ENGLISH, CHINESE], ids=["English", "Chinese"])
def test_the_message_about_a_broken_row_is_that_of_the_program(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("pictures").mkdir()
    write_rows(Path("mine.jsonl"), [{"image": "dog.jpg", "conversations": []}] * 17)
    rows = open_rows(Path("mine.jsonl"), Path("pictures"))
    with pytest.raises(RowError) as caught:
        rows.picture(16, 0, "dog.jpg")
    assert f"`{rows.location(16)}: {caught.value}`" in page


def test_make_targets_exist():
    for line in commands(ENGLISH):
        if line.startswith("make "):
            done = subprocess.run([*shlex.split(line), "--dry-run"], cwd=ROOT, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr


def test_nothing_else_is_asked_to_be_typed():
    """But what brings the project and its environment here, which `test_install.py` tries."""
    prefixes = ("mmv ", "make ", "source .venv/bin/activate")
    setup = ("git clone ", "cd ", "python3 -m venv ", ".venv/bin/", "PIP_EXTRA_INDEX_URL=")
    assert [line for line in commands(ENGLISH) if not line.startswith(prefixes + setup)] == []


def test_both_languages_give_the_same_commands_and_figures():
    assert commands(ENGLISH) == commands(CHINESE)
    english, chinese = (sorted(re.findall(r"\d+(?:\.\d+)? ?%|\d+\.\d+×", page)) for page in (ENGLISH, CHINESE))
    assert english == chinese


@pytest.mark.parametrize("page", [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")], ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"
