"""What all parts share: the device, its clock, its profiler, and the material that they work on."""

from __future__ import annotations

import gc
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.material import BASE_TOWER
from minimind_v.core.config.presets import PRESETS
from minimind_v.core.config.schema import TextConfig
from minimind_v.core.device import wait_for

NOMINAL = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "3090": 71e12, "4090": 165e12}  # dense bf16, FLOP/s
# Sizes for `--tiny`: what the plain side takes for granted (196 patches of 768, 8 heads) and little more.
TINY_TOWER = BASE_TOWER | {"num_hidden_layers": 1, "intermediate_size": 768}
TINY_TEXT = {
    "small": TextConfig(hidden_size=64, num_hidden_layers=2),
    "base": TextConfig(hidden_size=128, num_hidden_layers=2),
    "moe": TextConfig(hidden_size=64, num_hidden_layers=2, use_moe=True),
}

Result = dict[str, Any]  # what a part has found, filled in as it goes


@dataclass
class Card:
    """The device under test and everything that a part needs to use it."""

    device: torch.device
    tiny: bool
    carried: Path | None  # a folder with `conformance` and `tokenizer`
    folder: Path  # material, runs and features
    results: dict[str, Result] = field(default_factory=dict)  # of the parts that are done
    reference: subprocess.Popen[str] | None = None  # computes the CPU's losses meanwhile

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def peak(self) -> float | None:
        """Nominal dense bf16 rate in FLOP/s, where the card is a known one."""
        name = torch.cuda.get_device_name(self.device) if self.cuda else ""
        return next((rate for word, rate in NOMINAL.items() if word in name), None)

    @property
    def tower(self) -> dict[str, Any]:
        return TINY_TOWER if self.tiny else BASE_TOWER

    def text(self, preset: str) -> TextConfig:
        """Sizes of a language model. The vocabulary is the published one also where the tokenizer is smaller."""
        return TINY_TEXT[preset] if self.tiny else PRESETS[preset]

    def wait(self) -> None:
        wait_for(self.device)

    def seconds(self, work: Callable[[], object], calls: int = 20, warm: int = 3) -> float:
        """Seconds of one call, many of them queued behind each other."""
        calls, warm = (2, 1) if self.tiny else (calls, warm)
        for _ in range(warm):
            work()
        self.wait()
        begun = time.perf_counter()
        for _ in range(calls):
            work()
        self.wait()
        return (time.perf_counter() - begun) / calls

    def each(self, work: Callable[[], object], calls: int) -> list[float]:
        """Seconds of each of several calls, waited for one by one."""
        seconds = []
        for _ in range(calls):
            self.wait()
            begun = time.perf_counter()
            work()
            self.wait()
            seconds.append(time.perf_counter() - begun)
        return seconds

    @contextmanager
    def memory(self, result: Result):
        """Notes the most memory that was allocated and reserved meanwhile, in bytes."""
        if self.cuda:
            gc.collect()  # earlier runs are circles; forked workers of others must not free them either
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        yield
        if self.cuda:
            result["max_allocated"] = torch.cuda.max_memory_allocated(self.device)
            result["max_reserved"] = torch.cuda.max_memory_reserved(self.device)


class Kernels:
    """What ran on the device while a profiler looked: kernels on CUDA, operators in their place on a CPU."""

    def __init__(self, card: Card) -> None:
        from torch.profiler import ProfilerActivity, profile

        self.card = card
        self.profiler = profile(activities=[ProfilerActivity.CUDA if card.cuda else ProfilerActivity.CPU])
        self.events: list[tuple[str, float, float]] = []  # name, begin and duration in microseconds
        self.seconds = 0.0

    def start(self) -> None:
        self.card.wait()
        self.profiler.start()
        self.begun = time.perf_counter()

    def stop(self) -> None:
        self.card.wait()
        self.seconds = time.perf_counter() - self.begun
        self.profiler.stop()
        kinds = ("kernel", "gpu_memcpy", "gpu_memset") if self.card.cuda else ("cpu_op",)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            self.profiler.export_chrome_trace(str(path))
            trace = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
        self.events = [
            (event["name"], float(event["ts"]), float(event["dur"])) for event in trace if event.get("cat") in kinds
        ]

    @property
    def busy(self) -> float:
        """The share of the time in which at least one kernel ran."""
        end = covered = 0.0
        for _, begin, duration in sorted(self.events, key=lambda event: event[1]):
            covered += max(0.0, begin + duration - max(begin, end))
            end = max(end, begin + duration)
        return covered / 1e6 / self.seconds if self.seconds else 0.0

    def longest(self, count: int = 8) -> list[tuple[str, int, float]]:
        """Name, number and milliseconds of the kernels that took the most time."""
        sums: dict[str, tuple[int, float]] = {}
        for name, _, duration in self.events:
            number, total = sums.get(name[:90], (0, 0.0))
            sums[name[:90]] = number + 1, total + duration / 1e3
        ranked = sorted(sums.items(), key=lambda item: -item[1][1])[:count]
        return [(name, number, round(total, 3)) for name, (number, total) in ranked]


def bf16(card: Card):
    """bf16 autocast on a card; on a CPU, which stands in, nothing."""
    return torch.autocast("cuda", torch.bfloat16) if card.cuda else nullcontext()


def quantiles(seconds: list[float]) -> Result:
    """Median and 95th percentile, in milliseconds."""
    ordered = sorted(seconds)
    return {
        "median_ms": round(statistics.median(ordered) * 1e3, 3),
        "p95_ms": round(ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))] * 1e3, 3),
    }


def close(tensor: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference, as a share of the largest value of `other`."""
    return float((tensor.float() - other.float()).abs().max() / other.float().abs().max().clamp(min=1e-30))
