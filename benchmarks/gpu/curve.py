"""Fifty steps on made-up features, the same on every device. As a program: those of the CPU, as JSON.

The numbers are drawn on the CPU from a seed, so a card and a CPU begin with the same weights and read the same rows.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks import material
from benchmarks.gpu.card import TINY_TEXT
from minimind_v.core.config.presets import PRESETS
from minimind_v.core.config.schedule import COSINE_2025
from minimind_v.core.data.batch import Batch
from minimind_v.core.device import autocast, pick_device
from minimind_v.core.model.kernels.accelerate import accelerate
from minimind_v.core.model.loss import IGNORE
from minimind_v.core.model.vision.encoder import VisionSpec
from minimind_v.core.model.vlm import VLM

ROOT = Path(__file__).resolve().parents[2]
STEPS, ROWS = 50, 8
SPEC = VisionSpec(image_size=224, patch_size=16, width=768)
SEED = 1


def make_model(tiny: bool, preset: str = "small") -> VLM:
    """The model that learns; its random weights give logits far from uniform."""
    return material.make_model(TINY_TEXT[preset] if tiny else PRESETS[preset], SEED, SPEC.width)


def make_batch(number: int, rows: int = ROWS, length: int = 0, answer: int = 40) -> Batch:
    """Rows of random ids behind a picture's features, the last `answer` ids supervised; the first row is shorter."""
    draw = torch.Generator().manual_seed(number)
    length = length or 240 + 5 * (number % 5)
    patches = SPEC.tokens_per_image
    ids = torch.randint(0, 6400, (rows, length), generator=draw)
    image_mask = torch.zeros(rows, length, dtype=torch.bool)
    image_mask[:, 20 : 20 + patches] = True
    labels = torch.where(torch.arange(length) >= length - min(answer, length - patches - 21), ids, IGNORE)
    attention_mask = torch.ones_like(image_mask)
    attention_mask[0, -7:], labels[0, -7:] = False, IGNORE
    features = torch.randn(rows, patches, SPEC.width, generator=draw)
    return Batch(ids, attention_mask, labels, image_mask, image_features=features)


def start(tiny: bool) -> subprocess.Popen[str]:
    """A process that computes the losses on half of the CPU's cores and prints them."""
    command = [sys.executable, "-m", "benchmarks.gpu.curve", *(["--tiny"] if tiny else [])]
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 2) // 2)), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)


def losses(device: torch.device, dtype: str, tiny: bool) -> tuple[list[float], Tensor]:
    """The loss of each step, and the gradient of the first as one long vector."""
    model = accelerate(make_model(tiny).to(device).train(), device)
    trained = list(model.parameters())
    optimiser = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.01, fused=device.type in ("cpu", "cuda"))
    step_losses, first = [], torch.empty(0)
    steps = 3 if tiny else STEPS
    for step in range(steps):
        batch = make_batch(step, 2 if tiny else ROWS).to(device)
        for group in optimiser.param_groups:
            group["lr"] = COSINE_2025.rate(step + 1, steps, 4e-4)
        with autocast(device, dtype):
            out = model(**batch.tokens, image_features=batch.image_features)
        out.loss.backward()
        if not step:
            first = torch.cat(
                [parameter.grad.flatten().float().cpu() for parameter in trained if parameter.grad is not None]
            )
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        step_losses.append(out.loss.detach())
    return [float(loss) for loss in step_losses], first


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--tiny", action="store_true")
    print(json.dumps(losses(pick_device("cpu"), "float32", parser.parse_args().tiny)[0]))
