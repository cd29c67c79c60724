"""Where computing happens, in which precision, and by which of CUDA's kernels. No GPU is needed to decide it."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from minimind_v.core import device
from minimind_v.core.config.recipes import pretrain
from minimind_v.core.monitor.fingerprint import check_origin, origin_of

CUDA = torch.device("cuda")


def test_slow_plans_and_tf32_are_switched_off():
    torch.backends.cuda.enable_cudnn_sdp(True)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    device.pick_device("cpu")
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32


@pytest.mark.parametrize(("asked", "kind"), [("auto", "bfloat16"), ("float32", "float32"), ("bfloat16", "bfloat16")])
def test_auto_is_what_the_device_has(asked, kind, monkeypatch):
    monkeypatch.setattr(device, "has_bf16", lambda where: where.type == "cuda")
    assert device.resolve_dtype(CUDA, asked) == kind
    assert device.resolve_dtype(torch.device("cpu"), "auto") == "float32"


@pytest.mark.long
def test_determinism_is_strict_and_reaches_cublas():
    """In a process of its own, since it is for the whole of it."""
    script = (
        "import os, torch; from minimind_v.core.device import require_determinism; require_determinism();"
        "print(torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled(),"
        "os.environ['CUBLAS_WORKSPACE_CONFIG'], torch.utils.deterministic.fill_uninitialized_memory)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False", ":4096:8", "False"]


def test_a_run_on_another_gpu_or_in_another_precision_is_reported_and_refused(monkeypatch):
    """`dtype: auto` is the same word on both sides."""
    config = pretrain()
    on_cpu = origin_of(config, torch.device("cpu"))
    assert (on_cpu["precision"], on_cpu["computed_on"]) == ("float32", "cpu")
    monkeypatch.setattr(device, "has_bf16", lambda where: where.type == "cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda where: "NVIDIA Something")
    on_cuda = origin_of(config, CUDA)
    messages: list[str] = []
    differences = [
        "precision: bfloat16 in the interrupted run, float32 now",
        "computed_on: NVIDIA Something in the interrupted run, cpu now",
    ]
    with pytest.raises(device.UsageError, match="--allow precision --allow computed_on") as refused:
        check_origin(on_cuda, on_cpu, (), messages.append)
    assert (refused.value.lines[1:], messages) == (differences, [])
    check_origin(on_cuda, on_cpu, ("precision", "computed_on"), messages.append)
    assert messages == [f"{line} (allowed)" for line in differences]
    assert origin_of(replace(config, deterministic=True), CUDA)["deterministic"] is True


def test_only_a_run_on_a_gpu_starts_cuda(monkeypatch):
    """What a run writes down of its machine must not take memory of a GPU that it does not use."""
    from minimind_v.core.monitor.manifest import machine

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: f"card {number}")
    assert machine()["gpus"] == []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert machine()["gpus"] == ["card 0", "card 1"]
