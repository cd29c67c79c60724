"""A run's steps by each way of launching them, one lever more in each line."""

from __future__ import annotations

from benchmarks.gpu.card import Card, Result, quantiles
from benchmarks.gpu.ceilings import launch_us
from benchmarks.gpu.runs import StepListener, Window, configure, make_run, store_features
from benchmarks.gpu.training import AGREEMENT
from minimind_v.core.train.step import TrainStep

WAYS = ("read at once", "padded", "graph")
STAGES = (("small", "pretrain"), ("small", "sft"), ("moe", "sft"))


def steps(card: Card, results: Result) -> None:
    """Milliseconds of a step: read before the next is launched; behind it, of padded shapes; and as a CUDA graph."""
    results["checks"] = checks = {}
    results["launch_us"] = launch_us(card)
    stages = STAGES[:1] if card.tiny else STAGES
    for stage in dict.fromkeys(stage for _, stage in stages):
        store_features(card, stage)
    for preset, stage in stages:
        name, first = f"{preset} {stage}", f"{preset} {stage}, {WAYS[0]}"
        for way in WAYS:
            results[f"{name}, {way}"] = result = _measure(card, preset, stage, way)
            if way != WAYS[0]:
                losses = list(zip(result["losses"], results[first]["losses"], strict=False))
                ours, theirs = map(sum, zip(*losses, strict=True))  # of as many steps as both have done
                result["loss_gap"] = abs(ours / theirs - 1)
                checks[f"{name}: {way} has the losses of {WAYS[0]}"] = result["loss_gap"] <= AGREEMENT
            if way == "graph" and card.cuda:
                checks[f"{name}: recorded"] = result["recordings"] > 0


def _measure(card: Card, preset: str, stage: str, way: str) -> Result:
    # A shape is recorded when it comes for the eighth time: a graph is measured after most have been.
    window = Window(0.3, 0, 1) if card.tiny else Window(2.5, 6.0 if way == "graph" else 1.0, 20)
    listener = StepListener(window)
    run = make_run(configure(card, preset, stage, features="exact"), listener)
    _launch(run.train_step, way)
    run.run()
    graphs = run.train_step.graphs
    return quantiles(window.times) | {
        "samples_s": round(window.difference("samples") / window.seconds, 1),
        "waiting_for_data": round(window.difference("data_seconds") / window.seconds, 4),
        "recordings": graphs.graphs.recorded if graphs else 0,
        "gave_up": any("without a CUDA graph" in line for line in listener.messages),
        "losses": listener.losses,
    }


def _launch(train_step: TrainStep, way: str) -> None:
    """Use a way of launching steps. On a CPU that stands in for a card, all are the first."""
    if way == WAYS[0]:
        train_step.late, train_step.graphs = False, None
    elif train_step.graphs:
        train_step.graphs.graphs.on = way == "graph"
