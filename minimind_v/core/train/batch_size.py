"""`--batch-size auto`: find the largest micro-batch that fits in memory, before the run starts.

A step keeps its rows: the batch size becomes one of their divisors, and accumulation changes with it. A model like the
run's is tried with the largest possible rows, and is deleted before the run builds its own.
"""

from __future__ import annotations

import gc
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from minimind_v.core.config.schema import RunConfig
from minimind_v.core.errors import RunError, UsageError
from minimind_v.core.monitor.messages import out_of_memory
from minimind_v.core.train.distributed import ALONE, World
from minimind_v.core.train.graph import peak_with_recordings
from minimind_v.core.train.trial import Trial

HEADROOM = 0.2  # of a CPU's free memory: data workers live there too, and the estimate is a straight line
GPU_HEADROOM = 0.08  # of the memory of a GPU that may be taken: its allocator leaves gaps as lengths change
GIB = 2**30
UNMEASURED = "--batch-size auto can measure memory only on CUDA and on Linux — give a number"


class Gauge:
    """The memory of this machine and of this process, in bytes, as Linux reports it."""

    def __init__(self, root: Path = Path("/")) -> None:
        self.root = root

    def room(self) -> int:
        """Free memory: the least of the machine's and that of its control groups."""
        limits = [self._fields("proc/meminfo")["MemAvailable"]]
        for line in self._lines("proc/self/cgroup"):
            _, kinds, path = line.split(":", 2)
            if kinds in ("", "memory"):
                limits += self._left(Path("sys/fs/cgroup") / kinds, path.strip("/"))
        limits += self._address_space()
        return min(limits)

    def _left(self, mount: Path, path: str) -> Iterator[int]:
        """Free memory of a control group and of those around it. Cached files count as free."""
        for group in [mount / path, *(mount / path).parents]:
            if not group.is_relative_to(mount):
                return
            for limit, used, idle in (
                ("memory.max", "memory.current", "inactive_file"),
                ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
            ):
                bounds = [line for name in (limit, used) for line in self._lines(group / name)[:1]]
                if len(bounds) == 2 and bounds[0].isdigit():  # and not `max`
                    lines_of_fields = (line.split() for line in self._lines(group / "memory.stat"))
                    cached = sum(int(fields[1]) for fields in lines_of_fields if fields[0] == idle)
                    yield int(bounds[0]) - int(bounds[1]) + cached

    def _address_space(self) -> list[int]:
        import resource

        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        return [] if limit == resource.RLIM_INFINITY else [limit - self._fields("proc/self/status")["VmSize"]]

    def held(self) -> int:
        """The memory of this process now."""
        return self._fields("proc/self/status")["VmRSS"]

    def peak(self, work: Callable[[], object]) -> int:
        """The peak memory of this process during some work."""
        with open(self.root / "proc/self/clear_refs", "w") as file:
            file.write("5")  # the peak begins again
        work()
        return self._fields("proc/self/status")["VmHWM"]

    def _fields(self, name: str) -> dict[str, int]:
        """`Name:  123 kB`, in bytes."""
        rows = [line.split() for line in self._lines(name)]
        return {row[0].rstrip(":"): int(row[1]) * 1024 for row in rows if row[-1] == "kB"}

    def _lines(self, name: str | Path) -> list[str]:
        try:
            return (self.root / name).read_text(encoding="ascii", errors="replace").splitlines()
        except OSError:
            return []


