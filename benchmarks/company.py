"""Training, evaluating and talking on a CPU, alone and beside other busy processes.

    python -m benchmarks.company            both sizes, three rounds: some seventeen minutes on two cores
    python -m benchmarks.company --quick    the demo's size alone: five minutes

Each figure is a process of its own with all cores. `spinning` is torch as it comes; `sharing` is what a run does
(`core/cpu_sharing.py`). Sides take turns. Alone means that nothing else is busy: a browser is.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORKS = ("train", "eval", "chat")
SIZES = {"demo": (8, 230, 3.0), "small": (4, 260, 12.0)}  # rows of a batch, tokens of a row, seconds to measure
SIDES = ("spinning", "sharing")


def measure(size: str, work: str, side: str) -> dict:
    """Rates of one process: batches, or tokens, in a second; and whether the same bits came out."""
    import torch

    from benchmarks.curves import Learner, make_batch
    from minimind_v.core.config.presets import PRESETS
    from minimind_v.core.cpu_sharing import share_cpu
    from minimind_v.core.generate.rows import Row, generate
    from minimind_v.core.generate.sampling import GREEDY, Sampler

    if side == "sharing":
        share_cpu()
    rows, length, seconds = SIZES[size]
    learner, vocabulary = Learner(size), PRESETS[size].vocab_size
    batch = make_batch([length - 3 * row for row in range(rows)], vocabulary)
    model = learner.model

    def train() -> int:
        learner.seconds(batch)
        return rows

    @torch.inference_mode()
    def evaluate() -> int:
        model.eval()(**batch.tokens, image_features=batch.image_features)
        return rows

    def chat() -> int:
        return sum(1 for _ in generate(model, Row(batch.input_ids[0, :20].tolist(), Sampler(GREEDY), 48), -1))

    do = {"train": train, "eval": evaluate, "chat": chat}[work]
    learner.seconds(batch)
    digest = float(sum(weight.detach().double().abs().sum() for weight in learner.train_step.trainable))
    do()
    time.sleep(0.6)  # in which the cores are watched
    done, begun = 0, time.perf_counter()
    while (passed := time.perf_counter() - begun) < seconds:
        done += do()
    return {"rate": done / passed, "digest": digest}


def start(size: str, work: str, side: str) -> dict:
    """A measurement in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.company", "--job", size, work, side]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def compare(sizes: list[str], rounds: int, busy: int) -> list[dict]:
    """Medians of every size, kind of work and side, alone and beside so many busy processes."""
    results = []
    for size in sizes:
        for work in WORKS:
            rates: dict[tuple[str, int], list[float]] = {}
            digests = set()
            for _ in range(rounds):
                for others in (0, busy):
                    company = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(others)]
                    try:
                        for side in SIDES:
                            result = start(size, work, side)
                            rates.setdefault((side, others), []).append(result["rate"])
                            digests.add(result["digest"])
                    finally:
                        for other in company:
                            other.kill()
                            other.wait()
            middle = {key: statistics.median(values) for key, values in rates.items()}
            if len(digests) > 1:
                raise SystemExit(f"{size}, {work}: not the same bits: {digests}")
            results.append({
                "size": size, "work": work,
                **{f"{side}_{'beside' if others else 'alone'}": rate for (side, others), rate in middle.items()},
                "alone_against_spinning": middle["sharing", 0] / middle["spinning", 0],
                "slower_beside": middle["sharing", 0] / middle["sharing", busy],
                "slower_beside_spinning": middle["spinning", 0] / middle["spinning", busy],
            })  # fmt: skip
            print(describe(results[-1]), flush=True)
    return results


def describe(row: dict) -> str:
    """A line for people."""
    return (
        f"{row['size']:6}{row['work']:6} alone {row['sharing_alone']:8.1f}/s ({row['alone_against_spinning']:.2f} of "
        f"spinning), beside {row['sharing_beside']:8.1f}/s: {row['slower_beside']:.1f}× slower "
        f"(spinning {row['spinning_beside']:.1f}/s: {row['slower_beside_spinning']:.1f}×); the same bits"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--busy", type=int, default=1, help="busy processes beside")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--job", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        print(json.dumps(measure(*options.job)))
        return
    results = compare(["demo"] if options.quick else list(SIZES), options.rounds, options.busy)
    if options.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
