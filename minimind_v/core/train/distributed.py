"""Several processes that train one model: their ranks, their exchange of values, and their common end.

`launch`, torchrun or Slurm starts them, and each reads its rank from its environment. Numbers and objects travel over
the CPU, gradients from device to device.
"""

from __future__ import annotations

import gc
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # imported after the processes have met, it would keep their group for ever
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from minimind_v.core.errors import LostContact, UsageError
from minimind_v.core.formats.hf.read import VISION
from minimind_v.core.model.vlm import VLM
from minimind_v.core.train.launch import way_to

# So long may the others wait while one evaluates. A process that ends closes its connections, and so ends the wait; a
# machine that loses power closes none.
LONGEST_WAIT = timedelta(days=1)
# Messages of torch's backends after another process has ended.
_GONE = re.compile(r"closed by peer|reset by peer|gloo|nccl|broken pipe|socket|store|connection", re.IGNORECASE)


@dataclass(frozen=True)
class World:
    """The rank of this process among those of the run. Alone, its methods cost nothing."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # on this machine
    restarts: int = 0  # of all processes
    placed: bool = False  # whether a launcher started this process
    _patient: list[Any] = field(default_factory=list, compare=False, repr=False)  # the group for long waits

    @classmethod
    def find(cls, environment: Mapping[str, str] = os.environ) -> World:
        """The rank of this process from torchrun or Slurm; alone without them."""

        def placed(rank: str, size: str, local_rank: str, restarts: str) -> World:
            local, again = (int(environment.get(name, 0)) for name in (local_rank, restarts))
            return cls(int(environment[rank]), int(size), local, again, placed=True)

        try:
            if "RANK" in environment and "WORLD_SIZE" in environment:
                return placed("RANK", environment["WORLD_SIZE"], "LOCAL_RANK", "TORCHELASTIC_RESTART_COUNT")
            tasks = environment.get("SLURM_STEP_NUM_TASKS", environment.get("SLURM_NTASKS", "1"))
            if "SLURM_PROCID" in environment and int(tasks) > 1:
                return placed("SLURM_PROCID", tasks, "SLURM_LOCALID", "SLURM_RESTART_COUNT")
        except ValueError as error:
            raise UsageError(f"the rank of this process cannot be read from the environment: {error}") from None
        return cls()

    @property
    def leads(self) -> bool:
        """Whether this process writes and reports."""
        return self.rank == 0

    def join(self, device: torch.device) -> None:
        """Connect to the other processes. Raises LostContact if they do not come."""
        if self.size == 1:
            return
        if "MASTER_ADDR" not in os.environ:
            os.environ |= slurm_address(os.environ)
        # By default, gloo resolves the machine's name, often to the loopback, which no other machine reaches.
        if way := way_to(os.environ["MASTER_ADDR"]):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", way.interface)
        with self.contact():
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            # A launcher's store outlives restarts: a new start must not read the addresses of ended processes.
            store, _, _ = next(rendezvous("env://", self.rank, self.size))
            fresh = dist.PrefixStore(f"start{self.restarts}", store)
            dist.init_process_group(backend, store=fresh, rank=self.rank, world_size=self.size)
            self._patient.append(dist.new_group(timeout=LONGEST_WAIT, backend="gloo"))

    def leave(self) -> None:
        """Disconnect, after the run has released its model.

        Only then do gloo's threads end. A thread that frees a tensor while the interpreter shuts down ends the process
        by SIGABRT.
        """
        if self.size > 1 and dist.is_initialized():
            self._patient.clear()
            gc.collect()  # a circle may hold a group
            dist.destroy_process_group()

    @contextmanager
    def contact(self) -> Iterator[None]:
        """Turn torch's errors after the end of another process into LostContact; other errors pass."""
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

    def add_up(self, tensor: Tensor) -> None:
        """Replace a tensor by its sum over all processes, on its device; a GPU does so behind what it was given."""
        if self.size > 1:
            dist.all_reduce(tensor)

    def share_weights(self, model: VLM) -> None:
        """Give all processes the weights of the leading one, but not the vision encoder, which each has read."""
        if self.size == 1:
            return
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if not name.startswith(VISION):
                dist.broadcast(tensor.detach(), src=0)

    def await_leader(self) -> None:
        """Wait, for longer than for other exchanges, until the leading process has come here too."""
        if self.size > 1:
            dist.barrier(self._patient[0])


ALONE = World()


def slurm_address(environment: Mapping[str, str]) -> dict[str, str]:
    """The meeting address of Slurm's processes: the first host of the step, on a port from the job's number.

    Raises UsageError if Slurm does not give the hosts.
    """
    hosts = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_NODELIST", "")
    host = re.match(r"([^,\[]+)(?:\[(\d+))?", hosts)  # gpu[07-09,12],login → gpu07
    if not host:
        raise UsageError(
            "several processes, but neither MASTER_ADDR nor Slurm's host list gives a meeting address — set MASTER_ADDR"
        )
    port = environment.get("MASTER_PORT", str(20000 + int(environment.get("SLURM_JOB_ID", 0)) % 20000))
    return {"MASTER_ADDR": host[1] + (host[2] or ""), "MASTER_PORT": port}
