"""Saving beside the training: a snapshot is taken at once, and a thread brings it to the disk."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


class Snapshot:
    """Copies of tensors that the next update does not change; those of a GPU lie in pinned memory, which is kept."""

    def __init__(self) -> None:
        self._pinned: dict[str, Tensor] = {}

    def take(self, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Callable[[], object]]:
        """The copies, and what to call before they are read: a GPU may not have got to them yet.

        The copies of the one before are overwritten where they came from a GPU.
        """
        copies, ready = {}, lambda: None
        for name, tensor in tensors.items():
            if tensor.device.type != "cuda":
                copies[name] = tensor.detach().to("cpu", copy=True).contiguous()
                continue
            if name not in self._pinned:
                self._pinned[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            copies[name] = self._pinned[name].copy_(tensor.detach(), non_blocking=True)
            ready = torch.cuda.current_stream(tensor.device).record_event().synchronize
        return copies, ready


@dataclass(frozen=True)
class Outcome:
    """How a save ended."""

    step: int
    error: BaseException | None


class Saver:
    """One thread at a time that writes. What it raises is kept for the one who asks."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._outcome: Outcome | None = None

    @property
    def busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def start(self, step: int, write: Callable[[], object]) -> None:
        """Begin to write what was learnt until `step`. The outcome of the save before must have been taken."""
        assert self._thread is None

        def work() -> None:
            try:
                write()
                self._outcome = Outcome(step, None)
            except BaseException as error:  # raised where it is asked for
                self._outcome = Outcome(step, error)

        # The interpreter does not wait for it: whoever stops a run for the third time is not kept by a slow disk.
        self._thread = threading.Thread(target=work, name="save", daemon=True)
        self._thread.start()

    def outcome(self, wait: bool = False) -> Outcome | None:
        """How the save that was started has ended; None where there is none or, without `wait`, where it still runs."""
        if self._thread is None or (self.busy and not wait):
            return None
        self._thread.join()
        self._thread = None
        return self._outcome
