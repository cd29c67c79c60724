"""Kills a run at random moments, again and again, and resumes it: it must end as one that was never interrupted.

    python -m tests.faults.soak --kills 300      what `make soak` does: some hours on two cores

Runs of one and of two processes take turns. Each is killed by SIGKILL, SIGTERM or SIGINT after a random time; then it
is resumed, until it has come to its end. States are due after every other update and, by time, all the while; their
disk is slow, so that many a kill meets a save in the background. Curve, weights and the last state must equal those of
the uninterrupted run bit for bit. Stops at the first difference, with its seed.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from minimind_v.core.formats.checkpoint import read_checkpoint
from minimind_v.core.train import saver
from tests.cli.harness import ROOT, Running, read_rows, tiny_data

NAME = "pretrain_vlm_128"
STEPS = {"epochs": 3, "accumulate": 2, "save_every": 2, "save_minutes": 1, "workers": 1}
SIDES = {1: {"batch_size": 4}, 2: {"batch_size": 2, "gpus": 2}}
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
FIRST = """  # what every process begins with; an interrupt ends it, as it ends `mmv` while that is imported
import signal
before = signal.signal(signal.SIGINT, signal.SIG_DFL)
from tests.faults.soak import save_often
save_often()
signal.signal(signal.SIGINT, before)
"""
EXACT = ("step", "loss", "token_accuracy", "lr", "grad_norm", "epoch", "samples", "tokens", "supervised_tokens")


def save_often() -> None:
    """Let minutes last a tenth of a second, and a disk as long for each file."""
    real = os.fsync

    def sync(handle: int) -> None:
        time.sleep(0.1)
        real(handle)

    os.fsync = sync
    saver.MINUTE = 0.1


def start(folder: Path, out: Path, processes: int, *options: str) -> Running:
    """The installed command, on one thread per process: bits depend on how many there are."""
    return Running(folder, *tiny_data().train(out, **STEPS | SIDES[processes]), *options)


def same(out: Path, reference: Path) -> bool:
    """Whether two runs left the same curve, weights and last state."""
    curves = [
        [[metrics[key] for key in EXACT] for metrics in read_rows(f / NAME / "metrics.jsonl")] for f in (out, reference)
    ]
    states = [load_file(max((folder / NAME / "states").glob("*.safetensors"))) for folder in (out, reference)]
    weights = [read_checkpoint(folder / f"{NAME}.pth").tensors for folder in (out, reference)]
    tensors = all(
        ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)
        for ours, theirs in (states, weights)
    )
    return curves[0] == curves[1] and tensors


def kill_until_done(folder: Path, out: Path, processes: int, rng: random.Random, longest: float) -> tuple[int, int]:
    """Kill and resume one run to its end; returns how often it was killed, and how often inside a save."""
    kills = inside = 0
    while True:
        run = start(folder / f"{kills}", out, processes, "--resume")
        end = time.monotonic() + rng.uniform(0, longest)
        while run.alive and time.monotonic() < end:
            time.sleep(0.01)
        if not run.alive:
            ended = run.wait()
            assert ended.code == 0, ended.err
            return kills, inside
        sent = rng.choice(SIGNALS)
        code = run.send(sent).wait().code
        assert code in (0, -sent, 128 + sent), f"{sent.name}: {code}\n{run.err}"
        if code == 0:
            return kills, inside
        kills += 1
        inside += any(out.rglob(".*.tmp"))


def main() -> None:
    """Read the options, and kill."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.soak", description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng, kills, inside, runs = random.Random(options.seed), 0, 0, 0
    with tempfile.TemporaryDirectory() as name:
        folder, whole, took = Path(name), {}, {}
        (folder / "sitecustomize.py").write_text(FIRST)
        os.environ["PYTHONPATH"] = f"{folder}{os.pathsep}{ROOT}"
        for processes in SIDES:
            begun, whole[processes] = time.monotonic(), folder / f"whole{processes}"
            ended = start(folder / f"run{processes}", whole[processes], processes).wait()
            assert ended.code == 0, ended.err
            took[processes] = time.monotonic() - begun
        while kills < options.kills:
            processes = 1 + runs % 2
            out = folder / "out"
            killed, saving = kill_until_done(folder / f"runs{runs}", out, processes, rng, took[processes])
            runs, kills, inside = runs + 1, kills + killed, inside + saving
            if not same(out, whole[processes]):
                raise SystemExit(f"run {runs} of {processes} processes differs (--seed {options.seed})")
            shutil.rmtree(out)
            shutil.rmtree(folder / f"runs{runs - 1}", ignore_errors=True)
            counted = f"{kills} kills ({inside} inside a save) in {runs} runs"
            print(f"{counted}: each ended as if it had not been interrupted", flush=True)


if __name__ == "__main__":
    main()
