"""Where computing happens, and in which precision."""

from __future__ import annotations

import textwrap
from contextlib import AbstractContextManager, nullcontext

import torch

from minimind_v.core.errors import UsageError


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one, else the CPU. Raises UsageError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        float(torch.ones(1, device=device))  # some can be made, and not be computed with
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = textwrap.shorten(str(error), 100, placeholder=" …")
        raise UsageError(
            f"--device {name}: not to be had here ({reason}) — auto, cpu, cuda and cuda:1 are usual"
        ) from None
    return device


def autocast(device: torch.device, dtype: str) -> AbstractContextManager[object]:
    """bf16 autocast where asked for or, with `auto`, on a CUDA device that has it; fp32 master weights always."""
    if dtype == "auto":
        dtype = "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"
    return torch.autocast(device.type, torch.bfloat16) if dtype == "bfloat16" else nullcontext()
