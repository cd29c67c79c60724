"""Operators of an update, counted on a CPU in the code of a GPU: each is one kernel there, or a few.

    python -m benchmarks.gpu.operators

A model is as deep as its preset and has as many experts, but is narrow: widths change no number.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from minimind_v.core.config.presets import PRESETS
from minimind_v.core.config.schema import RunConfig, VisionSpec
from minimind_v.core.data.batch import Batch
from minimind_v.core.data.feature_cache import FeatureCache
from minimind_v.core.model.kernels import cuda_moe
from minimind_v.core.model.kernels.accelerate import accelerate
from minimind_v.core.model.kernels.cuda_linear import CudaLinear
from minimind_v.core.model.loss import supervised
from minimind_v.core.model.vlm import VLM
from minimind_v.core.train.graph import StepGraphs
from minimind_v.core.train.step import TrainStep

UPDATES = {  # preset, what trains
    "small pretrain": ("small", "projector+last"),
    "small sft": ("small", "all"),
    "moe sft": ("moe", "all"),
    "3v sft": ("3v", "all"),
    "3v-moe sft": ("3v-moe", "all"),
}
# Operators that launch nothing: views, memory without contents, and checks that only a CPU makes.
NOTHING = {
    "view", "t", "transpose", "expand", "detach", "as_strided", "unbind", "split", "split_with_sizes", "slice",
    "select", "unsqueeze", "squeeze", "permute", "alias", "_unsafe_view", "_reshape_alias", "lift_fresh", "empty",
    "empty_like", "empty_strided", "new_empty", "new_empty_strided", "aminmax", "_local_scalar_dense",
}  # fmt: skip


class Operators(TorchDispatchMode):
    """Counts operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.counts[name] += name not in NOTHING
        return func(*args, **(kwargs or {}))

    def rms_norm(self, x: Tensor, shape: tuple[int, ...], weight: Tensor, eps: float) -> Tensor:
        """As on a GPU: one operator, and one of the backward pass. A CPU has no kernel for it."""
        counts = self.counts

        class Norm(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
                counts["rms_norm"] += 1
                ctx.save_for_backward(x, weight)
                with _disable_current_modes():
                    return torch.rms_norm(x, shape, weight, eps)

            @staticmethod
            def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
                counts["rms_norm_backward"] += 1
                with _disable_current_modes():
                    return torch.zeros_like(gradient), torch.ones_like(ctx.saved_tensors[1])

        normed: Tensor = Norm.apply(x, weight)  # type: ignore[no-untyped-call]
        return normed


def count(preset: str, policy: str) -> Counter[str]:
    """The operators of an update with one micro-batch of images and text."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "vocab_size": 61}
    text = replace(PRESETS[preset], **sizes)
    spec = VisionSpec(image_size=16, patch_size=8, width=24)
    model = accelerate(VLM(text, spec, 5).train(), torch.device("cuda"))
    config = RunConfig(stage="sft", model=text, freeze=policy, dtype="bfloat16", device="cpu", out=Path())
    step = TrainStep(config, model, FeatureCache())
    for module in model.modules():  # as on a GPU
        if type(module) is nn.Linear and not module.weight.requires_grad:
            module.__class__ = CudaLinear
    step.late, step.graphs = True, StepGraphs(config, model, step.optimiser, lambda *_: None, print)
    step.graphs.graphs.on = False
    operators = Operators()
    with (
        mock.patch.object(cuda_moe, "is_grouped", return_value=True),
        mock.patch.object(F, "rms_norm", operators.rms_norm),
    ):
        step([batch()], 20, 2, 1e-3)  # makes what stays
        operators.counts.clear()
        with operators:
            step([batch()], 20, 2, 1e-3)
    return operators.counts


def batch() -> Batch:
    """Two rows with an image each."""
    ids = torch.randint(6, 61, (2, 32))
    image_mask = (torch.arange(32) < 4).expand(2, -1)
    labels = torch.where(torch.arange(32) > 22, ids, -100)
    positions, targets = supervised(labels)
    return Batch(
        ids, torch.ones_like(ids, dtype=torch.bool), labels, image_mask, None, torch.randn(2, 4, 24), keys=[b""] * 2,
        image_positions=image_mask.flatten().nonzero()[:, 0], supervised_positions=positions, targets=targets,
    )  # fmt: skip


def main() -> None:
    for name, update in UPDATES.items():
        counts = count(*update)
        most = ", ".join(f"{number} {operator}" for operator, number in counts.most_common(8))
        print(f"{name}: {counts.total()} operators, among them {most}")


if __name__ == "__main__":
    main()
