"""`mmv runs` lists what lies in a folder, damaged files included, and reads no tensor."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from minimind_v.core.formats.checkpoint import read_checkpoint, write_checkpoint
from minimind_v.core.formats.inventory import list_runs
from tests.cli.harness import BASE, in_forks, run_mmv


def run_folder(out: Path, name: str = "sft_vlm_512") -> Path:
    """A run of which nothing but metrics is left."""
    folder = out / name
    folder.mkdir(parents=True)
    steps = [{"step": n, "steps": 900, "loss": 3.0 / n} for n in (1, 2, 3)]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(step)}\n" for step in steps) + '{"step": 4, "lo')
    return folder


def test_a_run_is_one_line_with_its_last_whole_step(tmp_path):
    run_folder(tmp_path / "out")
    ended = run_mmv("runs", tmp_path / "out")
    heading, line = ended.out.splitlines()
    assert heading.split() == ["name", "stage", "model", "steps", "loss", "date", "size"]
    assert line.split()[:7] == ["sft_vlm_512", "sft", "small", "3", "of", "900", "1.0000"]


def test_a_run_that_was_saved_after_its_last_logged_step_has_come_to_the_saved_one(tmp_path):
    folder = run_folder(tmp_path)
    events = [{"step": 1, "warning": "slow"}, {"step": 34, "saved": True}, {"step": 2, "warning": "late"}]
    (folder / "events.jsonl").write_text("".join(f"{json.dumps(event)}\n" for event in events) + "damaged")
    (entry,) = list_runs(tmp_path)
    assert (entry.steps, entry.total_steps, entry.loss) == (34, 900, 1.0)


def test_runs_are_in_the_order_in_which_they_trained_whatever_is_written_into_them_later(tmp_path):
    for number, name in enumerate(("earlier", "later")):
        os.utime(run_folder(tmp_path, name) / "metrics.jsonl", (10**9 + number, 10**9 + number))
    (tmp_path / "earlier" / "report.html").touch()
    assert [entry.name for entry in list_runs(tmp_path)] == ["later", "earlier"]


def test_weights_and_their_run_are_one_entry(tmp_path):
    run_folder(tmp_path)
    checkpoint = read_checkpoint(BASE)
    write_checkpoint(tmp_path / "sft_vlm_512.pth", checkpoint.tensors, checkpoint.config, "sft")
    (entry,) = run_mmv("runs", tmp_path, "--json").json["runs"]
    assert (entry["kind"], entry["model"], entry["steps"], entry["total_steps"]) == ("run", "demo", 3, 900)
    files = (tmp_path / "sft_vlm_512.pth", tmp_path / "sft_vlm_512.json", tmp_path / "sft_vlm_512" / "metrics.jsonl")
    assert entry["bytes"] == sum(path.stat().st_size for path in files)


def test_stage_and_sizes_of_weights_come_from_their_description(tmp_path):
    checkpoint = read_checkpoint(BASE)
    for name in ("a.pth", "b.safetensors"):
        write_checkpoint(tmp_path / name, checkpoint.tensors, checkpoint.config, "pretrain")
    entries = list_runs(tmp_path)
    assert {(entry.name, entry.stage, entry.model, entry.damage) for entry in entries} == {
        ("a.pth", "pretrain", "demo", ""),
        ("b.safetensors", "pretrain", "demo", ""),
    }


@pytest.mark.parametrize(
    ("name", "content", "damage"),
    [
        ("a.pth", b"<html>", "not a .pth file"),
        ("a.pth", b"PK\x03\x04 and no more", "cut short"),
        ("a.safetensors", b"12345678{", "not a whole safetensors file"),
        ("a.gguf", b"", "not a .gguf file"),
        ("a/metrics.jsonl", b"[1]\nnull\n", "metrics.jsonl has no logged step"),
        ("a/config.json", b"{", "config.json is not a JSON object"),
    ],
)
def test_a_damaged_entry_is_named_beside_the_others(tmp_path, name, content, damage):
    run_folder(tmp_path)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(content)
    ended = run_mmv("runs", tmp_path)
    assert (ended.code, len(ended.out.splitlines())) == (0, 3)
    assert f"damaged: {damage}" in ended.out or f"damaged: the file is {damage}" in ended.out


def test_a_folder_without_runs_says_how_to_start(tmp_path):
    assert "mmv train pretrain" in run_mmv("runs", tmp_path).err
    assert run_mmv("runs", tmp_path, "--json").json["runs"] == []
    missing = run_mmv("runs", tmp_path / "none")
    assert (missing.code, "no folder" in missing.error) == (1, True)


def test_runs_need_no_torch(tmp_path):
    run_folder(tmp_path)
    (tmp_path / "lm_128.safetensors").write_bytes(BASE.read_bytes())
    ended, modules = in_forks(line := f"runs {tmp_path}")[line]
    assert ended.code == 0, ended.err
    assert "torch" not in modules
    assert "lm_128.safetensors  lm     demo" in ended.out
