"""Features on their way to the store: written at once, or by a thread, so that no step waits for the disk."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from minimind_v.core.data.feature_store import FeatureStore

WAITING = 4  # groups that wait for the disk; with more, the trainer waits for it


class FeatureWriter:
    """Writes to a store, in order. Features that a killed process has not written yet are encoded again."""

    def __init__(self, store: FeatureStore, warn: Callable[[str], None], threaded: bool) -> None:
        """`warn` is told once, in the caller's thread, why the store writes no more."""
        self.store, self.warn = store, warn
        self._thread = ThreadPoolExecutor(1, "features") if threaded else None
        self._waiting: deque[Future[None]] = deque()
        self._warned = False

    def write(self, keys: list[bytes], features: Tensor) -> None:
        """Store the features of images [K, P, width], which must not be changed afterwards."""
        if not self.store.trouble and self._thread is None:
            self.store.write(keys, features.cpu())
        elif not self.store.trouble and self._thread is not None:
            while len(self._waiting) >= WAITING:
                self._waiting.popleft().result()
            on_host, copied = features.to("cpu", non_blocking=True), None  # in pinned memory
            if features.device.type == "cuda":
                copied = torch.cuda.current_stream(features.device).record_event()
            self._waiting.append(self._thread.submit(self._write, keys, on_host, copied))
        self._report()

    def _write(self, keys: list[bytes], features: Tensor, copied: torch.cuda.Event | None) -> None:
        if copied is not None:
            copied.synchronize()
        self.store.write(keys, features)

    def flush(self) -> None:
        """Wait until all is written, or cannot be."""
        while self._waiting:
            self._waiting.popleft().result()
        self._report()

    def _report(self) -> None:
        if self.store.trouble and not self._warned:
            self._warned = True
            self.warn(f"no more features are cached: {self.store.trouble}")
