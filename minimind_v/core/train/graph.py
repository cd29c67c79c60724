"""A GPU's steps as CUDA graphs: each shape of micro-batch is recorded once, then replayed.

A micro-batch is padded to one of a few shapes and copied into tensors that stay. Gradients add up in tensors that stay
too, and a second recording clips them and does AdamW.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from minimind_v.core.config.schema import RunConfig
from minimind_v.core.cuda_graph import CudaGraphs, Record
from minimind_v.core.data.batch import Batch
from minimind_v.core.device import autocast
from minimind_v.core.model.loss import IGNORE
from minimind_v.core.model.vlm import VLM
from minimind_v.core.train.distributed import ALONE, World
from minimind_v.core.train.gradients import Gradients

CLOSE = 0.05  # of the change of a tensor: a replay that differs more is wrong; attention's sums differ by far less


def padded_length(length: int) -> int:
    """Columns of a micro-batch as wide as `length`: a multiple of 32, above 512 of 64."""
    step = 32 if length <= 512 else 64
    return -(-length // step) * step


def padded_count(count: int) -> int:
    """Supervised positions of a micro-batch with `count`: 16, then each a quarter more, in multiples of 16."""
    size = 16
    while size < count:
        size = -(-size * 5 // 64) * 16
    return size


def padded_images(count: int) -> int:
    """Images of a micro-batch with `count`: a power of two."""
    return 1 << (count - 1).bit_length()


def peak_with_recordings(device: torch.device, trainable: int) -> int:
    """Bytes of a GPU that training takes at most with recordings, if all steps so far were launched kernel by kernel.

    Recordings hold what the passes take once more. Clipping and AdamW of `trainable` bytes of weights are compared on
    copies of weights, gradients and two moments, from before and behind them.
    """
    peak, resting = torch.cuda.max_memory_allocated(device), torch.cuda.memory_allocated(device)
    return peak + max(peak - resting, 2 * 4 * trainable)


class StepGraphs:
    """The forward and backward passes and the AdamW of a model that this process trains on a GPU.

    Several processes add up their gradients between the two, outside of the graphs.
    """

    def __init__(
        self,
        config: RunConfig,
        model: VLM,
        optimiser: torch.optim.Optimizer,
        record: Record,
        warn: Callable[[str], None],
        world: World = ALONE,
    ) -> None:
        """The optimiser must be fused. `warn` gets one line if steps are launched kernel by kernel after all."""
        self.config, self.model, self.optimiser, self.device = config, model, optimiser, model.device
        self.world = world
        self.trainable: list[Tensor] = [weight for group in optimiser.param_groups for weight in group["params"]]
        self.graphs = CudaGraphs(self.device, "steps are launched", warn, CLOSE, record)
        self._inputs: dict[tuple[object, ...], Tensor] = {}
        # Of a step: its supervised tokens, and a micro-batch's share of its rows.
        self._supervised, self._share = (torch.zeros((), device=self.device) for _ in range(2))
        # Of a micro-batch: what it adds to the loss, and its tokens that are predicted right; of a step, its norm.
        self._share_of_loss, self._norm = (torch.zeros((), device=self.device) for _ in range(2))
        self._correct = torch.zeros((), device=self.device, dtype=torch.int64)
        self._skipped = torch.zeros((), device=self.device)  # 1: loss or gradient is not finite
        for group in optimiser.param_groups:  # numbers that a recording reads anew
            group["lr"] = torch.tensor(group["lr"], device=self.device)
            group["capturable"] = self.device.type == "cuda"
        optimiser.found_inf = self._skipped  # type: ignore[attr-defined]
        optimiser._warned_capturable_if_run_uncaptured = True  # torch asks whether we mean it

    @cached_property
    def _gradients(self) -> Gradients:
        return Gradients(self.trainable, self.world, self.config.reduce_dtype, [*self.model.vision_proj.parameters()])

    def __call__(
        self, micro_batches: Iterable[Batch], supervised: int, rows: int, lr: float, images: int = 1
    ) -> Tensor:
        """One step over micro-batches on the device, their images encoded → the numbers of a PendingStep."""
        for group in self.optimiser.param_groups:
            group["lr"].fill_(lr)
        self._supervised.fill_(supervised)
        losses, reached = list[Tensor](), set[int]()
        loss, correct = torch.zeros_like(self._share_of_loss), torch.zeros_like(self._correct)
        for batch in micro_batches:
            self._share.fill_(len(batch) / rows)
            reached.update(self._pass(batch)())
            losses.append(self._share_of_loss.clone())
            loss += self._share_of_loss
            correct += self._correct
        of_all = self._gradients.exchange(loss, correct, tuple(sorted(reached)), images)
        self._adamw(of_all)()
        self.optimiser.zero_grad(set_to_none=True)
        return torch.stack([*losses, self._gradients.loss, self._gradients.correct, self._norm])

    # --- a micro-batch ------------------------------------------------------------------------------------------------

    def _pass(self, batch: Batch) -> Callable[[], list[int]]:
        """The passes of a micro-batch, with their inputs in place → the numbers of the weights with a gradient."""
        assert batch.supervised_positions is not None
        assert batch.targets is not None
        assert batch.image_positions is not None
        (rows, length), count, images = batch.input_ids.shape, len(batch.targets), batch.images
        most, padded = padded_count(count), padded_images(images) if images else 0
        # Images that fill up go to the last position: there, padding that nothing attends to, which has no gradient.
        wide = padded_length(length + (padded > images))

        def moved(positions: Tensor) -> Tensor:
            """Positions in the flattened batch, once its rows are wider."""
            return positions + positions.div(length, rounding_mode="floor") * (wide - length)

        inputs = {
            "input_ids": self._input("input_ids", batch.input_ids, (rows, wide)),
            "attention_mask": self._input("attention_mask", batch.attention_mask, (rows, wide)),
            "supervised_positions": self._input("supervised", moved(batch.supervised_positions), (most,)),
            "targets": self._input("targets", batch.targets, (most,), IGNORE),
        }
        if batch.image_features is not None:
            features, positions = batch.image_features, moved(batch.image_positions)
            inputs["image_features"] = self._input("features", features, (padded, *features.shape[1:]))
            size = (len(positions) // images * padded,)
            inputs["image_positions"] = self._input("image_positions", positions, size, rows * wide - 1)
        key = tuple((tuple(tensor.shape), tensor.dtype) for tensor in inputs.values())
        work, results = partial(self._forward_backward, inputs), [self._share_of_loss, self._correct]
        return partial(self.graphs.run, key, work, results, lambda: [self._gradients.views])

    def _input(self, name: str, values: Tensor, shape: tuple[int, ...], fill: int = 0) -> Tensor:
        """The tensor for an input of this shape, which all recordings share; behind the values it is filled up."""
        key = name, tuple(shape), values.dtype
        if key not in self._inputs:
            self._inputs[key] = torch.empty(shape, dtype=values.dtype, device=self.device)
        tensor = self._inputs[key]
        if tensor.shape != values.shape:
            tensor.fill_(fill)
        tensor[tuple(slice(size) for size in values.shape)].copy_(values)
        return tensor

    def _forward_backward(self, inputs: dict[str, Tensor]) -> list[int]:
        """Add to the gradients; returns the numbers of the weights that have one."""
        with autocast(self.device, self.config.dtype):
            out = self.model(**inputs)
        loss = out.loss_sum / self._supervised + out.aux_loss * self._share
        gradients = torch.autograd.grad(loss, self.trainable, allow_unused=True)
        reached = [number for number, gradient in enumerate(gradients) if gradient is not None]
        correct = out.correct.sum()
        torch._foreach_add_([self._gradients.views[n] for n in reached], [gradients[n] for n in reached])
        self._share_of_loss.copy_(loss.detach())
        self._correct.copy_(correct)
        return reached

    # --- AdamW --------------------------------------------------------------------------------------------------------

    def _adamw(self, reached: tuple[int, ...]) -> Callable[[], None]:
        """Clipping and AdamW of the weights that have a gradient: without an image the projector has none."""
        weights, moments = [self.trainable[number] for number in reached], self.optimiser.state

        def state() -> list[list[Tensor]]:
            changed = [[weight.detach(), weight.grad, *moments[weight].values()] for weight in weights]
            return list(map(list, zip(*changed, strict=True)))

        for weight in weights:
            if not moments[weight]:  # torch would allocate them in the middle of the work
                kinds = {"exp_avg": torch.zeros_like(weight), "exp_avg_sq": torch.zeros_like(weight)}
                moments[weight] = {"step": torch.zeros((), device=self.device)} | kinds
        return partial(self.graphs.run, reached, self._clip_and_step, [self._norm, self._skipped], state)

    def _clip_and_step(self) -> None:
        norm = nn.utils.get_total_norm([weight.grad for weight in self.trainable if weight.grad is not None])
        self._norm.copy_(norm)
        self._skipped.copy_(~torch.isfinite(norm + self._gradients.loss))
        nn.utils.clip_grads_with_norm_(self.trainable, self.config.grad_clip, norm)
        self.optimiser.step()
        self._gradients.values.zero_()
