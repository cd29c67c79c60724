"""The device and the precision of a computation."""

from __future__ import annotations

import os
import sys
import textwrap
from contextlib import AbstractContextManager, nullcontext

import torch

from minimind_v.core.cpu_sharing import share_cpu
from minimind_v.core.errors import UsageError
from minimind_v.core.machine import check_processes


def pick_device(name: str, local_rank: int | None = None) -> torch.device:
    """`auto` is CUDA where there is one, else Apple's GPU (MPS), else the CPU.

    Each process on a machine gets its own GPU; Apple's single GPU is not shared.
    Raises UsageError for a device that does not exist.
    """
    if name == "auto":
        alone = local_rank is None
        name = "cuda" if torch.cuda.is_available() else "mps" if alone and torch.backends.mps.is_available() else "cpu"
    if name.startswith("mps") and local_rank is not None:
        raise UsageError(f"--device {name} is one GPU for one process — leave out --gpus, or use --device cpu")
    if name == "cuda" and local_rank is not None:
        if local_rank >= torch.cuda.device_count():
            raise UsageError(
                f"process {local_rank + 1} on this machine, which has {torch.cuda.device_count()} GPUs — "
                "lower --gpus, or count processes on the CPU with --device cpu"
            )
        name = f"cuda:{local_rank}"
    _choose_kernels()
    try:
        device = torch.device(name)
        float(torch.ones(1, device=device))  # some can be made, and not be computed with
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = textwrap.shorten(str(error), 100, placeholder=" …")
        raise UsageError(
            f"--device {name}: not available on this machine ({reason}) — auto, cpu, cuda, cuda:1 and mps are usual"
        ) from None
    if device.type == "cpu":
        share_cpu()
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # calls that name no device mean this one
    return device


def check_room(name: str, processes: int) -> None:
    """Raises UsageError if this machine does not have a device for each process."""
    gpus = torch.cuda.device_count() if name in ("auto", "cuda") else 0
    if name == "cpu" or (name == "auto" and not gpus):
        check_processes(processes)
    elif name in ("auto", "cuda") and processes > gpus:
        raise UsageError(
            f"--gpus {processes} on this machine, which has {gpus} — lower it, or count processes on the CPU with "
            "--device cpu"
        )


def _choose_kernels() -> None:
    """Select the CUDA kernels that torch may use. This needs no GPU."""
    # cuDNN's attention makes a plan for every new number of rows and tokens, which takes up to a second.
    torch.backends.cuda.enable_cudnn_sdp(False)
    # fp32 means fp32: TF32 keeps 10 bits of a product's factors, and convolutions use it unless told otherwise.
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def require_determinism() -> None:
    """Make this process bit-exact repeatable on a GPU. Must be called before the first matrix product on a GPU.

    Without this, backward passes of attention add up in the order in which a GPU's blocks end.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it torch refuses cuBLAS
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # all is written before it is read


def resolve_dtype(device: torch.device, dtype: str) -> str:
    """The precision that `auto` means: bfloat16 on a GPU that supports it, else float32."""
    if dtype == "auto":
        return "bfloat16" if has_bf16(device) else "float32"
    return dtype


def autocast(device: torch.device, dtype: str) -> AbstractContextManager[object]:
    """bf16 autocast if requested or, with `auto`, on a GPU that supports it; master weights are always fp32."""
    kind = resolve_dtype(device, dtype)
    return torch.autocast(device.type, torch.bfloat16) if kind == "bfloat16" else nullcontext()


def has_bf16(device: torch.device) -> bool:
    """Whether a device computes in bf16 itself. Older GPUs imitate it and are slower; macOS 13 lacks it."""
    if device.type == "mps":
        return torch.amp.is_autocast_available("mps") and torch.backends.mps.is_macos_or_newer(14, 0)
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def has_fused_adamw(device: torch.device) -> bool:
    """Whether AdamW's fused form, one pass over each tensor with the same arithmetic, was tried on a device."""
    return device.type in ("cpu", "cuda")


def wait_for(device: torch.device) -> None:
    """Wait until a device has done all its work, so that time can be measured."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def device_name(device: torch.device) -> str:
    """The name of the GPU, else the type of the device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def gpu_names() -> list[str]:
    """The GPUs of this machine. This starts CUDA."""
    names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return names or ["Apple GPU (MPS)"] * torch.backends.mps.is_available()


def peak_memory() -> tuple[int, int]:
    """The peak memory of this process in bytes (0 if unknown), and what it has taken of its GPU's."""
    try:
        import resource
    except ImportError:  # Windows has no such count
        peak = 0
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return peak, torch.cuda.max_memory_reserved() if torch.cuda.is_initialized() else 0
