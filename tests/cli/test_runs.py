"""`mmv runs` lists what lies in a folder, damaged files included, and reads no tensor."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import asdict
from pathlib import Path

import pytest

from minimind_v.cli.runs import HEADINGS, _aligned
from minimind_v.core.config.presets import PRESETS
from minimind_v.core.formats import inventory
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
    assert f"unreadable: {damage}" in ended.out or f"unreadable: the file is {damage}" in ended.out


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors", "a/metrics.jsonl"])
def test_a_file_without_permission_is_not_called_damaged(tmp_path, monkeypatch, name):
    def refuse(path, *args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(inventory, "safe_open", refuse)
    monkeypatch.setattr(Path, "open", refuse)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    (entry,) = list_runs(tmp_path)
    assert entry.damage.endswith("Permission denied")
    assert str(tmp_path) not in entry.damage


@pytest.mark.parametrize("preset", ["demo", "demo-3v", "small", "3v"])
def test_models_of_one_width_are_told_apart(tmp_path, preset):
    sizes = asdict(PRESETS[preset])
    (tmp_path / "sft_vlm_9.pth").write_bytes(b"\x80")
    (tmp_path / "sft_vlm_9.json").write_text(json.dumps({"stage": "sft", "model": sizes}))
    for name, of_transformers in (("a", {"model_type": "qwen3" if sizes["qk_norm"] else "llama"}), ("b", {})):
        (tmp_path / name).mkdir()
        text = {key: sizes[key] for key in ("hidden_size", "num_hidden_layers")} | of_transformers
        (tmp_path / name / "config.json").write_text(json.dumps({"text_config": text}))
    (tmp_path / "b" / "config.json").unlink()
    (tmp_path / "b" / "model.gguf").touch()
    (tmp_path / "b" / "mmv_export.json").write_text(json.dumps({"stage": "sft", "preset": preset}))
    entries = list_runs(tmp_path)
    assert {entry.name: entry.model for entry in entries} == dict.fromkeys(("sft_vlm_9.pth", "a", "b"), preset)


def test_a_narrow_terminal_gets_fewer_columns():
    rows = [HEADINGS, ("sft_vlm_512", "sft", "small", "3 of 900", "1.0000", "2026-11-28 16:45", "14.3 MB")]
    whole = _aligned(rows, None)
    assert whole[1].endswith("  2026-11-28 16:45  14.3 MB")
    assert _aligned(rows, len(whole[0])) == whole
    assert _aligned(rows, len(whole[0]) - 1) == [line[:-9] for line in whole]
    assert _aligned(rows, 40) == ["name         model  steps     loss  ", "sft_vlm_512  small  3 of 900  1.0000"]


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
