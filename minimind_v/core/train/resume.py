"""Resume states of a run: all that it needs to resume bit for bit, in files with a checksum.

A state is one safetensors file, whose name ends in a digest of its bytes: a cut or changed file is not a state. It
holds the trainable weights in fp32, the optimiser's moments, the state of the random numbers and, as JSON, the progress
and the origin of the run. It lacks the frozen weights: the run reads them again, and the origin proves that they are
the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load
from torch import Tensor, nn

from minimind_v.core.errors import RunError
from minimind_v.core.files import write_atomically

NAMES = {torch.float32: "F32", torch.float64: "F64", torch.int64: "I64", torch.uint8: "U8"}  # in a safetensors file


@dataclass(frozen=True)
class State:
    """The state of a run after a step. Tensors are named `weight.NAME`, `exp_avg.NAME` and so on, and `rng.cpu`."""

    path: Path
    tensors: dict[str, Tensor]
    progress: dict[str, Any]
    origin: dict[str, Any]


class States:
    """The last states of a run, in a folder of their own."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep
        self._old: set[Path] = set()

    def supersede(self, at_once: bool = False) -> None:
        """Mark the existing states as an earlier run's: the first state of the new run replaces them.

        With `at_once` they are deleted now: processes that restart before that must not resume from them.
        """
        self._old = set(self.paths())
        for path in self._old if at_once else ():
            path.unlink(missing_ok=True)

    def paths(self) -> list[Path]:
        """The paths of all states, the newest first; they are not checked."""
        return sorted(self.folder.glob("step-*.safetensors"), reverse=True)

    def newest_step(self) -> int | None:
        """The step of this run's newest state; None where it has none."""
        return next((self.step_of(path) for path in self.paths() if path not in self._old), None)

    @staticmethod
    def step_of(path: Path) -> int:
        """The step of a state."""
        return int(path.name.split("-")[1])

    def write(self, step: int, tensors: Mapping[str, Tensor], progress: dict[str, Any], origin: dict[str, Any]) -> None:
        """Add a state, then delete the oldest. Raises RunError, and then deletes none."""
        meta = {"progress": json.dumps(progress), "origin": json.dumps(origin)}
        pieces = _pieces(tensors, meta)
        digest = hashlib.blake2b(digest_size=8)
        for piece in pieces:
            digest.update(piece)
        path = self.folder / f"step-{step:010d}-{digest.hexdigest()}.safetensors"
        write_atomically(path, lambda file: file.writelines(pieces))
        # Later ones are deleted too: this run resumed from a state before them.
        earlier = [other for other in self.paths() if other.name[:15] < path.name[:15] and other not in self._old]
        for other in set(self.paths()) - {path, *earlier[: self.keep - 1]}:
            other.unlink(missing_ok=True)

    def newest(self, warn: Callable[[str], None]) -> State | None:
        """The newest undamaged state; warns of damaged ones. Raises RunError if all are damaged."""
        paths = self.paths()
        for path in paths:
            try:
                return _read(path)
            except (OSError, ValueError, KeyError, SafetensorError) as error:
                warn(f"{path} is damaged ({error}): using the state before it")
        if paths:
            raise RunError(f"{self.folder}: it contains no undamaged state — start over with --overwrite")
        return None


def _pieces(tensors: Mapping[str, Tensor], meta: dict[str, str]) -> list[Any]:
    """The bytes of a safetensors file, without a copy of the tensors: the library would copy them twice."""
    header: dict[str, Any] = {"__metadata__": meta}
    pieces, at = [], 0
    for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].element_size()):  # each aligned to its size
        flat: Any = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        offsets = [at, at := at + len(flat)]
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        pieces.append(memoryview(flat))
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return [len(text).to_bytes(8, "little"), text, *pieces]


def _read(path: Path) -> State:
    data = path.read_bytes()
    if not path.stem.endswith(f"-{hashlib.blake2b(data, digest_size=8).hexdigest()}"):
        raise ValueError("its checksum is wrong")
    with safe_open(path, framework="pt") as file:
        meta = file.metadata()
    return State(path, load(data), json.loads(meta["progress"]), json.loads(meta["origin"]))


# --- the optimiser ----------------------------------------------------------------------------------------------------


def named_trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def pack(named: Mapping[str, Tensor], optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The trainable weights, their moments and the state of the random numbers, as one flat dict."""
    tensors = {f"weight.{name}": parameter for name, parameter in named.items()}
    for name, parameter in named.items():
        for key, value in optimiser.state.get(parameter, {}).items():
            tensors[f"{key}.{name}"] = value
    tensors["rng.cpu"] = torch.get_rng_state()
    if device := _cuda_of(named):
        tensors["rng.cuda"] = torch.cuda.get_rng_state(device)
    return tensors


def _cuda_of(named: Mapping[str, Tensor]) -> torch.device | None:
    """The GPU of the weights; None if they are on no GPU, even where the machine has one."""
    return next((tensor.device for tensor in named.values() if tensor.device.type == "cuda"), None)


@torch.no_grad()
def unpack(tensors: Mapping[str, Tensor], named: Mapping[str, Tensor], optimiser: torch.optim.Optimizer) -> None:
    """Restore the tensors of `pack`."""
    slots: dict[int, dict[str, Tensor]] = {}
    for number, (name, parameter) in enumerate(named.items()):
        parameter.copy_(tensors[f"weight.{name}"])
        keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}.{name}" in tensors]
        if keys:  # an expert without a token so far has none
            slots[number] = {key: tensors[f"{key}.{name}"] for key in keys}
    optimiser.load_state_dict({"state": slots, "param_groups": optimiser.state_dict()["param_groups"]})
    torch.set_rng_state(tensors["rng.cpu"])
    if "rng.cuda" in tensors and (device := _cuda_of(named)):
        torch.cuda.set_rng_state(tensors["rng.cuda"], device)
