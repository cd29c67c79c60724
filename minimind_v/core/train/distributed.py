"""Several processes that train one model: their ranks, their exchange of values, and their common end.

`launch`, torchrun or Slurm starts them, and each reads its rank from its environment. Numbers and objects travel over
the CPU; torch's DistributedDataParallel averages gradients.
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
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from minimind_v.core.data.batch import stand_in
from minimind_v.core.errors import LostContact, UsageError
from minimind_v.core.formats.hf.read import VISION
from minimind_v.core.model.vlm import VLM, Output
from minimind_v.core.train.launch import way_to

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

    def leave(self) -> None:
        """Disconnect, after the run has released its model.

        Only then do gloo's threads end. A thread that frees a tensor while the interpreter shuts down ends the process
        by SIGABRT.
        """
        if self.size > 1 and dist.is_initialized():
            gc.collect()  # a shared model holds the group
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

    # --- gradients ----------------------------------------------------------------------------------------------------

    def share(self, model: VLM, pad_id: int) -> nn.Module:
        """The model with gradients averaged over all processes during the backward pass.

        Where a pass may leave out parameters, such as an expert without a token, each pass searches for them. That also
        keeps the first buckets, so that three and more numbers are added up in the same order after a resume. Elsewhere
        a pass before the first step decides the buckets, and the projector gets a gradient of 0 without an image.
        """
        if self.size == 1:
            return model
        padding = stand_in(pad_id).to(model.device).tokens
        whole = _WholeModel(model)
        search = model.config.use_moe or not whole.reaches_all(padding)
        given: nn.Module = model if search else whole
        named = (*given.named_parameters(), *given.named_buffers())
        frozen = [name for name, _ in named if name.removeprefix("model.").startswith(VISION)]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(given, frozen)  # each process has read it
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # about a name that older versions need
            ddp_model = DistributedDataParallel(
                given, find_unused_parameters=search, broadcast_buffers=False, gradient_as_bucket_view=True
            )
        if not search:
            ddp_model(**padding).loss_sum.backward()
            model.zero_grad(set_to_none=True)
        return ddp_model


class _WholeModel(nn.Module):
    """A model each pass of which reaches the projector too: without an image its gradient is 0."""

    def __init__(self, model: VLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, image_features: Tensor | None = None, **tokens: Tensor) -> Output:
        """As VLM.forward, with labels."""
        out: Output = self.model(image_features=image_features, **tokens)
        if image_features is None:
            assert out.loss_sum is not None
            out.loss_sum = out.loss_sum + 0 * sum(weight.sum() for weight in self.model.vision_proj.parameters())
        return out

    def reaches_all(self, tokens: dict[str, Tensor]) -> bool:
        """Whether a pass over these tokens gives every trainable parameter a gradient."""
        trainable = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return None not in torch.autograd.grad(self(**tokens).loss_sum, trainable, allow_unused=True)


ALONE = World()


def alone_or_last(model: nn.Module, last: bool) -> AbstractContextManager[None]:
    """A context for the passes of one batch of several: only the last one averages gradients."""
    return nullcontext() if last or not isinstance(model, DistributedDataParallel) else model.no_sync()


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
