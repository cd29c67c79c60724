"""Save during training: a snapshot is taken at once, and a thread writes it to the disk."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor

from minimind_v.core.config.schema import RunConfig
from minimind_v.core.errors import RunError
from minimind_v.core.formats.checkpoint import export_tensors, write_checkpoint
from minimind_v.core.formats.companions import Companions
from minimind_v.core.monitor.metrics import Listener
from minimind_v.core.train.records import errors_as_warnings
from minimind_v.core.train.resume import named_trainable, pack
from minimind_v.core.train.run_folder import RunFolder
from minimind_v.core.train.step import TrainStep

MINUTE = 60.0  # seconds


class Snapshot:
    """Copies of tensors that the next step does not change; those of a GPU lie in pinned memory, which is kept."""

    def __init__(self) -> None:
        self._pinned: dict[str, Tensor] = {}

    def take(self, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Callable[[], object]]:
        """The copies, and a function that waits until a GPU has made them.

        They overwrite the copies that the call before made of a GPU's tensors.
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


class Saver:
    """Saves the states and weights of a run, one at a time, each written by a thread.

    Only the leading process saves, and every process has the same weights.
    """

    def __init__(
        self,
        config: RunConfig,
        folder: RunFolder,
        origin: dict[str, Any],
        train_step: TrainStep,
        companions: Companions,
        listener: Listener,
    ) -> None:
        self.config, self.folder, self.origin = config, folder, origin
        self.train_step, self.companions, self.listener = train_step, companions, listener
        self._snapshot = Snapshot()
        self._owed = False  # whether a save failed
        self._weights_step: int | None = None  # of the weights that this process has written
        self._saved_at = time.monotonic()  # or when the run began
        self._running: tuple[int, Future[None]] | None = None  # step and end of a save

    def is_due(self, step: int, logged: bool) -> bool:
        """Whether to save: after save_every steps and save_minutes; where that failed, at every logged step."""
        every, minutes = self.config.save_every, self.config.save_minutes
        late = bool(minutes) and time.monotonic() - self._saved_at >= minutes * MINUTE and not self.busy
        return late or (bool(every) and step % every == 0) or (self._owed and logged)

    def save(self, step: int, progress: dict[str, Any]) -> None:
        """Start a save, after the one before has ended."""
        self.report(wait=True)
        self._owed, self._saved_at = False, time.monotonic()
        self.start(step, self._writer(progress))

    def save_now(self, progress: dict[str, Any], finished: bool) -> None:
        """Save at the end of a run. Raises RunError with what is saved, and the next step to take.

        A finished run that has room for its weights alone lacks nothing but a state, which only a resume needs.
        """
        step = progress["step"]
        try:
            self._writer(progress)()
        except RunError as error:
            if not finished or self._weights_step != step:
                raise RunError(f"{error} — {self.next_step('free some disk space, and ')}") from None
            self.listener.lost(f"{error}; the run is finished and its weights are saved: only --resume needs it")
        else:
            self.listener.saved(step)

    def write_weights(self) -> None:
        """Write the weights of a state: the run may have ended before it wrote them. Raises RunError."""
        model = self.train_step.model
        tensors = export_tensors(model)
        write_checkpoint(self.folder.weights, tensors, model.model_config, self.config.stage, self.companions)

    def save_best(self, step: int) -> bool:
        """Keep the weights of this step as the best so far; returns whether that succeeded."""
        with errors_as_warnings(self.listener, step):
            model = self.train_step.model
            tensors = export_tensors(model)
            write_checkpoint(self.folder.best_weights, tensors, model.model_config, self.config.stage, self.companions)
            return True
        return False

    def report(self, wait: bool = False) -> None:
        """Report the end of the save in the background; without `wait`, only if it has ended.

        A full disk must not end the run; other errors of the save are raised.
        """
        if self._running is None or (self.busy and not wait):
            return
        step, ending = self._running
        error = ending.exception()
        self._running = None
        if error is None:
            self.listener.saved(step)
        elif isinstance(error, RunError):
            self._owed = True  # it is tried again
            self.listener.lost(f"step {step}: {error}")
        else:
            raise error

    def _writer(self, progress: dict[str, Any]) -> Callable[[], None]:
        """A function that writes the present state and weights."""
        model, optimiser, stage = self.train_step.model, self.train_step.optimiser, self.config.stage
        tensors, ready = self._snapshot.take(pack(named_trainable(model), optimiser))
        weights: dict[str, Tensor] | RunError
        try:
            weights = export_tensors(model)
        except RunError as error:  # the state may be written all the same
            weights = error

        def write() -> None:
            ready()
            try:
                self.folder.states.write(progress["step"], tensors, progress, self.origin)
            finally:  # the weights alone may fit on the disk
                if isinstance(weights, RunError):
                    raise weights
                write_checkpoint(self.folder.weights, weights, model.model_config, stage, self.companions)
                self._weights_step = progress["step"]

        return write

    def next_step(self, before: str = "") -> str:
        """What is saved of the run, and the next step, `before` it another one, where its end could not be."""
        step, weights = self.folder.states.newest_step(), self.folder.weights
        if step is not None:
            return f"{before}resume from step {step} with --resume"
        if self._weights_step is None:
            return f"nothing is saved: {before}start again with --overwrite"
        return (
            f"{weights} has the weights of step {self._weights_step}, but no state to resume from is saved: {before}"
            f"start from them with --init {weights} and another --out"
        )

    # --- the thread ---------------------------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        return self._running is not None and not self._running[1].done()

    def start(self, step: int, write: Callable[[], None]) -> None:
        """Start to write step `step`. The end of the save before must have been reported."""
        assert self._running is None
        ending: Future[None] = Future()

        def work() -> None:
            try:
                write()
                ending.set_result(None)
            except BaseException as error:  # raised by the thread that trains
                ending.set_exception(error)

        self._running = step, ending
        # A daemon: a third signal ends the run at once, even while a slow disk writes.
        threading.Thread(target=work, name="save", daemon=True).start()