def find_batch_size(
    config: RunConfig,
    device: torch.device,
    world: World = ALONE,
    gauge: Gauge | None = None,
    make_trial: Callable[[RunConfig, torch.device], Trial] = Trial,
) -> tuple[RunConfig, str]:
    """The configuration with the largest batch size that fits on every process, and a line with the reason.

    Only the division of a step's rows changes: no weight, no random number. Raises
    UsageError where memory cannot be measured, RunError where a GPU has no room for a single row.
    """
    if device.type == "mps":  # it swaps without an error
        raise UsageError(UNMEASURED)
    rows = config.data.batch_size * config.accumulate
    sizes = [size for size in range(rows, 0, -1) if rows % size == 0]
    with _discarded(device):
        trial = make_trial(config, device)
        if device.type == "cpu":
            largest, why = _by_measure(trial, sizes, world, config.gpus, gauge or Gauge())
        else:
            largest, why = _by_trial(trial, sizes)
        del trial
    size = int(min(answer for (answer,) in world.gather([largest])))
    if size < largest:
        why = "another process has no memory for more"
    of = f"the {rows} rows of a step" + ("" if world.size == 1 else " per process")
    config = replace(config, data=replace(config.data, batch_size=size), accumulate=rows // size)
    return config, f"batch size {size}, accumulate {rows // size}, for {of}: {why}"


@contextmanager
def _discarded(device: torch.device) -> Iterator[None]:
    """Free the memory of a trial, and reset the peak."""
    try:
        yield
    finally:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)


def _by_trial(trial: Trial, sizes: Sequence[int]) -> tuple[int, str]:
    """On a GPU, which raises when it is full: the largest of the sizes (in falling order) that fits."""
    total = _gpu_memory(trial.device)
    # A run also holds the optimiser's moments, and gradients that stay where steps are recorded.
    besides = trial.moments * 3 // 2 + int(total * GPU_HEADROOM)
    for size in sizes:
        in_memory = _goes_through(trial, size, besides, total)
        gc.collect()
        torch.cuda.empty_cache()
        if in_memory:
            return size, f"measured with rows of {trial.length} tokens on {total / GIB:.1f} GiB"
    raise RunError(
        f"out of memory — a single row of {trial.length} tokens does not fit into {total / GIB:.1f} GiB: "
        "lower --max-length, or choose a smaller --preset"
    )


def _goes_through(trial: Trial, size: int, besides: int, total: int) -> bool:
    """Whether rows fit beside so many bytes, also once they are recorded; a single row may be without that."""
    torch.cuda.reset_peak_memory_stats(trial.device)
    try:
        taken = torch.empty(besides, dtype=torch.uint8, device=trial.device)
        trial(size)
        in_memory = size == 1 or peak_with_recordings(trial.device, trial.moments // 2) <= total
        del taken
    except RuntimeError as error:  # libraries have errors of their own for it
        if not out_of_memory(error):
            raise
        return False
    return in_memory


def _gpu_memory(device: torch.device) -> int:
    """The memory that this process may use of a GPU: free memory and its own, up to its share."""
    free, whole = torch.cuda.mem_get_info(device)
    share = getattr(torch.cuda, "get_per_process_memory_fraction", lambda _: 1.0)(torch.cuda.current_device())
    return min(free + torch.cuda.memory_reserved(device), int(whole * share))


def _by_measure(trial: Trial, sizes: Sequence[int], world: World, gpus: int, gauge: Gauge) -> tuple[int, str]:
    """On a CPU, where too much memory ends the process: measured with a few rows, then extrapolated linearly.

    The processes of a machine share its memory; before they start, `gpus` is their number.
    """
    if not sys.platform.startswith("linux"):
        raise UsageError(UNMEASURED)
    held, room = gauge.held(), gauge.room()
    hosts = world.gather_objects(platform.node())  # it also waits until all have measured
    usable = int(room * (1 - HEADROOM)) // (hosts.count(platform.node()) if world.placed else gpus)
    taken = {0: 0}  # rows → bytes
    for rows in (1, 2, 4):
        taken[rows] = gauge.peak(partial(trial, rows)) - held
        if 2 * taken[rows] > usable or 2 * rows > sizes[0]:  # twice as many may not fit, or are not needed
            break
    gauge.peak(lambda: None)
    fewer, most = list(taken)[-2:]
    each = max((taken[most] - taken[fewer]) // (most - fewer), trial.row)

    def takes(size: int) -> int:
        return trial.moments + taken.get(size, taken[most] + each * (size - most))

    size = next((size for size in sizes if takes(size) <= usable), 1)
    why = f"{takes(size) / GIB:.1f} GiB with rows of {trial.length} tokens, of {usable / GIB:.1f} GiB available"
    return size, why
