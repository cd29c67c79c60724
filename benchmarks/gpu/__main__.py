"""Prove the GPU path on one card, then measure it.

    python -m benchmarks.gpu --out DIR                    on a machine with a card, from the checkout, not installed
    python -m benchmarks.gpu --out DIR --run more         what the first run has no time for
    python -m benchmarks.gpu --run all --device cpu --tiny    every part with stand-ins: finds mistakes in the script
    python -m benchmarks.gpu --pack .gpu                  what to carry to a machine that has only the checkout
    python -m benchmarks.gpu --page DIR/gpu.json DIR/more.json    docs/gpu.md from what was found

A card is lent for minutes, so there are two runs of at most 440 s: `gpu` proves, and measures what steps are launched
by; `more` compares with the plain loop. Each part has a limit of its own and is caught; RUN.json is written again after
each, RUN.md at the end. The exit code is 1 where a check failed or a part broke.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

STARTED = time.perf_counter()
# Before CUDA starts: deterministic algorithms are asked for in some parts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch  # noqa: E402

from benchmarks.gpu import (  # noqa: E402
    answers,
    ceilings,
    feeding,
    proofs,
    report,
    resident,
    steps,
    training,
    vision,
)
from benchmarks.gpu.card import Card, Result  # noqa: E402
from benchmarks.gpu.material import material  # noqa: E402
from minimind_v.core.device import device_name, pick_device  # noqa: E402
from minimind_v.core.files import write_text  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
CARRIED = ROOT / ".gpu"
LEAST = 3.0  # seconds that must be left for a part to be begun


@dataclass(frozen=True)
class Part:
    """A name, the seconds that it is expected to take and those that it may take, and what it does."""

    name: str
    expected: float
    limit: float
    work: Callable[[Card, Result], None]


# In the order of their weight; parts with a profiler, which may slow all later launches down, behind that which times
# steps. What a card has not shown yet is expected by counting steps and starts of runs.
PARTS = (
    Part("start", 15, 20, ceilings.start),
    Part("ceilings", 8, 20, ceilings.ceilings),
    Part("material", 30, 60, material),
    Part("conformance", 30, 60, proofs.conformance),
    Part("experts", 8, 30, proofs.experts),
    Part("decoding", 45, 60, answers.decoding),
    Part("resume", 45, 80, proofs.resume),
    Part("curve", 20, 60, proofs.loss_curve),
    Part("automatic batch", 10, 30, proofs.automatic_batch),
    Part("steps", 110, 120, steps.steps),
    Part("plans", 10, 30, proofs.plans),
    Part("waits", 25, 40, proofs.waits),
    Part("compiled", 84, 120, training.compiled),
    Part("training", 125, 200, training.ours),
    Part("plain", 45, 80, training.plain),
    Part("talking", 55, 65, answers.talking),
    Part("vision", 75, 90, vision.vision),
    Part("resident", 30, 50, resident.resident),
    Part("feeding", 45, 50, feeding.feeding),
    Part("resident, compiled", 150, 200, resident.compiled),
)
BOTH = ("start", "ceilings", "material")  # others need them
RUNS = {
    "gpu": (*BOTH, "conformance", "experts", "decoding", "resume", "curve", "automatic batch", "steps", "plans",
            "waits", "compiled"),
    "more": (*BOTH, "training", "plain", "talking", "vision", "resident", "feeding"),
    "all": tuple(part.name for part in PARTS),
}  # fmt: skip


class TooLong(BaseException):
    """A part has used up its seconds. No ordinary exception: what a part runs may catch those."""


@contextlib.contextmanager
def limit(seconds: float) -> Iterator[None]:
    """Raises TooLong in the main thread after so many seconds."""

    def ring(*_: object) -> None:
        raise TooLong

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)  # and again, should something swallow it
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def main() -> int:
    options = _options()
    if options.pack:
        return pack(options.pack)
    if options.page:
        report.write_page([json.loads(path.read_text(encoding="utf-8")) for path in options.page])
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    device = pick_device(options.device)
    disk = "/dev/shm" if os.path.isdir("/dev/shm") and shutil.disk_usage("/dev/shm").free > 16e9 else None
    folder = Path(tempfile.mkdtemp(prefix="mmv-gpu-", dir=disk))
    carried = next((path for path in _folders(options.carried) if path.is_dir()), None)
    card = Card(device, options.tiny, carried, folder)
    chosen = {*options.only, "material"} if options.only else {*RUNS[options.run]}
    record = {
        "card": device_name(device),
        "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "tiny": options.tiny,
        "seconds": 0.0,
        "left_out": [part.name for part in PARTS if part.name not in chosen],
        "parts": card.results,
    }
    try:
        for part in PARTS:
            if part.name not in chosen:
                continue
            do(part, card, options.budget)
            record["seconds"] = time.perf_counter() - STARTED
            write_text(
                options.out / f"{options.run}.json", json.dumps(record, indent=1, ensure_ascii=False, default=str)
            )
    finally:
        if card.reference:
            card.reference.kill()
        shutil.rmtree(folder, ignore_errors=True)
    page = report.markdown(record)
    write_text(options.out / f"{options.run}.md", page)
    print(page)
    failures = report.failures(card.results)
    for failure in failures:
        print(f"FAILED  {failure}")
    return 1 if failures else 0


def do(part: Part, card: Card, budget: float) -> None:
    """One part, within its limit and what is left of all; whatever it found by then stays."""
    card.results[part.name] = result = {"status": "done"}
    begun = time.perf_counter()
    left = budget - (begun - STARTED)
    if left < LEAST:
        result["status"] = "not begun: no time left"
        return
    try:
        with limit(left if card.tiny else min(part.limit, left)):  # with stand-ins a busy machine is no fault
            part.work(card, result)
    except TooLong:
        result["status"] = f"stopped after {time.perf_counter() - begun:.0f} s"
    except Exception as error:
        result["status"] = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        result["traceback"] = traceback.format_exc()[-3000:]
        print(result["traceback"], file=sys.stderr)
    finally:
        result["seconds"] = round(time.perf_counter() - begun, 1)
        if card.cuda:
            with contextlib.suppress(RuntimeError):  # after a failed recording torch believes that it still records
                torch.cuda.empty_cache()
    print(f"{time.perf_counter() - STARTED:6.1f} s  {part.name}: {result['status']}", file=sys.stderr, flush=True)


def pack(target: Path) -> int:
    """Copy the published numbers and the tokenizer to where they can be carried from."""
    target.mkdir(parents=True, exist_ok=True)
    for name in ("conformance", "tokenizer"):
        source = ROOT.parent / "shared" / name
        if not source.is_dir():
            print(f"{source} is not here: {name} was not packed")
            continue
        shutil.rmtree(target / name, ignore_errors=True)
        shutil.copytree(source, target / name, copy_function=shutil.copyfile)
    return 0


def _folders(given: Path | None) -> list[Path]:
    return [given] if given else [CARRIED, ROOT.parent / "shared"]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/gpu"))
    parser.add_argument("--budget", type=float, default=440.0, help="seconds for everything")
    parser.add_argument("--run", default="gpu", choices=RUNS, help="which parts, if --only does not name them")
    parser.add_argument("--only", nargs="+", choices=[part.name for part in PARTS], metavar="PART")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small sizes: proves the script, measures nothing")
    parser.add_argument("--carried", type=Path, help="a folder with `conformance` and `tokenizer` [.gpu]")
    parser.add_argument("--pack", type=Path, metavar="DIR")
    parser.add_argument("--page", type=Path, nargs="+", metavar="JSON")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
