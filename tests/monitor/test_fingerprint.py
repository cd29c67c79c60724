"""Which code decides a run's numbers: all that a step or a model is made of, and no page or message."""

from __future__ import annotations

import ast
import shutil
from pathlib import Path

import pytest
import torch

import minimind_v
from minimind_v.core.config.recipes import sft
from minimind_v.core.errors import UsageError
from minimind_v.core.monitor.fingerprint import ADDED, check_origin, deciding_modules, origin_of
from minimind_v.core.source import source_digest

CORE = Path(minimind_v.__file__).parent / "core"
# What a run imports, and what nevertheless alters no number: it reports, checks, moves files or ends processes. Values
# of the configuration and contents of inputs and extensions are compared by themselves; measurements use
# evaluation and generation, and a step the recording of the latter.
NEUTRAL = (
    "config/", "curate/", "data/picture_names.py", "data/processor.py", "errors.py", "evaluate/", "extensions.py",
    "files.py", "formats/companions.py", "formats/generations.py", "formats/gguf/", "formats/hf/differences.py",
    "formats/inputs.py", "generate/", "hub/", "machine.py", "monitor/", "outputs.py", "pages/", "paths.py",
    "processes.py", "signals.py", "source.py", "train/batch_size.py", "train/evaluator.py", "train/forecast.py",
    "train/launch.py", "train/recall.py", "train/records.py", "train/run_folder.py", "train/saver.py", "train/trial.py",
    "train/validate.py", "version.py", "wording.py", "arguments.py", "formats/inventory.py",
)  # fmt: skip


def imports_of(path: Path) -> set[Path]:
    """The modules of core that a module imports, those inside functions included."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("minimind_v.core"):
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            files = (CORE.parent.parent.joinpath(*name.split(".")).with_suffix(".py") for name in names)
            modules |= {file for file in files if file.is_file()}
    return modules


def reached_from(*roots: str) -> set[Path]:
    """All modules that these import, directly or through others."""
    waiting, reached = [CORE / root for root in roots], set()
    while waiting:
        path = waiting.pop()
        if path not in reached:
            reached.add(path)
            waiting += imports_of(path)
    return reached


def names(paths) -> set[str]:
    return {path.relative_to(CORE).as_posix() for path in paths}


def test_all_that_a_step_or_its_parts_import_decides_or_is_known_to_decide_nothing():
    deciding = names(deciding_modules(CORE))
    imported = names(reached_from("train/step.py", "train/build.py", "train/loop.py", "train/run.py"))
    unsorted = {name for name in imported - deciding if not name.startswith(NEUTRAL) or name == "config/schedule.py"}
    assert unsorted == set(), "add each to DECIDING in monitor/fingerprint.py, or to NEUTRAL here"


def test_what_reports_decides_nothing():
    deciding = names(deciding_modules(CORE))
    assert not {name for name in deciding if name.startswith(("pages/", "monitor/", "curate/", "export/", "errors.py"))}
    assert not {name for name in deciding if name.startswith(("formats/gguf/", "formats/hf/card.py"))}
    for name in ("model/decoder.py", "train/step.py", "config/freeze.py", "data/loader.py", "config/schedule.py"):
        assert name in deciding


@pytest.mark.parametrize(
    ("name", "refused"),
    [
        ("model/kernels/cpu_training.py", True),
        ("train/step.py", True),
        ("data/loader.py", True),
        ("config/schedule.py", True),
        ("config/generation.py", True),
        ("pages/frame.py", False),
        ("monitor/messages.py", False),
        ("formats/hf/write.py", False),
        ("rows/writers.py", False),
        ("errors.py", False),
    ],
)
def test_a_change_of_deciding_code_alone_changes_the_digest(tmp_path, name, refused):
    copy = Path(shutil.copytree(CORE, tmp_path / "core", ignore=shutil.ignore_patterns("__pycache__", "assets")))
    before = source_digest(deciding_modules(copy))
    with (copy / name).open("a") as file:
        file.write("changed = 1\n")
    assert (source_digest(deciding_modules(copy)) != before) == refused


CODE = '''
"""Halve."""
def halve(x: float, listener) -> float:
    """Half of a number."""
    if x < 0:
        raise UsageError(f"{x} is negative", "halve")
    listener.message("halving")
    return x * 0.5  # exact
'''


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("Half of a number.", "The half.", True),
        ("# exact", "", True),
        ("x * 0.5", "(x\n * 0.50)", True),
        ("{x} is negative", "it is {x:.2f}", True),
        ("halving", "divide by two", True),
        ("x * 0.5", "x * 0.25", False),
        ("x < 0", "x <= 0", False),
        ("UsageError", "ValueError", False),
        ("return x", 'return "x"', False),
    ],
)
def test_a_change_of_what_code_computes_alone_changes_its_digest(tmp_path, old, new, same):
    assert old in CODE
    before, after = tmp_path / "before.py", tmp_path / "after.py"
    before.write_text(CODE)
    after.write_text(CODE.replace(old, new))
    assert (source_digest([before]) == source_digest([after])) == same


def test_a_state_of_an_earlier_release_resumes_with_the_values_that_it_did_not_record():
    now = origin_of(sft(), torch.device("cpu"))
    earlier = {key: value for key, value in now.items() if key not in ADDED}
    assert len(earlier) == len(now) - len(ADDED)
    check_origin(earlier, now, (), pytest.fail)
    normed = now | {"model.qk_norm": True}
    with pytest.raises(UsageError, match=r"--allow model\.qk_norm") as refused:
        check_origin(earlier, normed, (), pytest.fail)
    assert refused.value.lines[1:] == ["model.qk_norm: False in the interrupted run, True now"]
