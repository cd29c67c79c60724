"""Whether the card computes what the published numbers and the CPU say, and goes on where it stopped."""

from __future__ import annotations

import json
import os
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.gpu import curve
from benchmarks.gpu.card import Card, Kernels, Result, close
from benchmarks.gpu.runs import StepListener, configure, make_run
from minimind_v.core import cuda_graph
from minimind_v.core.cuda_graph import EAGER, WAITED
from minimind_v.core.model import ops
from minimind_v.core.model.kernels import cuda_moe
from minimind_v.core.model.kernels.accelerate import accelerate
from minimind_v.core.model.moe import MoEFeedForward
from minimind_v.core.monitor.metrics import StepMetrics
from minimind_v.core.train.batch_size import find_batch_size
from minimind_v.core.train.trial import Trial

ROOT = Path(__file__).resolve().parents[2]
CONFORMANCE = ROOT / "tests" / "conformance" / "test_published_numbers.py"


class Outcomes:
    """A pytest plugin that keeps what became of each test."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.failed: dict[str, str] = {}

    def pytest_runtest_logreport(self, report) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.counts[report.outcome] += 1
        if report.outcome == "failed":
            lines = [line for line in str(report.longrepr).splitlines() if line.startswith("E ")]
            self.failed[report.nodeid.rpartition("::")[2]] = " / ".join(lines[:3])[:300]


def conformance(card: Card, result: Result) -> None:
    """The published numbers in fp32 with TF32 off, then the losses in bf16."""
    import pytest

    if card.carried is None or not (card.carried / "conformance").is_dir():
        result["skipped"] = "the published numbers were not carried here (--pack)"
        return
    for precision, chosen in (("float32", "test_loss" if card.tiny else ""), ("bfloat16", "test_loss")):
        environment = {
            "MMV_CONFORMANCE": str(card.carried / "conformance"),
            "MMV_TOKENIZER": str(card.carried / "tokenizer"),
            "MMV_DEVICE": str(card.device),
            "MMV_DTYPE": precision,
        }
        outcomes = Outcomes()
        with mock.patch.dict(os.environ, environment):
            for name in [name for name in sys.modules if name.startswith("tests.conformance")]:
                del sys.modules[name]  # it reads the environment when it is imported
            pytest.main(["-q", "--no-header", "-p", "no:cacheprovider", "-k", chosen, str(CONFORMANCE)], [outcomes])
        result[precision] = dict(outcomes.counts) | {"failures": outcomes.failed}
        passed = not outcomes.failed and outcomes.counts["passed"] > 0
        result.setdefault("checks", {})[f"the published numbers, {precision}"] = passed


def loss_curve(card: Card, result: Result) -> None:
    """50 steps on given features: the card in fp32 against the CPU, and in bf16 against itself."""
    if card.reference is None:
        card.reference = curve.start(card.tiny)
    ours, gradient = curve.losses(card.device, "float32", card.tiny)
    # A CPU that stands in for a card would only imitate bf16, slowly.
    lower, bent = curve.losses(card.device, "bfloat16" if card.cuda else "float32", card.tiny)
    answer, _ = card.reference.communicate()
    expected = json.loads(answer.splitlines()[-1])
    result["steps"] = len(ours)
    result["losses"] = {"first": ours[0], "last": ours[-1]}
    gaps = [abs(a - b) / abs(b) for a, b in zip(ours, expected, strict=True)]
    halves = [abs(a - b) / abs(b) for a, b in zip(lower, ours, strict=True)]
    result["fp32_against_cpu"] = {"first": gaps[0], "to_10": max(gaps[:10]), "to_50": max(gaps)}
    result["bf16_against_fp32"] = max(halves)
    result["gradient_cosine"] = float(torch.nn.functional.cosine_similarity(bent, gradient, dim=0))
    result["checks"] = {
        "fp32 loss, step 1, within 1e-4 of the CPU's": gaps[0] <= 1e-4,
        "to step 10 within 1e-3": max(gaps[:10]) <= 1e-3,
        "to step 50 within 1e-2": max(gaps) <= 1e-2,
        "bf16 within 2 % of fp32": max(halves) <= 0.02,
        "bf16 gradient, cosine above 0.99": result["gradient_cosine"] > 0.99,
    }


def plans(card: Card, result: Result) -> None:
    """What attention costs at a length that was never seen, by kernel; and which kernel a run's attention takes."""
    backends = {"flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}
    if not card.cuda:
        backends = {"flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.MATH}
    rows, lengths = (1, range(30, 34)) if card.tiny else (16, range(230, 430, 10))
    kind = torch.bfloat16 if card.cuda else torch.float32

    def tensors(length: int) -> list[Tensor]:
        sizes = [(rows, heads, length, 64) for heads in (8, 2, 2)]
        return [torch.randn(size, device=card.device, dtype=kind, requires_grad=True) for size in sizes]

    for number, (name, backend) in enumerate(backends.items()):
        first, later = [], []
        try:
            for length in lengths:
                q, k, v = tensors(length + number)  # lengths of its own: nothing is ready for them

                def attention(q=q, k=k, v=v, backend=backend) -> None:
                    with sdpa_kernel([backend]):
                        out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
                    out.backward(q.detach())

                times = card.each(attention, 10)
                first.append(times[0])
                later.append(min(times[5:]))
        except RuntimeError as error:
            result[name] = {"not to be had": " ".join(str(error).split())[:200]}
            continue
        middle = len(first) // 2
        result[name] = {
            "first_ms": round(sorted(first[1:])[middle - 1] * 1e3, 3),
            "tenth_ms": round(sorted(later)[middle] * 1e3, 3),
        }
    kernels = Kernels(card)
    q, k, v = tensors(300)
    ops.attention(q, k, v, is_causal=True)
    kernels.start()
    ops.attention(q, k, v, is_causal=True).sum().backward()
    kernels.stop()
    result["kernels_of_a_run"] = kernels.longest(4)
    if card.cuda:
        names = " ".join(name for name, _, _ in kernels.events)
        result["checks"] = {
            "a run's attention is flash": "flash" in names,
            "and not cuDNN's": "cudnn" not in names.lower(),
        }


def waits(card: Card, result: Result) -> None:
    """How often an update waits for the card, where, and how many kernels it launches."""
    for preset, stage in (("small", "pretrain"), ("small", "sft"), ("moe", "sft")):
        if card.tiny and (preset, stage) == ("small", "sft"):
            continue
        caught: list[warnings.WarningMessage] = []
        kernels = Kernels(card)
        warm, steps = (2, 1) if card.tiny else (6, 3)

        def on_step(metrics, kernels=kernels, warm=warm, steps=steps) -> bool:
            if metrics.step == warm:
                _watch_waits(card, "warn")
            elif metrics.step == warm + steps:
                _watch_waits(card, "default")
                kernels.start()
            elif metrics.step == warm + 2 * steps:
                kernels.stop()
                return True
            return False

        try:
            # To record and to compare, a step or the encoding of images, is to wait.
            with _warnings_into(caught), mock.patch.object(cuda_graph, "EAGER", 0):
                make_run(configure(card, preset, stage), StepListener(on_step)).run()
        finally:
            _watch_waits(card, "default")
        locations = Counter(
            f"{Path(warning.filename).name}:{warning.lineno}" for warning in caught if WAITED in str(warning.message)
        )
        result[f"{preset} {stage}"] = {
            "waits": round(sum(locations.values()) / steps, 2),
            "where": {location: round(count / steps, 2) for location, count in locations.most_common(12)},
            "kernels": round(len(kernels.events) / steps),
            "busy": round(kernels.busy, 3),
        }
        result.setdefault("checks", {})[f"{preset} {stage}: a step waits for nothing"] = not locations


@contextmanager
def _warnings_into(caught: list[warnings.WarningMessage]) -> Iterator[None]:
    with warnings.catch_warnings(record=True) as recorded:
        warnings.simplefilter("always")
        yield
    caught += recorded


def _watch_waits(card: Card, mode: str) -> None:
    if card.cuda:
        torch.cuda.set_sync_debug_mode(mode)


def resume(card: Card, result: Result) -> None:
    """The same run again, stopped in its middle, and with features stored and read: are the bits equal?"""
    steps = 4 if card.tiny else 40  # of few shapes: most are recorded before the run is stopped, and again after it
    result["checks"] = checks = {}
    for strict in (False, True):
        mode = "deterministic" if strict else "default"

        def weights(name: str, strict=strict, mode=mode, **options) -> dict[str, Tensor]:
            options |= {"max_steps": steps, "deterministic": strict, "out": card.folder / f"{mode}-{name}"}
            config = configure(card, "small", "pretrain", **options)
            if name == "stopped":
                make_run(config, StepListener(partial(_stop_at, steps // 2)), saves=True).run()
                run = make_run(config, StepListener(), saves=True, overwrite=False, resume=True)
            else:
                run = make_run(config, StepListener(), saves=True)
            run.run()
            return {key: tensor.detach().cpu() for key, tensor in run.train_step.model.model.state_dict().items()}

        try:
            once = weights("once")
            others = {"stopped": weights("stopped")} if strict else {"again": weights("again")}
            if strict:
                changes = {"features": "exact", "features_dir": card.folder / "strict"}
                others |= {"features stored": weights("stored", **changes), "features read": weights("read", **changes)}
            for name, other in others.items():
                same = all(torch.equal(once[key], other[key]) for key in once)
                gap = max(float((once[key] - other[key]).abs().max()) for key in once)
                result[f"{mode}: {name}"] = {"equal": same, "largest_difference": gap}
                if strict or not card.cuda:
                    checks[f"{mode}: {name}: the same bits"] = same
        finally:
            torch.use_deterministic_algorithms(False)


def _stop_at(step: int, metrics: StepMetrics) -> bool:
    """As Ctrl-C does."""
    if metrics.step == step:
        os.kill(os.getpid(), signal.SIGINT)
    return False


def automatic_batch(card: Card, result: Result) -> None:
    """`--batch-size auto` where not all rows of an update fit, and then updates of the longest rows, recorded."""
    config = configure(card, "small", "pretrain")
    if not card.cuda:
        room = 10**9
        gauge = SimpleNamespace(held=lambda: 0, room=lambda: room, peak=lambda work: (work(), 10**8)[1])
        chosen, why = find_batch_size(config, card.device, gauge=gauge)  # type: ignore[arg-type]
    else:
        trial, index = Trial(config, card.device), torch.cuda.current_device()
        with card.memory(result):
            trial(config.data.batch_size)
        most, total = result["max_reserved"], torch.cuda.get_device_properties(index).total_memory
        del trial
        torch.cuda.empty_cache()
        try:
            torch.cuda.set_per_process_memory_fraction(0.7 * most / total, index)
            chosen, why = find_batch_size(config, card.device)
            trial = Trial(chosen, card.device)
            batch = trial.largest(chosen.data.batch_size)
            graphs = trial.train_step.graphs
            for _ in range(EAGER + 2):
                trial.train_step([batch], batch.supervised, len(batch), 0.0)
            result["checks"] = {
                "a smaller batch than the recipe's": chosen.data.batch_size < config.data.batch_size,
                "its largest rows are recorded": graphs is not None and graphs.graphs.recorded == 2,
            }
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, index)
            torch.cuda.empty_cache()
    result["chosen"], result["why"] = chosen.data.batch_size, why
    result.setdefault("checks", {})["the rows of an update stay"] = (
        chosen.data.batch_size * chosen.accumulate == config.data.batch_size * config.accumulate
    )


def experts(card: Card, result: Result) -> None:
    """Experts in fp32, by a loop, and by one product, stored together or not; one of them has no token."""
    config = card.text("moe")
    torch.manual_seed(0)
    layer = MoEFeedForward(config).to(card.device).train()
    for weight in layer.parameters():
        torch.nn.init.normal_(weight, std=0.06)
    with torch.no_grad():
        layer.gate.weight[-1] = 0
        layer.gate.weight[-1, 0] = -100.0  # the last expert is never chosen where the first feature is positive
    x = torch.randn(4, 32 if card.tiny else 500, config.hidden_size, device=card.device)
    x[..., 0] = 4.0
    choose = layer.gate.forward

    def choose_in_fp32(x: Tensor):
        """A tie may go the other way in bf16: what is compared is the work of the same experts."""
        with torch.autocast(card.device.type, enabled=False):
            return choose(x.float())

    layer.gate.forward = choose_in_fp32

    def once(half: bool = True) -> tuple[Tensor, dict[str, Tensor], int]:
        layer.zero_grad(set_to_none=True)
        given = x.clone().requires_grad_()
        caught: list[warnings.WarningMessage] = []
        with torch.autocast(card.device.type, torch.bfloat16, enabled=half), _warnings_into(caught):
            _watch_waits(card, "warn")
            out, aux = layer(given, None)
            loss = out.float().square().mean() + aux
            loss.backward()
            _watch_waits(card, "default")
        gradients = {name: item.grad for name, item in layer.named_parameters() if item.grad is not None}
        count = sum(WAITED in str(item.message) for item in caught)
        return out.detach(), gradients | {"x": given.grad}, count

    truth, truth_gradients, _ = once(half=False)
    result["checks"], outputs = {}, {}
    for kind in ("loop", "grouped, stored apart", "grouped"):
        if kind != "loop":
            accelerate(layer, torch.device("cuda"))
        if kind == "grouped, stored apart":
            layer.unstack()
        once()
        out, gradients, count = once()
        outputs[kind] = out
        moved = {name for name, gradient in truth_gradients.items() if float(gradient.abs().max()) > 0}
        worst = max(close(gradients[name], truth_gradients[name]) for name in moved)
        idle = [name for name in gradients if name.startswith(f"experts.{config.n_routed_experts - 1}.")]
        nothing = all(float(gradients[name].abs().max()) == 0 for name in idle)
        taken = card.seconds(once, 20)
        result[kind] = {
            "output": close(out, truth), "gradients": worst, "waits": count, "ms": round(taken * 1e3, 3),
            "idle expert": "no gradient" if not idle else "zero" if nothing else "not zero",
        }  # fmt: skip
        result["checks"][f"{kind}: output within 2 %"] = close(out, truth) < 0.02
        result["checks"][f"{kind}: gradients within 5 %"] = worst < 0.05
        result["checks"][f"{kind}: an expert without tokens learns nothing"] = nothing
    same = torch.equal(outputs["grouped"], outputs["grouped, stored apart"])
    result["checks"]["experts that are stored together: the bits of those apart"] = same
    if card.cuda and cuda_moe.is_grouped(torch.zeros(8, 8, device=card.device, dtype=torch.bfloat16), 8):
        result["checks"]["the grouped product waits for nothing"] = result["grouped"]["waits"] == 0
