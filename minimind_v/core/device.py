"""Where computing happens, and in which precision."""

from __future__ import annotations

import sys
import textwrap
from contextlib import AbstractContextManager, nullcontext

import torch

from minimind_v.core.errors import UsageError


def pick_device(name: str, local_rank: int | None = None) -> torch.device:
    """`auto` is CUDA where there is one, else the CPU. Of several processes on a machine, each has a GPU of its own.

    Raises UsageError for a device that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and local_rank is not None:
        if local_rank >= torch.cuda.device_count():
            raise UsageError(
                f"process {local_rank + 1} on this machine, which has {torch.cuda.device_count()} GPUs — "
                "lower --gpus, or count processes on the CPU with --device cpu"
            )
        name = f"cuda:{local_rank}"
    try:
        device = torch.device(name)
        float(torch.ones(1, device=device))  # some can be made, and not be computed with
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = textwrap.shorten(str(error), 100, placeholder=" …")
        raise UsageError(
            f"--device {name}: not to be had here ({reason}) — auto, cpu, cuda and cuda:1 are usual"
        ) from None
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # what is asked without naming a device is meant of this one
    return device


def autocast(device: torch.device, dtype: str) -> AbstractContextManager[object]:
    """bf16 autocast where asked for or, with `auto`, on a CUDA device that has it; fp32 master weights always."""
    if dtype == "auto":
        dtype = "bfloat16" if has_bf16(device) else "float32"
    return torch.autocast(device.type, torch.bfloat16) if dtype == "bfloat16" else nullcontext()


def has_bf16(device: torch.device) -> bool:
    """Whether a device computes in bf16 by itself. Older GPUs imitate it, and are slower for that."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def peak_memory() -> tuple[int, int]:
    """The most bytes that this process has held, 0 where that is not known, and of them on its GPU."""
    try:
        import resource
    except ImportError:  # Windows has no such count
        peak = 0
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return peak, torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else 0
