"""What a run reaches: ours in its first and later epochs, at every size; and the plain loop beside it."""

from __future__ import annotations

import contextlib
import time

import torch

from benchmarks.gpu.card import Card, Kernels, Result, quantiles
from benchmarks.gpu.ceilings import launch_us
from benchmarks.gpu.runs import StepListener, Window, configure, make_run, row_numbers, store_features
from benchmarks.plain import PlainRun, run_plain
from benchmarks.train import looking_operations
from minimind_v.core.bench import operations
from minimind_v.core.model.vlm import VLM

AGREEMENT = 2e-2  # relative, of the first losses of both sides: bf16 adds up in another order
COMPARED = 3  # updates
# Name → preset, stage, how features are had, options. An epoch that remembers comes before one that reads.
OURS = {
    "small pretrain, pictures encoded": ("small", "pretrain", "off", {}),
    "small pretrain, encoded and stored": ("small", "pretrain", "store", {}),
    "small pretrain, features read": ("small", "pretrain", "exact", {}),
    "small sft, pictures encoded": ("small", "sft", "off", {}),
    "small sft, encoded and stored": ("small", "sft", "store", {}),
    "small sft, features read": ("small", "sft", "exact", {}),
    "small sft, features read, deterministic": ("small", "sft", "exact", {"deterministic": True}),
    "base pretrain, features read": ("base", "pretrain", "exact", {}),
    "base sft, features read": ("base", "sft", "exact", {}),
    "moe sft, features read": ("moe", "sft", "exact", {}),
}
TINY = ("small pretrain, encoded and stored", "small pretrain, features read", "moe sft, features read")


def ours(card: Card, results: Result) -> None:
    """Each size, stage and kind of epoch for some seconds, by the real run."""
    for name, (preset, stage, features, options) in OURS.items():
        if card.tiny and name not in TINY:
            continue
        results[name] = result = {}
        try:
            measure(card, result, preset, stage, features, dict(options))
        finally:
            torch.use_deterministic_algorithms(False)


def compiled(card: Card, results: Result) -> None:
    """Later epochs with the decoder as it is, and compiled: that takes a minute or two and comes last."""
    results["launch_us"] = launch_us(card)  # behind profilers
    store_features(card, "pretrain")
    for name, on in (("as it is", False), ("compiled", True)):
        options = {"compiled": on, "profiled": True}
        result = results.setdefault(f"small pretrain, {name}", {})
        measure(card, result, "small", "pretrain", "exact", options)
        if card.cuda:
            result.setdefault("checks", {})[f"{name}: its steps are recorded"] = result["recordings"] > 0


def measure(card: Card, result: Result, preset: str, stage: str, features: str, options: dict) -> None:
    """A run for some seconds. Among the options, `compiled` is for its decoder, `profiled` for its end."""
    storing = features == "store"  # a single epoch, since a second one would read
    window = Window(0.3, 0, 1) if card.tiny else Window(12.0, 0.5, 8) if storing else Window(6.0, 2.0, 20)
    compiled, profiled = (options.pop(name, False) for name in ("compiled", "profiled"))
    kernels, steps = Kernels(card), 2 if card.tiny else 20
    ends = [0]  # the step at which profiling ends, once it has begun

    def on_step(metrics) -> bool:
        if ends[0]:
            if metrics.step < ends[0]:
                return False
            kernels.stop()
            return True
        if not window(metrics):
            return False
        if not profiled:
            return True
        kernels.start()
        ends[0] = metrics.step + steps
        return False

    changes = {"epochs": 1} if storing else {}
    config = configure(card, preset, stage, features="exact" if storing else features, **changes, **options)
    listener = StepListener(on_step)
    run = make_run(config, listener, compiled=compiled)
    result["features"] = next((line for line in listener.messages if line.startswith("features")), "")
    if compiled:
        lines = [line for line in listener.messages if "is not compiled" in line]
        result["checks"] = {"the compiled decoder is the decoder": not lines}
    result["schedule"], result["rows"] = run.total, row_numbers(run, COMPARED)
    with card.memory(result):
        run.run()
    result["losses"] = listener.losses[:COMPARED]
    if (graphs := run.train_step.graphs) is not None:
        result["recordings"] = graphs.graphs.recorded
    if not window.times:  # the rows ended before the warm-up did
        result["skipped"] = "too few rows"
        return
    samples, tokens, answers = (window.difference(name) for name in ("samples", "tokens", "supervised_tokens"))
    length = tokens / samples
    each = operations(run.train_step.model, length, answers / samples) + attention_operations(
        run.train_step.model, length
    )
    if features != "exact":
        each += looking_operations(run.train_step.model)
    rate = each * samples / window.seconds
    product = card.results.get("ceilings", {}).get("bf16_tflops")
    result |= quantiles(window.times) | {
        "samples_s": round(samples / window.seconds, 1),
        "tokens_s": round(tokens / window.seconds),
        "updates": len(window.times),
        "waiting_for_data": round(window.difference("data_seconds") / window.seconds, 4),
        "tflops": round(rate / 1e12, 4),
        "share_of_nominal": round(rate / card.peak, 4) if card.peak else None,
        "share_of_product": round(rate / 1e12 / product, 4) if product else None,
    }
    if kernels.events:
        result |= {"busy": round(kernels.busy, 3), "kernels": round(len(kernels.events) / steps)}
        result["longest"] = kernels.longest()


