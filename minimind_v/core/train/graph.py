"""A GPU's steps as CUDA graphs: each shape of micro-batch is recorded once, then replayed.

A step of so small a model is some thousand kernels, and a host needs longer to launch them than a GPU to run them. A
recording launches them all at once, always on the same tensors: a micro-batch is padded to one of a few shapes and
copied into them. Gradients add up in tensors that stay, and a second recording clips them and does AdamW.

No recording is trusted: at its first use the same work is also done kernel by kernel, and the results are compared.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from minimind_v.core.config.schema import RunConfig
from minimind_v.core.data.batch import Batch
from minimind_v.core.device import autocast
from minimind_v.core.generate.cuda_graph import Record, Work
from minimind_v.core.model.loss import IGNORE
from minimind_v.core.model.vlm import VLM
from minimind_v.core.train.distributed import ALONE, World
from minimind_v.core.train.gradients import Gradients

EAGER = 8  # times that a shape is computed kernel by kernel before it is recorded
MOST = 192  # recordings, of some MB each; further shapes stay as they are
WAITED = "called a synchronizing"  # in torch's warning of a wait; its notice about such warnings has other words
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
        self.recorder = Recorder(self.device, record, warn)
        self._inputs: dict[tuple[object, ...], Tensor] = {}
        self._pass_recordings: dict[tuple[object, ...], Recording] = {}  # by the shapes of their inputs
        self._adamw_recordings: dict[tuple[int, ...], Recording] = {}  # by the weights that have a gradient
        # Of a step: its supervised tokens, and a micro-batch's share of its rows.
        self._supervised, self._share = (torch.zeros((), device=self.device) for _ in range(2))
        # Of a micro-batch: what it adds to the loss, and its tokens that are predicted right; of a step, its norm.
        self._share_of_loss, self._correct, self._norm = (torch.zeros((), device=self.device) for _ in range(3))
        self._skipped = torch.zeros((), device=self.device)  # 1: loss or gradient is not finite
        for group in optimiser.param_groups:  # numbers that a recording reads anew
            group["lr"] = torch.tensor(group["lr"], device=self.device)
            group["capturable"] = self.device.type == "cuda"
        optimiser.found_inf = self._skipped  # type: ignore[attr-defined]

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

    def _pass(self, batch: Batch) -> Recording:
        """The passes of a micro-batch of this shape, with their inputs in place."""
        assert batch.supervised_positions is not None
        assert batch.targets is not None
        assert batch.image_positions is not None
        (rows, length), count = batch.input_ids.shape, len(batch.targets)
        wide, most = padded_length(length), padded_count(count)

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
            features = batch.image_features
            inputs["image_features"] = self._input("features", features, features.shape)
            positions = batch.image_positions
            inputs["image_positions"] = self._input("image_positions", moved(positions), positions.shape)
        key = tuple((tuple(tensor.shape), tensor.dtype) for tensor in inputs.values())
        if key not in self._pass_recordings:
            self._pass_recordings[key] = Recording(
                lambda: self._forward_backward(inputs), self._changed_by_pass, self.recorder
            )
        return self._pass_recordings[key]

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
        torch._foreach_add_([self._gradients.views[n] for n in reached], [gradients[n] for n in reached])
        self._share_of_loss.copy_(loss.detach())
        self._correct.copy_(out.correct.sum())
        return reached

    def _changed_by_pass(self) -> list[Tensor]:
        return [*self._gradients.views, self._share_of_loss, self._correct]

    # --- AdamW --------------------------------------------------------------------------------------------------------

    def _adamw(self, reached: tuple[int, ...]) -> Recording:
        """Clipping and AdamW of the weights that have a gradient: without an image the projector has none."""
        if reached not in self._adamw_recordings:
            weights = [self.trainable[number] for number in reached]

            def changed() -> list[Tensor]:
                moments = [tensor for weight in weights for tensor in self.optimiser.state[weight].values()]
                gradients = [self._gradients.views[number] for number in reached]
                return [*(weight.detach() for weight in weights), *moments, *gradients, self._norm, self._skipped]

            self._adamw_recordings[reached] = Recording(self._clip_and_step, changed, self.recorder)
        return self._adamw_recordings[reached]

    def _clip_and_step(self) -> list[int]:
        self._norm.copy_(nn.utils.clip_grad_norm_(self.trainable, self.config.grad_clip))
        self._skipped.copy_(~torch.isfinite(self._norm + self._gradients.loss))
        self.optimiser.step()
        self._gradients.values.zero_()
        return []


class Recorder:
    """Makes the recordings of a run, until one fails or is wrong: then the rest of it is done kernel by kernel."""

    def __init__(self, device: torch.device, record: Record, warn: Callable[[str], None]) -> None:
        self.device, self.warn, self.on = device, warn, True
        self._record = record
        self.recordings: list[Recording] = []
        self._pool: Any = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def __call__(self, recording: Recording) -> None:
        """Record its work, which is not done."""
        if not self.on or len(self.recordings) == MOST:
            return
        self.recordings.append(recording)
        recording.replay = self._record(recording.work, self.device, self._pool)
        if recording.replay is None:
            self.give_up("a step cannot be recorded as a CUDA graph")

    def give_up(self, reason: str) -> None:
        """Record and replay no more, and free the recordings' memory."""
        self.on = False
        for recording in self.recordings:
            recording.replay = None
        if self.device.type == "cuda":
            with suppress(RuntimeError):  # after a failed recording torch believes that it still records, and refuses
                torch.cuda.empty_cache()
        self.warn(f"{reason}: this run's steps are launched kernel by kernel, which takes longer")


