"""How fast the card itself is: memory, products, launches, transfers. And what of torch's is there."""

from __future__ import annotations

import os
import platform
import shutil

import torch
from torch.nn import functional as F

from benchmarks.gpu.card import Card, Result


def start(card: Card, result: Result) -> None:
    """Versions, the card, and what decides which kernels run."""
    result |= {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cores": os.cpu_count(),
        "shm_free_gb": round(shutil.disk_usage("/dev/shm").free / 1e9, 1) if os.path.isdir("/dev/shm") else None,
        "work_free_gb": round(shutil.disk_usage(card.folder).free / 1e9, 1),
        "grouped_mm": hasattr(F, "grouped_mm"),
        "cudnn_attention": torch.backends.cuda.cudnn_sdp_enabled(),
        "tf32": [torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32],
    }
    if card.cuda:
        properties = torch.cuda.get_device_properties(card.device)
        result |= {
            "memory_gb": round(properties.total_memory / 1e9, 1),
            "capability": f"{properties.major}.{properties.minor}",
            "cudnn": torch.backends.cudnn.version(),
        }
    result["checks"] = {
        "cuDNN attention is off": not result["cudnn_attention"],
        "TF32 is off": not any(result["tf32"]),
    }


def ceilings(card: Card, result: Result) -> None:
    """Rates of the card, against which everything else is read."""
    mega = 1 if card.tiny else 1024
    source = torch.randn(mega * 2**18, device=card.device)
    target = torch.empty_like(source)
    result["copy_gb_s"] = round(2 * source.nbytes / card.seconds(lambda: target.copy_(source)) / 1e9, 1)
    for name, side, kind in (("bf16", 8192, torch.bfloat16), ("fp32", 4096, torch.float32)):
        side = 64 if card.tiny else side
        left, right = (torch.randn(side, side, device=card.device, dtype=kind) for _ in range(2))
        result[f"{name}_tflops"] = round(2 * side**3 / card.seconds(lambda a=left, b=right: a @ b) / 1e12, 4)
    # Products as an update has them: 16 rows of 262 tokens, hidden 512 → 1408.
    rows, inner, width = (64, 64, 64) if card.tiny else (4192, 1408, 512)
    left = torch.randn(rows, width, device=card.device, dtype=torch.bfloat16)
    right = torch.randn(width, inner, device=card.device, dtype=torch.bfloat16)
    taken = card.seconds(lambda: left @ right, 200)
    result["bf16_tflops_of_an_update"] = round(2 * rows * inner * width / taken / 1e12, 4)
    result["launch_us"] = launch_us(card)
    if card.cuda:
        small = torch.zeros(16, device=card.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(200):
                small.add_(1)
        result["graph_node_us"] = round(card.seconds(graph.replay, 20) / 200 * 1e6, 2)
        pinned = torch.empty(2**28, dtype=torch.uint8, pin_memory=True)
        on_device = torch.empty_like(pinned, device=card.device)
        taken = card.seconds(lambda: on_device.copy_(pinned, non_blocking=True), 5)
        result["pinned_to_card_gb_s"] = round(pinned.nbytes / taken / 1e9, 1)


def launch_us(card: Card) -> float:
    """Microseconds of a kernel that is launched alone."""
    small = torch.zeros(16, device=card.device)
    return round(card.seconds(lambda: small.add_(1), 2000, 100) * 1e6, 2)
