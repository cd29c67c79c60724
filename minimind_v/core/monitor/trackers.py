"""Trackers (TensorBoard, Weights & Biases, Trackio) behind one small interface. Each is an extra of this package.

They show the values of `metrics.jsonl`; a run never depends on one.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from minimind_v.core.errors import MissingInput
from minimind_v.core.files import write_text

PROJECT = "minimind-v"


class Tracker(Protocol):
    """Shows curves somewhere."""

    where: str  # the command or address that opens it

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Figures of a step."""

    def close(self) -> None:
        """End the curves."""


def open_tracker(kind: str, folder: Path, name: str, config: dict[str, Any], done: int) -> Tracker:
    """A tracker of a run whose folder is `folder`, which is resumed after `done` steps.

    `kind` is one of config.schema.TRACKERS but none. Raises MissingInput where its package is not installed.
    """
    try:
        return KINDS[kind](folder / kind, name, config, done)
    except ImportError as error:
        raise MissingInput(f"--track {kind}: {error} — pip install 'minimind-v[{kind}]'") from None


class TensorBoard:
    """Event files, written by torch's own writer."""

    def __init__(self, folder: Path, name: str, config: dict[str, Any], done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Steps after the resumed one, written before the interruption, are hidden.
        self._writer = SummaryWriter(str(folder), purge_step=done + 1 if done else None)
        if not done:
            self._writer.add_text("config", f"```\n{json.dumps(config, indent=1)}\n```")
        self.where = f"tensorboard --logdir {folder}"

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """Weights & Biases. Without an account on this machine it works offline, in the run folder."""

    def __init__(self, folder: Path, name: str, config: dict[str, Any], done: int) -> None:
        wandb = importlib.import_module("wandb")
        folder.mkdir(parents=True, exist_ok=True)
        name_file = folder / "run.txt"  # the run's id at the service, for a resume
        same = name_file.read_text(encoding="utf-8").strip() if done and name_file.is_file() else None
        mode = os.environ.get("WANDB_MODE") or ("online" if wandb.api.api_key else "offline")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT), name=name, config=config, dir=str(folder.parent),
            mode=mode, id=same, resume="allow" if same else None,
        )  # fmt: skip
        write_text(name_file, f"{self._run.id}\n")
        self.where = f"wandb sync {folder}/offline-*" if mode == "offline" else str(self._run.url)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """Hugging Face's local dashboard."""

    def __init__(self, folder: Path, name: str, config: dict[str, Any], done: int) -> None:
        self._trackio = importlib.import_module("trackio")
        self._trackio.init(project=PROJECT, name=name, config=config, resume="allow" if done else "never")
        self.where = f"trackio show --project {PROJECT}"

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._trackio.log(dict(values), step=step)

    def close(self) -> None:
        self._trackio.finish()


KINDS: dict[str, Callable[[Path, str, dict[str, Any], int], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "trackio": Trackio,
}