class Recording:
    """Work on tensors that stay: done at first, then recorded, compared with its replay, then replayed."""

    def __init__(self, work: Callable[[], list[int]], changed: Callable[[], list[Tensor]], recorder: Recorder) -> None:
        """`changed` gives all that the work changes and later work reads."""
        self.work, self._changed, self._recorder = work, changed, recorder
        self.replay: Work | None = None
        self._calls, self._proven = 0, False
        self._result: list[int] = []

    def __call__(self) -> list[int]:
        """Do or replay the work; returns what the work returned when it was last done."""
        self._calls += 1
        if self.replay is None:
            self._do_and_record()
        elif self._proven:
            self.replay()
        else:
            self._prove()
        return self._result

    def _do(self) -> None:
        """Do the work; where its memory is taken by recordings, without them."""
        try:
            self._result = self.work()
            return
        except torch.OutOfMemoryError:
            if not self._recorder.on:
                raise
        self._recorder.give_up("there is no memory for CUDA graphs")  # outside: an error holds what failed in memory
        self._result = self.work()

    def _do_and_record(self) -> None:
        if self._calls != EAGER or not self._recorder.on:
            self._do()
            return
        with _waits(self._recorder.device) as caught:
            self._do()
        if any(WAITED in str(warning.message) for warning in caught):
            self._recorder.give_up("a step waits for the GPU, so it cannot be a CUDA graph")
        else:
            self._recorder(self)

    @torch.no_grad()
    def _prove(self) -> None:
        """Do the work, then replay it from the same state; its inputs are not those that it was recorded with."""
        before = self._copies()
        with torch.enable_grad():
            self._do()
        expected = self._copies() if before else None
        if self.replay is None:  # given up meanwhile
            return
        if before is None or expected is None:
            self._recorder.give_up("there is no memory to check a CUDA graph")
            return
        moves = torch.stack([_distance(new, old) for new, old in zip(expected, before, strict=True)])
        if not torch.isfinite(moves).all():  # a bad step proves nothing
            return
        self._restore(before)
        self.replay()
        gaps = torch.stack([_distance(new, old) for new, old in zip(self._changed(), expected, strict=True)])
        self._proven = bool((gaps <= CLOSE * (moves + 0.01 * torch.linalg.vector_norm(moves))).all())
        if not self._proven:
            self._restore(expected)
            self._recorder.give_up("a CUDA graph of a step differs from the step")

    def _copies(self) -> list[Tensor] | None:
        try:
            return [tensor.clone() for tensor in self._changed()]
        except torch.OutOfMemoryError:
            return None

    def _restore(self, copies: list[Tensor]) -> None:
        for tensor, copy in zip(self._changed(), copies, strict=True):
            tensor.copy_(copy)


def _distance(new: Tensor, old: Tensor) -> Tensor:
    return torch.linalg.vector_norm((new - old).float())


@contextmanager
def _waits(device: torch.device) -> Iterator[list[warnings.WarningMessage]]:
    """Gives a list of what torch warns of meanwhile: on a GPU, of everything that waits for it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if device.type != "cuda":
            yield caught
            return
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield caught
        finally:
            torch.cuda.set_sync_debug_mode(mode)
