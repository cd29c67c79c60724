"""One optimiser step: forward and backward over its micro-batches, clipping, AdamW. Nothing else changes a weight."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from inspect import unwrap

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from minimind_v.core.config.schema import RunConfig
from minimind_v.core.cuda_graph import record_cuda
from minimind_v.core.data.batch import Batch
from minimind_v.core.data.feature_cache import FeatureCache
from minimind_v.core.device import autocast, has_fused_adamw
from minimind_v.core.model.vlm import VLM
from minimind_v.core.train.distributed import ALONE, World
from minimind_v.core.train.freeze import freeze
from minimind_v.core.train.gradients import Gradients
from minimind_v.core.train.graph import StepGraphs

# Positions that a CPU computes together, or one row. Of 1,200 a step takes some 2 % longer; 2,400 save another 1 % and
# take a sixth more of the run's memory.
CPU_POSITIONS = 1600


@dataclass(frozen=True)
class StepResult:
    """The result of one step, over all processes."""

    loss: float  # nats per supervised token, with the auxiliary loss
    grad_norm: float  # before clipping
    correct: int  # supervised tokens that were predicted right
    batch_losses: list[float]  # the share of each micro-batch of this process in `loss`

    @property
    def finite(self) -> bool:
        """Whether the weights were changed: a loss or gradient that is not finite changes none."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


class PendingStep:
    """A step that is launched. A device may still be doing it."""

    def __init__(self, numbers: Tensor, world: World) -> None:
        """numbers [n + 3]: what each micro-batch of this process adds to the loss; then, of all, loss, right tokens
        and norm.
        """
        late = numbers.device.type == "cuda"  # to pinned memory
        self._numbers, self._world, self._ready = numbers.to("cpu", non_blocking=late), world, lambda: None
        if late:
            self._ready = torch.cuda.current_stream(numbers.device).record_event().synchronize

    @cached_property
    def result(self) -> StepResult:
        """The numbers of the step, over all processes. The first call waits for the device."""
        self._ready()
        *losses, loss, correct, grad_norm = self._numbers.tolist()
        return StepResult(loss if self._world.size > 1 else float(sum(losses)), grad_norm, int(correct), losses)


class AdamW(torch.optim.AdamW):
    """torch's AdamW, with its fused form where that was tried.

    torch keeps its compiler out of these methods by wrappers that import that compiler, for a second at the start of
    each run. Nothing compiles them here.
    """

    add_param_group = unwrap(torch.optim.AdamW.add_param_group)
    state_dict = unwrap(torch.optim.AdamW.state_dict)
    load_state_dict = unwrap(torch.optim.AdamW.load_state_dict)
    zero_grad = unwrap(torch.optim.AdamW.zero_grad)
    step = torch.no_grad()(unwrap(torch.optim.AdamW.step))

    def __init__(self, weights: Iterable[Tensor], lr: float, device: torch.device, weight_decay: float = 0.01) -> None:
        super().__init__(weights, lr, weight_decay=weight_decay, fused=has_fused_adamw(device))


class TrainStep:
    """A model with its optimiser; a call is one step."""

    def __init__(
        self,
        config: RunConfig,
        model: VLM,
        features: FeatureCache,
        world: World = ALONE,
        warn: Callable[[str], None] = print,
    ) -> None:
        """The model is on its device; this applies `config.freeze`. `warn` gets what slows its steps down."""
        self.config, self.model, self.features, self.world = config, model, features, world
        self.trainable = freeze(model, config.freeze)
        self.divisible = not model.config.balances_batches
        # A GPU's recordings decide whether a step counts, so that its numbers can be read when it has the next one.
        self.late = model.device.type == "cuda"
        self.optimiser = AdamW(self.trainable, config.lr, model.device, config.weight_decay)
        world.share_weights(model)
        self.graphs = StepGraphs(config, model, self.optimiser, record_cuda, warn, world) if self.late else None
        several = world.size > 1 and not self.graphs
        self._gradients = Gradients(self.trainable, world, config.reduce_dtype) if several else None

    def __call__(self, batches: list[Batch], supervised: int, rows: int, lr: float, images: int = 1) -> PendingStep:
        """One step over this process's micro-batches: the loss is a mean over `supervised` tokens in `rows` rows.

        Both, and `images`, are counted over all processes. Without a supervised token nothing changes, and neither does
        it where the loss or the gradient is not finite.
        """
        if not supervised:
            return PendingStep(torch.zeros(3), self.world)
        if self.graphs:
            device, features = self.model.device, self.features
            pieces = (piece for batch in batches for piece in encoded_pieces(batch, features, device, False))
            numbers = self.graphs(pieces, supervised, rows, lr, images)
            increment_version(self.trainable)
            return PendingStep(numbers, self.world)
        for group in self.optimiser.param_groups:
            group["lr"] = lr
        losses, correct = self.backward(batches, supervised, rows)
        loss = sum(losses, torch.zeros_like(correct))
        if self._gradients:
            self._gradients.exchange(loss, correct, self._gradients.collect(), images)
            loss, correct = self._gradients.loss, self._gradients.correct
        grad_norm = nn.utils.clip_grad_norm_(self.trainable, self.config.grad_clip)
        step = PendingStep(torch.stack([*losses, loss, correct, grad_norm]), self.world)
        if step.result.finite:
            self.optimiser.step()
            # A fused step keeps the version, and caches of the weights would stay.
            increment_version(self.trainable)
        self.optimiser.zero_grad(set_to_none=True)
        return step

    def backward(self, batches: list[Batch], supervised: int, rows: int) -> tuple[list[Tensor], Tensor]:
        """Gradients of this process's micro-batches; returns what each adds to the loss, and the right tokens."""
        device, losses = self.model.device, list[Tensor]()
        correct = torch.zeros((), device=device)
        for batch in batches:
            losses.append(torch.zeros((), device=device))
            for piece in encoded_pieces(batch, self.features, device, self.divisible):
                with autocast(device, self.config.dtype):
                    out = self.model(**piece.tokens, image_features=piece.image_features)
                loss = out.loss_sum / supervised + out.aux_loss * (len(piece) / rows)
                loss.backward()
                losses[-1] += loss.detach()
                correct += out.correct.sum()
        return losses, correct


def encoded_pieces(batch: Batch, features: FeatureCache, device: torch.device, divisible: bool) -> list[Batch]:
    """A micro-batch on its device with its images encoded, cut into pieces that the device computes at once.

    It stays whole if it is not divisible: a balance of experts over all its tokens is no sum over its rows.
    """
    moved = batch.to(device)
    encoded = replace(moved, pixel_values=None, image_features=features.features(moved), image_order=None)
    return encoded.split(CPU_POSITIONS) if divisible and device.type == "cpu" else [encoded]
