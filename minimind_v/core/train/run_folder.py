"""The run folder: its files, its lock, and the state from which a run resumes."""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from minimind_v.core.config.generation import V2025, V2026, generation_of
from minimind_v.core.config.presets import PRESETS, weights_name
from minimind_v.core.config.schema import RunConfig
from minimind_v.core.errors import RunError, UsageError
from minimind_v.core.files import Held, Lock, describe_holder, sweep
from minimind_v.core.formats.checkpoint import generation_at
from minimind_v.core.formats.companions import trouble_of_run
from minimind_v.core.hub.receipt import Receipt
from minimind_v.core.hub.sources import describe_repo, weights_at
from minimind_v.core.monitor.fingerprint import check_origin, origin_of
from minimind_v.core.monitor.metrics import Listener, read_lines
from minimind_v.core.outputs import keep_description
from minimind_v.core.train.launch import LAUNCHER
from minimind_v.core.train.resume import State, States

RECORDS = {"config.yaml", "manifest.json", "metrics.jsonl", "events.jsonl", "held_out.json", "forecast.json", "states"}


@dataclass(frozen=True)
class Claim:
    """The origin of a run, and the state from which it resumes; None for a new run."""

    origin: dict[str, Any]
    state: State | None = None


class RunFolder:
    """The files of a run."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.weights = config.out / weights_name(config.stage, config.model)
        self.best_weights = self.weights.with_name(f"{self.weights.stem}_best.pth")
        self.folder = self.weights.with_suffix("")  # all files of a run besides weights
        self.metrics = self.folder / "metrics.jsonl"
        self.evaluations = self.folder / "eval"  # the predictions of each evaluation
        self.states = States(self.folder / "states", config.keep)
        self.rows = config.data.batch_size * config.accumulate  # of a step, per process

    def lock(self, held: ExitStack, listener: Listener) -> None:
        """Lock the folder until `held` is closed. Raises UsageError if another run holds the lock.

        This is the first file that a run writes: RunError where none can be written there.
        """
        note = {
            "process": int(os.environ.get(LAUNCHER, os.getpid())),  # of several, the process to stop
            "host": platform.node(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        try:
            lock = Lock(self.weights.with_name(f".{self.weights.stem}.lock"), note)
        except Held as other:
            raise UsageError(
                f"another run is writing {self.weights} ({describe_holder(other.note)}) — wait until it ends, "
                "stop it, or name another --out"
            ) from None
        except OSError as error:
            reason = error.strerror or error
            raise RunError(f"{self.config.out}: cannot be written ({reason}) — name another --out") from None
        held.callback(lock.release)
        if not lock.certain:
            listener.message(
                f"{self.config.out} is on a file system without locks: make sure that no other run writes there"
            )
        if lock.left.get("host", note["host"]) != note["host"]:
            listener.message(
                f"{self.weights}: an earlier run did not finish ({describe_holder(lock.left)}); if locks do "
                "not work across machines, make sure that it has stopped"
            )

    def claim(
        self,
        processes: int,
        device: torch.device,
        overwrite: bool,
        resume: bool,
        allowed: Collection[str],
        listener: Listener,
        auto: bool = False,
    ) -> Claim:
        """Check that a run of so many processes may write here, and with `resume` read the state to resume from.

        `auto` says that the batch size will be that of the state. Raises UsageError if it may not, or if the folder has
        another run.
        """
        self._refuse_to_replace(overwrite, resume)
        self._sweep()
        origin = origin_of(self.config, device)
        origin["rows_per_update"] = self.rows * processes
        if self.config.model.balances_batches:  # the division of a step decides numbers, too
            origin |= {"data.batch_size": self.config.data.batch_size, "processes": processes}
        if not resume:
            self.states.supersede(at_once=processes > 1)
            return Claim(origin)
        state = self.states.newest(listener.warning)
        if state is None:
            self._refuse_other_run()
            listener.message(f"nothing to resume in {self.folder}: starting")
            return Claim(origin)
        if self.same_rows(state):  # more or fewer processes share the same steps
            origin["rows_per_update"] = state.origin["rows_per_update"]
            if auto and "data.batch_size" in origin:
                origin["data.batch_size"] = state.progress["split"][0]
        division = dict(zip(("data.batch_size", "accumulate"), state.progress.get("split", ()), strict=False))
        check_origin(state.origin | division, origin, allowed, listener.warning)
        before = state.origin.get("rows_per_update", origin["rows_per_update"])
        state.progress["step"] = state.progress["step"] * before // origin["rows_per_update"]
        return Claim(origin, state)

    def _sweep(self) -> None:
        """Remove the temporary files of a killed run; those of states, whose names differ, by their own names."""
        for weights in (self.weights, self.best_weights):
            sweep(weights)
            sweep(weights.with_suffix(".json"))
        for folder in (self.folder, self.states.folder):
            for path in folder.glob(".*.tmp"):
                sweep(path.with_name(path.name[1:].rsplit(".", 2)[0]))

    def same_rows(self, state: State) -> bool:
        """Whether each process has as many rows of a step as in the state, in any batches."""
        return math.prod(state.progress.get("split", ())) == self.rows

    def _refuse_to_replace(self, overwrite: bool, resume: bool) -> None:
        if overwrite and resume:
            raise UsageError("--overwrite starts a new run, --resume continues one — give only one of them")
        self._keep_others()
        if overwrite:
            return
        existing = [path for path in (self.weights, *self.states.paths()) if path.exists()]
        if owner := self._other_owner(resume):
            raise UsageError(f"{owner} — name another --out to keep it, or add --overwrite to replace it")
        if resume and self.weights.exists() and not self.states.paths():
            raise UsageError(
                f"{self.weights} exists, but {self.states.folder} has no state to resume from — "
                "add --overwrite to replace it, or name another --out"
            )
        if existing and not resume:
            raise UsageError(
                f"{existing[0]} exists from an earlier run — add --resume to continue it, --overwrite to replace it, "
                "or name another --out"
            )
        if not resume and any(read_lines(self.metrics)):
            raise UsageError(
                f"{self.metrics} exists from an earlier run without weights — add --overwrite to replace it, "
                "or name another --out"
            )

    def _other_owner(self, resume: bool) -> str | None:
        """What has the name of this run and is not an earlier run of its generation: the names of both are the same."""
        ours = generation_of(self.config.model)
        if trouble_of_run(self.folder, {"qk_norm": self.config.model.qk_norm}):
            return (
                f"{self.folder} is a run of {V2025.name if ours is V2026 else V2026.name}, this is one of {ours.name}"
            )
        if not self.weights.exists() or (resume and self.states.paths()):
            return None
        kept = Receipt.read(self.config.out).files.get(self.weights.name)
        if kept and kept.looks_the_same(self.weights):
            return f"{self.weights} was downloaded from {describe_repo(kept.repo)}"
        theirs = generation_at(self.weights)
        if theirs is None or theirs is ours:
            return None
        return f"{self.weights} has weights of {theirs.name}, this run trains {ours.name}"

    def _keep_others(self) -> None:
        """Raises UsageError where the run would write over what it starts from, or over what no run has left."""
        init = self.config.init
        for weights in (self.weights, self.best_weights):
            if init and init.exists() and weights.exists() and weights.samefile(weights_at(init)):
                raise UsageError(f"this run would overwrite --init {init} — name another --out")
            keep_description(weights)
        if self.folder.exists() and not self.folder.is_dir():
            raise UsageError(f"{self.folder} must be the folder of this run, but is a file — name another --out")
        inside = sorted(path.name for path in self.folder.glob("[!.]*")) if self.folder.is_dir() else []
        if inside and not RECORDS & set(inside):
            raise UsageError(
                f"{self.folder} is needed for the records of this run but is not a run folder (it contains "
                f"{inside[0]}) — "
                "move it, or name another --out"
            )

    def _refuse_other_run(self) -> None:
        """Raises UsageError where there is nothing to resume, and beside it a run of the same stage of another size."""
        others = self.config.out.glob(f"{self.config.stage}_vlm_*/states/step-*.safetensors")
        other = next((path.parents[1].name for path in others), None)
        if other is None:
            return
        presets = [name for name, model in PRESETS.items() if weights_name(self.config.stage, model) == f"{other}.pth"]
        which = f", of --preset {' or '.join(presets)}" if presets else ""
        raise UsageError(
            f"nothing to resume in {self.folder}, but {self.config.out / other} contains a run{which} — give "
            f"its size to resume "
            "it, or leave out --resume to start this one"
        )