def attention_operations(model: VLM, length: float) -> float:
    """Those of attention itself for a row, causal, forward and backward; `bench.operations` leaves them out."""
    config = model.config
    return 3.5 * 2 * length**2 * config.hidden_size * config.num_hidden_layers


class Enough(Exception):
    """The plain loop has run for long enough."""


def plain(card: Card, results: Result) -> None:
    """The loop of the published shape on the same rows, for the small preset: fused and explicit attention."""
    measured = card.results.get("training", {})
    for stage in ("pretrain",) if card.tiny else ("pretrain", "sft"):
        for attention in ("fused",) if card.tiny else ("fused", "explicit"):
            results[f"{stage}, {attention}"] = result = {}
            reference = next((r for name, r in measured.items() if f"small {stage}" in name and "losses" in r), None)
            _measure_plain(card, result, stage, attention, reference)
            for name, other in measured.items():
                if f"small {stage}" in name and result.get("agrees") and "samples_s" in other:
                    result[f"ratio, {name}"] = round(other["samples_s"] / result["samples_s"], 2)


def _measure_plain(card: Card, result: Result, stage: str, attention: str, reference: Result | None) -> None:
    config = configure(card, "small", stage)
    batch = config.data.batch_size
    total = sum(1 for _ in (card.folder / f"{stage}.jsonl").open(encoding="utf-8"))
    rows = list(reference["rows"]) if reference else []
    rows += [row for row in range(total) if row not in set(rows)]
    seconds = 0.2 if card.tiny else 7.0 if attention == "fused" else 5.0
    times: list[float] = []
    losses: list[float] = []
    samples = [0]
    begun = [0.0]

    def on_step(count: int, loss: float, grad_norm: float) -> None:
        now = time.perf_counter()
        losses.append(loss)
        if len(losses) <= (1 if card.tiny else 10):
            begun[0] = now
            return
        times.append(now - begun[0] - sum(times))
        samples[0] += count
        if now - begun[0] > seconds:
            raise Enough

    with card.memory(result), contextlib.suppress(Enough):
        run_plain(
            PlainRun(
                folder=card.folder,
                stage=stage,
                row_numbers=rows * (1 if card.tiny else 8),
                batch_size=batch,
                length=config.data.max_length,
                lr=config.lr,
                total=reference["schedule"] if reference else 1000,
                attention=attention,
                workers=config.data.workers,
                device=str(card.device),
                bfloat16=card.cuda,
            ),
            on_step,
        )
    result |= quantiles(times) | {"samples_s": round(samples[0] / sum(times), 1), "updates": len(times)}
    result["losses"] = losses[:COMPARED]
    if reference:
        gaps = [abs(a - b) / abs(b) for a, b in zip(result["losses"], reference["losses"], strict=False)]
        result["loss_gap"], result["agrees"] = max(gaps), max(gaps) <= AGREEMENT
        result["checks"] = {f"{stage}, {attention}: both sides compute the same": result["agrees"]}
