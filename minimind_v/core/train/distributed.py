"""Several processes that train one model: their ranks, what they exchange, and how they end together.

Started by `launch`, by torchrun or by Slurm, every process reads its rank from its environment. Numbers and objects
travel over the CPU; gradients go the way that torch's DistributedDataParallel chooses.
"""

from __future__ import annotations

import gc
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # imported after the processes have met, it would keep their group for ever
from torch import nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from minimind_v.core.errors import LostContact, UsageError
from minimind_v.core.formats.hf.read import VISION
from minimind_v.core.train.launch import way_to

# What torch's backends say when another process is gone.
_GONE = re.compile(r"closed by peer|reset by peer|gloo|nccl|broken pipe|socket|store|connection", re.IGNORECASE)


@dataclass(frozen=True)
class World:
    """The rank of this process among those of the run. Alone, everything here costs nothing."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # on this machine
    restarts: int = 0  # how often all of them were started before
    placed: bool = False  # by a launcher: so there is nothing to launch

    @classmethod
    def find(cls, environment: Mapping[str, str] = os.environ) -> World:
        """The rank that torchrun or Slurm gave to this process; alone where neither did."""
        try:
            if "RANK" in environment and "WORLD_SIZE" in environment:
                return cls(
                    int(environment["RANK"]),
                    int(environment["WORLD_SIZE"]),
                    int(environment.get("LOCAL_RANK", 0)),
                    int(environment.get("TORCHELASTIC_RESTART_COUNT", 0)),
                    True,
                )
            tasks = int(environment.get("SLURM_STEP_NUM_TASKS", environment.get("SLURM_NTASKS", 1)))
            if "SLURM_PROCID" in environment and tasks > 1:
                return cls(
                    int(environment["SLURM_PROCID"]),
                    tasks,
                    int(environment.get("SLURM_LOCALID", 0)),
                    int(environment.get("SLURM_RESTART_COUNT", 0)),
                    True,
                )
        except ValueError as error:
            raise UsageError(f"the rank of this process cannot be read from the environment: {error}") from None
        return cls()

    @property
    def leads(self) -> bool:
        """Whether this process is the one that writes and reports."""
        return self.rank == 0

    def join(self, device: torch.device) -> None:
        """Meet the other processes. Raises LostContact where they do not come."""
        if self.size == 1:
            return
        if "MASTER_ADDR" not in os.environ:
            os.environ |= slurm_address(os.environ)
        # Left alone, gloo asks what the machine's name stands for, which on many is the loopback that no other reaches.
        if way := way_to(os.environ["MASTER_ADDR"]):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", way.interface)
        with self.contact():
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            # A launcher's store outlives those that it starts again: addresses of the dead must not be found in it.
            store, _, _ = next(rendezvous("env://", self.rank, self.size))
            fresh = dist.PrefixStore(f"start{self.restarts}", store)
            dist.init_process_group(backend, store=fresh, rank=self.rank, world_size=self.size)

    def leave(self) -> None:
        """The run is over, and nothing of it is held any more.

        Only then do gloo's threads end here. One that is left may want to free a tensor while the interpreter shuts
        down, and ends the process by SIGABRT.
        """
        if self.size > 1 and dist.is_initialized():
            gc.collect()  # a shared model holds the group
            dist.destroy_process_group()

    @contextmanager
    def contact(self) -> Iterator[None]:
        """Turn what torch raises when another process is gone into LostContact; other errors pass."""
        try:
            yield
        except RuntimeError as error:
            if self.size > 1 and (isinstance(error, dist.DistError) or _GONE.search(str(error))):
                raise LostContact(f"process {self.rank}: another process of this run has ended") from error
            raise

    # --- exchange -----------------------------------------------------------------------------------------------------

    def gather(self, numbers: Sequence[float]) -> list[list[float]]:
        """A few numbers of every process, in the order of their ranks."""
        if self.size == 1:
            return [list(numbers)]
        mine = torch.tensor(numbers, dtype=torch.float64)
        everyone = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(everyone, mine)
        return [row.tolist() for row in everyone]

    def gather_objects(self, value: Any) -> list[Any]:
        """One object of every process, in the order of their ranks."""
        if self.size == 1:
            return [value]
        everyone: list[Any] = [None] * self.size
        dist.all_gather_object(everyone, value)
        return everyone

    def broadcast(self, value: Any) -> Any:
        """The value of the leading process, to all."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    # --- gradients ----------------------------------------------------------------------------------------------------

    def share(self, model: nn.Module) -> nn.Module:
        """A model whose gradients, of what trains, are averaged over all processes while the backward pass goes on.

        Parameters without a gradient, as an expert that no token chose, are looked for in each pass; that also keeps
        the buckets as they were first made, so that three and more numbers are added up in the same order after a
        resume.
        """
        if self.size == 1:
            return model
        frozen = [name for name, _ in (*model.named_parameters(), *model.named_buffers()) if name.startswith(VISION)]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen)  # each has read it itself
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # of a name that older versions know
            return DistributedDataParallel(model, find_unused_parameters=True, broadcast_buffers=False)


ALONE = World()


def alone_or_last(model: nn.Module, last: bool) -> AbstractContextManager[None]:
    """Around the passes of one batch of several: gradients travel with the last one only."""
    return nullcontext() if last or not isinstance(model, DistributedDataParallel) else model.no_sync()


def slurm_address(environment: Mapping[str, str]) -> dict[str, str]:
    """Where Slurm's processes meet: the first host of the step, on a port that the job's number gives.

    Raises UsageError where Slurm does not say.
    """
    hosts = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_NODELIST", "")
    host = re.match(r"([^,\[]+)(?:\[(\d+))?", hosts)  # gpu[07-09,12],login → gpu07
    if not host:
        raise UsageError(
            "several processes, but neither MASTER_ADDR nor Slurm's host list gives a meeting address — set MASTER_ADDR"
        )
    port = environment.get("MASTER_PORT", str(20000 + int(environment.get("SLURM_JOB_ID", 0)) % 20000))
    return {"MASTER_ADDR": host[1] + (host[2] or ""), "MASTER_PORT": port}
