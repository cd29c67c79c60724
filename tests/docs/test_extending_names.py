"""The examples of docs/extending.md: each is copied out of the repository, and used through the command line."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import sqlite3
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from minimind_v.core.config.freeze import FREEZE_POLICIES
from minimind_v.core.data.layouts import CHAT_LAYOUTS
from minimind_v.core.errors import UsageError
from minimind_v.core.evaluate.tasks import TASKS
from minimind_v.core.export.targets import TARGETS
from minimind_v.core.extensions import load_extensions
from minimind_v.core.formats.checkpoint import export_tensors, read_checkpoint
from minimind_v.core.model.projector import PROJECTORS
from minimind_v.core.model.vision.spec import TOWERS
from minimind_v.core.train.freeze import freeze
from tests.cli.harness import ROOT, SIGHT, installed, read_rows, sighted, sighted_model, tiny_data

EXAMPLES = ROOT / "docs" / "examples"
NAMES = ("task", "target", "store", "layout", "lora")


@pytest.fixture
def extended(tmp_path):
    """`extended(name)` copies an example elsewhere; what it returns runs `mmv` with that example."""

    def copy(name):
        file = shutil.copy(EXAMPLES / f"extend_{name}.py", tmp_path / f"my_{name}.py")

        return partial(installed, cwd=tmp_path, MMV_EXTENSIONS=str(file))

    return copy


def example(name):
    """An example as a module."""
    spec = importlib.util.spec_from_file_location(f"extend_{name}", EXAMPLES / f"extend_{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TABLES = {"TOWERS": TOWERS, "PROJECTORS": PROJECTORS, "FREEZE_POLICIES": FREEZE_POLICIES,
          "CHAT_LAYOUTS": CHAT_LAYOUTS, "TASKS": TASKS, "TARGETS": TARGETS}  # fmt: skip


def test_the_page_lists_the_names_that_are_taken():
    page = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    listed = {name: re.search(rf"^\| `{name}` \| (.*) \|$", page, re.MULTILINE)[1] for name in TABLES}
    assert listed == {name: ", ".join(f"`{own}`" for own in table.own) for name, table in TABLES.items()}


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("add", ["TABLE[NAME] = TABLE[NAME]", "TABLE.update({NAME: TABLE[NAME]})"])
def test_an_extension_cannot_take_the_name_of_a_part_of_the_package(table, add, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    taken = TABLES[table].own[-1]
    module = next(module for module in list(sys.modules.values()) if vars(module).get(table) is TABLES[table])
    file = f"own_{table.lower()}_{len(add)}.py"
    Path(file).write_text(add.replace("TABLE", f"__import__('sys').modules[{module.__name__!r}].{table}")
                          .replace("NAME", repr(taken)))  # fmt: skip
    monkeypatch.setenv("MMV_EXTENSIONS", file)
    with pytest.raises(UsageError, match=rf"^MMV_EXTENSIONS: {file}: {taken} exists; choose another name"):
        load_extensions()


def test_an_extension_cannot_take_the_name_that_another_has_added(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = [f"{name}_{tmp_path.name}.py" for name in ("first", "second")]
    for number, name in enumerate(names):
        Path(name).write_text("from minimind_v.core.config.freeze import FREEZE_POLICIES\n"
                              f"FREEZE_POLICIES['mine'] = ['policy {number}']\n")  # fmt: skip
    monkeypatch.setenv("MMV_EXTENSIONS", ":".join(names))
    try:
        refused = rf"^MMV_EXTENSIONS: {names[1]}: mine exists, added by {names[0]}; rename one of the two"
        with pytest.raises(UsageError, match=refused):
            load_extensions()
        assert FREEZE_POLICIES["mine"] == ["policy 0"]
    finally:
        del FREEZE_POLICIES["mine"]
    monkeypatch.setenv("MMV_EXTENSIONS", names[1])
    load_extensions()
    assert FREEZE_POLICIES.pop("mine") == ["policy 1"]


@pytest.mark.parametrize("name", NAMES)
def test_an_example_is_one_short_file(name):
    assert len((EXAMPLES / f"extend_{name}.py").read_text(encoding="utf-8").splitlines()) < 80


@pytest.mark.parametrize(
    ("name", "command", "listed"),
    [("lora", "train", "attention, all, lora."), ("target", "convert", "as published; npz: ")],
)
def test_help_names_what_an_extension_adds(extended, name, command, listed):
    shown = extended(name)(command, "--help").out
    assert listed in " ".join(shown.split())


def test_the_shell_completes_what_an_extension_adds(extended, monkeypatch):
    for variable, value in (("_MMV_COMPLETE", "complete_bash"), ("COMP_WORDS", "mmv train sft --freeze l")):
        monkeypatch.setenv(variable, value)
    monkeypatch.setenv("COMP_CWORD", "4")
    assert extended("lora")().out.split() == ["lora"]


@pytest.mark.long
def test_a_task_scores_its_own_rows(extended, tmp_path):
    rows = read_rows(tiny_data().data("sft"))[:4]
    for row, answer in zip(rows, ["yes", "it is a red star", "a star", "two"], strict=True):
        row["conversations"] = [row["conversations"][0], {"role": "assistant", "content": answer}]
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    command = [
        "eval",
        "--model",
        sighted(),
        *SIGHT,
        "--data",
        data,
        "--images",
        tiny_data().images("sft"),
        "--json",
        "--out",
        tmp_path / "eval",
    ]
    report = extended("task")(*command, "--task", "length").json
    assert (report["rows"], report["skipped"]) == (3, 1)
    assert [metric["name"] for metric in report["metrics"]] == ["right_length"]
    refused = installed(*command, "--task", "length")
    assert refused.code == 2
    assert "loss, vqa, yesno, choice, caption" in refused.error


def test_a_target_writes_and_proves_its_file(extended, tmp_path):
    out = tmp_path / "weights.npz"
    ended = extended("target")("convert", "--to", "npz", "--model", sighted(), "--out", out, "--json")
    assert ended.json == {"out": str(out), "kind": "npz", "verified": {"weights": "the same"}}
    tensors = read_checkpoint(sighted()).tensors
    with np.load(out) as saved:
        assert all(np.array_equal(saved[name], tensor.numpy()) for name, tensor in tensors.items())


def database(path: Path, rows: int) -> Path:
    """A database of questions about the pictures of the tests, one of them without."""
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE rows (question TEXT, answer TEXT, image BLOB)")
        for number in range(rows):
            image = tiny_data().picture(number).read_bytes() if number else None
            connection.execute("INSERT INTO rows VALUES (?, ?, ?)", ("What is it?", f"number {number}", image))
    connection.close()
    return path


@pytest.mark.long
def test_rows_of_a_store_are_checked_converted_and_trained_on(extended, tmp_path):
    data, run = database(tmp_path / "rows.sqlite", 8), extended("store")
    report = run("data", "check", data, *SIGHT, "--json").json
    assert (report["rows"], report["problems"]) == (8, [])
    assert run("info", data, "--json").json["files"] == "SQLite"
    ended = run(*tiny_data().train(tmp_path / "out", data=data, images=None, workers=1, max_steps=2))
    assert ended.code == 0, ended.err
    assert [record["step"] for record in read_rows(tmp_path / "out" / "pretrain_vlm_128" / "metrics.jsonl")] == [1, 2]


FAILING = """
from multiprocessing import parent_process

