"""The plain model reads as on a blackboard: what only a kernel needs stands in `kernels`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import minimind_v.core.model

FOLDER = Path(minimind_v.core.model.__file__).parent
PLAIN = [path for path in FOLDER.rglob("*.py") if "kernels" not in path.parts]
FORBIDDEN = {
    "a backward pass of its own": r"\bautograd\b|\bFunction\b",
    "a private operator": r"torch\.ops\b|torch\._|\._C\b",
    "a test of the device": r"\.type\s*(==|!=|in\b|not in\b)|is_cuda|is_mps|is_cpu",
    "complex numbers": r"view_as_complex|view_as_real|torch\.polar|is_complex|\bcomplex\b",
    "a weight in place of its module": r"F\.linear\([^)]*_proj\.weight|lm_head\.weight\)",
    "a kernel": r"import.*kernels|from.*kernels",
}


def matches(text: str, what: str) -> list[str]:
    return [line for line in text.splitlines() if re.search(FORBIDDEN[what], line)]


@pytest.mark.parametrize("what", FORBIDDEN)
def test_plain_files_have_none_of(what):
    assert len(PLAIN) > 8
    assert {path.name: lines for path in PLAIN if (lines := matches(path.read_text(encoding="utf-8"), what))} == {}


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("class _Norm(torch.autograd.Function):", "a backward pass of its own"),
        ("torch.ops.aten._softmax.out(x)", "a private operator"),
        ('if x.device.type == "cpu":', "a test of the device"),
        ("torch.view_as_complex(x)", "complex numbers"),
        ("F.linear(x, self.q_proj.weight)", "a weight in place of its module"),
        ("from minimind_v.core.model.kernels.accelerate import accelerate", "a kernel"),
    ],
)
def test_each_would_be_noticed(line, what):
    assert matches(line, what) == [line]
