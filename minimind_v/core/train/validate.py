"""The loss on held-out rows, computed as in training; and the same with images of other rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from minimind_v.core.data.batch import Batch
from minimind_v.core.data.images import blank_pixels
from minimind_v.core.data.loader import BatchPlan, load_batches
from minimind_v.core.device import autocast
from minimind_v.core.evaluate.forward import batch_losses
from minimind_v.core.model.vlm import VLM
from minimind_v.core.monitor.metrics import Validation

Gather = Callable[[list[float]], list[list[float]]]
Encode = Callable[[Batch], Tensor | None]  # the features of a batch's images [M, P, width], as in training


class Validator:
    """Measures the same rows at each call. It draws no random number, so training stays the same."""

    def __init__(
        self, plan: BatchPlan, dtype: str, gather: Gather = lambda numbers: [numbers], swapped: bool = True
    ) -> None:
        """`plan` has the held-out rows of this process; `gather` collects the sums of all processes.

        Without `swapped` the rows are not measured with images of other rows.
        """
        self.plan, self.dtype, self.gather, self.swapped = plan, dtype, gather, swapped
        self._batches: list[Batch] | None = None  # a few hundred rows: they stay

    def __call__(self, model: VLM, encode: Encode, step: int, best: Validation | None) -> Validation | None:
        """Loss and token accuracy after `step` steps; None where no held-out row can be used."""
        if self._batches is None:
            self._batches = [batch for batch in load_batches(self.plan, workers=0) if batch.supervised]
        model.eval()
        sums = [0.0] * 6
        for number, batch in enumerate(self._batches):
            moved = self._encoded(model, batch, encode)
            if model.device.type != "cpu":  # a tenth of a gigabyte; a run on the CPU may keep them on disk
                self._batches[number] = moved
            sums = [total + value for total, value in zip(sums, self._measure(model, moved), strict=True)]
        model.train()
        loss, swapped, correct, supervised, rows, images = map(sum, zip(*self.gather(sums), strict=True))
        if not supervised:
            return None
        mean, swapped_mean = loss / supervised, swapped / supervised if images else None
        better = best is None or mean < best.loss
        return Validation(step, mean, correct / supervised, swapped_mean, int(rows), better)

    @torch.no_grad()
    def _encoded(self, model: VLM, batch: Batch, encode: Encode) -> Batch:
        """The batch on the model's device with features in place of pixels."""
        moved = batch.to(model.device)
        with autocast(model.device, self.dtype):
            features = encode(moved)
        return replace(moved, pixel_values=None, image_features=features, image_order=None, keys=[])

    @torch.no_grad()
    def _measure(self, model: VLM, batch: Batch) -> tuple[float, ...]:
        """Sums over a batch: loss, loss with images of other rows, correct and all supervised tokens, rows, images."""
        features = batch.image_features
        own = batch_losses(model, batch, features, self.dtype)
        swapped, images = own.loss_sum, 0
        if features is not None and self.swapped:
            with autocast(model.device, self.dtype):
                others = _others(model, features)
            swapped = batch_losses(model, batch, others, self.dtype).loss_sum
            images = len(features)
        correct = own.correct.sum()
        return float(own.loss_sum), float(swapped), float(correct), batch.supervised, len(batch), images


def _others(model: VLM, features: Tensor) -> Tensor:
    """Features of other images, in place of [M, P, width]: those half a batch away; a single image becomes grey.

    Grey does not suffice: a model that knows only the style of images has a higher loss with grey as well.
    """
    if len(features) > 1:
        return features.roll(len(features) // 2, 0)
    if model.vision_encoder is None:
        return torch.zeros_like(features)
    pixels = torch.from_numpy(blank_pixels(model.spec.image_size)).to(model.device)  # [3, S, S]
    return model.vision_encoder(pixels[None]).to(features.dtype)
