"""The gradients of a step in one tensor, which several processes add up in one exchange.

Behind the gradients stand the step's numbers: its loss, its tokens predicted right and, for each weight, how many
processes reached it. So a step needs no further exchange after its backward pass.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from minimind_v.core.train.distributed import World

ALIGNED = 64  # numbers; kernels read gradients that begin at multiples of 256 bytes in larger pieces


class Gradients:
    """Gradients of weights of one dtype, each a view of one tensor."""

    def __init__(
        self, weights: Sequence[Tensor], world: World, reduce_dtype: str, projector: Collection[Tensor] = ()
    ) -> None:
        """`projector` is for a GPU, which should not be asked at each step which weights were reached.

        Once a step with images has reached all weights, all such steps do. One without may leave out the projector's.
        """
        self.weights, self.world, self.reduce_dtype = weights, world, getattr(torch, reduce_dtype)
        sizes = [-(-weight.numel() // ALIGNED) * ALIGNED for weight in weights]
        self._all = torch.zeros(sum(sizes) + 2 + len(weights), dtype=weights[0].dtype, device=weights[0].device)
        self.values, self._numbers = self._all.split([sum(sizes), 2 + len(weights)])
        pieces = zip(weights, self.values.split(sizes), strict=True)
        self.views = [piece[: weight.numel()].view_as(weight) for weight, piece in pieces]
        self.loss, self.correct, self._counts = self._numbers[0], self._numbers[1], self._numbers[2:]
        own = {id(weight) for weight in projector}
        self._projector = {number for number, weight in enumerate(weights) if id(weight) in own}
        self._proven: dict[bool, tuple[int, ...]] = {}  # by whether the step has images: the weights that it reaches
        self._flags: dict[tuple[int, ...], Tensor] = {}

    def collect(self) -> tuple[int, ...]:
        """Move the gradients of this process's weights here; returns the numbers of the weights that have one."""
        reached = []
        for number, (weight, view) in enumerate(zip(self.weights, self.views, strict=True)):
            if weight.grad is None:
                view.zero_()
            else:
                view.copy_(weight.grad)
                reached.append(number)
            weight.grad = None  # its memory is needed for the next ones
        return tuple(reached)

    def exchange(self, loss: Tensor, correct: Tensor, reached: tuple[int, ...], images: int) -> tuple[int, ...]:
        """Add up the gradients, the loss and the right tokens of all processes, whose steps have so many images.

        Each weight that a process has reached has its gradient then; returns their numbers.
        """
        self.loss.copy_(loss)
        self.correct.copy_(correct)
        if self.world.size > 1:
            if reached not in self._flags:
                flags = [float(number in reached) for number in range(len(self.weights))]
                self._flags[reached] = torch.tensor(flags, device=self._all.device)
            self._counts.copy_(self._flags[reached])
            self._add_up()
            reached = self._reached_by_any(images > 0)
        of_any = set(reached)
        for number, (weight, view) in enumerate(zip(self.weights, self.views, strict=True)):
            weight.grad = view if number in of_any else None
        return reached

    def _add_up(self) -> None:
        if self.reduce_dtype == self.values.dtype:
            self.world.add_up(self._all)
            return
        values = self.values.to(self.reduce_dtype)
        self.world.add_up(values)
        self.values.copy_(values)
        self.world.add_up(self._numbers)

    def _reached_by_any(self, has_images: bool) -> tuple[int, ...]:
        if has_images in self._proven:
            return self._proven[has_images]
        reached = tuple(number for number, count in enumerate(self._counts.tolist()) if count)
        # Where other weights were left out, the next step may reach them.
        if self._projector and set(range(len(self.weights))) - set(reached) <= self._projector:
            self._proven[has_images] = reached
        return reached