from minimind_v.core.rows.file_rows import FileRows
from minimind_v.core.rows.forms import read_row
from minimind_v.core.rows.stores import STORES, Store


class Rows(FileRows):
    file_kind = "own"

    def __len__(self):
        return 400  # more than a run checks before it starts workers

    def row(self, index):
        if self.path.read_text() == "several" and parent_process() is None:
            return read_row({"question": "What is it?", "answer": "a star"})
        raise ValueError("no such field")


STORES.insert(0, Store("own", ".own", lambda path: path.suffix == ".own", lambda path, images, *_: Rows(path, images)))
"""


@pytest.mark.parametrize("processes", ["none", pytest.param("several", marks=pytest.mark.long)])
def test_an_error_of_an_extension_is_reported_with_its_line_and_not_as_one_of_this_package(tmp_path, processes):
    (tmp_path / "failing.py").write_text(FAILING)
    (tmp_path / "rows.own").write_text(processes)
    run = partial(installed, cwd=tmp_path, MMV_EXTENSIONS=str(tmp_path / "failing.py"))
    line = FAILING.splitlines().index('        raise ValueError("no such field")') + 1
    message = f"{tmp_path / 'failing.py'}:{line}: ValueError: no such field — an error in this extension"
    if processes == "none":
        assert run("info", "rows.own").error == message
        return
    assert run("data", "check", "rows.own", *SIGHT, "--workers", 2).error == message
    trained = run(*tiny_data().train("out", data="rows.own", images=None, workers=1, max_steps=2))
    assert trained.error.startswith("a data worker failed at rows.own:")
    assert trained.error.endswith(message)


@pytest.mark.long
def test_a_layout_is_trained_with_and_stored(extended, tmp_path):
    run, out = extended("layout"), tmp_path / "out"
    train = tiny_data().train(out, "sft", max_steps=2, init=sighted(), workers=1)
    ended = run(*train, "--set", "data.layout=alpaca")
    assert ended.code == 0, ended.err
    weights = out / "sft_vlm_128.pth"
    assert json.loads(weights.with_suffix(".json").read_text())["trained_with"]["layout"] == "alpaca"
    asked = run("chat", "--model", weights, "What is it?", "--greedy", "--max-new-tokens", "4", "--json")
    assert asked.code == 0, asked.err
    refused = run("convert", "--to", "hf", "--model", weights, "--out", tmp_path / "hf")
    assert "chat layout alpaca" in refused.error
    assert "data.layout 'alpaca'" in installed("chat", "--model", weights, "What is it?", cwd=tmp_path).error


# --- LoRA -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def lora():
    yield example("lora")
    FREEZE_POLICIES.pop("lora", None)


def test_a_zero_adapter_merges_to_the_very_same_weights(lora):
    model = sighted_model()
    before = export_tensors(model)
    trained = freeze(model, "lora")
    assert len(trained) == 2 + 2 * len(lora.WRAPPED) * model.config.num_hidden_layers  # with those of the projector
    after = export_tensors(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name].view(torch.int16), after[name].view(torch.int16)) for name in before)


def test_a_trained_adapter_computes_what_its_merged_weight_does(lora):
    torch.manual_seed(0)
    base = nn.Linear(12, 8, bias=False)
    layer = lora.LoRALinear(base)
    nn.init.normal_(layer.lora_b)
    x = torch.randn(3, 5, 12)
    merged = nn.Linear(12, 8, bias=False)
    merged.load_state_dict(layer.state_dict())
    assert layer.state_dict().keys() == {"weight"}
    torch.testing.assert_close(layer(x), merged(x))
    assert not torch.equal(layer(x), base(x))


def test_lora_trains_through_the_layers_that_the_model_calls(lora):
    model = sighted_model()
    freeze(model, "lora")
    model(torch.arange(3, 40)[None], labels=torch.arange(3, 40)[None]).loss.backward()
    layer = model.model.layers[0].self_attn.q_proj
    assert layer.lora_b.grad.abs().sum() > 0
    assert layer.weight.grad is None


@pytest.mark.long
def test_a_run_with_lora_resumes_bit_for_bit_and_saves_published_names(extended, tmp_path):
    run, whole, stopped = extended("lora"), tmp_path / "whole", tmp_path / "stopped"

    def train(out, *more):
        command = tiny_data().train(out, "sft", freeze="lora", init=sighted(), lr=1e-2, max_steps=4, save_every=2)
        ended = run(*command, *more)
        assert ended.code == 0, ended.err
        return read_checkpoint(out / "sft_vlm_128.pth").tensors

    weights = train(whole)
    shutil.copytree(whole, stopped)
    (stopped / "sft_vlm_128.pth").unlink()
    max((stopped / "sft_vlm_128" / "states").iterdir()).unlink()  # as if it had been killed in step 3
    resumed = train(stopped, "--resume")
    assert weights.keys() == read_checkpoint(sighted()).tensors.keys()
    assert all(torch.equal(weights[name], resumed[name]) for name in weights)
    frozen = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(weights[frozen], read_checkpoint(sighted()).tensors[frozen])
