"""Samples per second and peak memory of training: ours against a run shaped like the published scripts.

    python -m benchmarks.train              three rounds, some twenty minutes on two cores
    python -m benchmarks.train --quick      one round
    python -m benchmarks.train --preset 3v  today's generation, in its own lengths
    python -m benchmarks.train --profile    which operators ours spends its time in

Full size: the small preset under ViT-B/16, or 3v under SigLIP's ViT-B/32, each stage with its recipe, on rows made for
it (`material`). Ours is the real `Run`, in a first epoch, where every picture is looked at and remembered, and in a
later one, where all are remembered; the other side is `plain`, with attention written out (`explicit`) and as torch has
it (`fused`). Every measurement is a process of its own with the same number of threads; sides take turns; the first
update is a warm-up. All sides read the same rows in the same order from the same weights, and a run whose losses or
gradient norms differ by more than 1e-3 fails: the comparison would mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from benchmarks.pages import PAGE, write_block

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("pretrain", "sft")
SIDES = {
    "ours": "ours, first epoch",
    "later": "ours, later epochs",
    "fused": "plain, fused attention",
    "explicit": "plain, explicit attention",
}
OURS = ("ours", "later")
UPDATES = {
    "ours": 7,
    "later": 7,
    "fused": 2,
    "explicit": 2,
}  # timed ones; a plain sft update takes half a minute on two cores
SEED = 42
AGREEMENT = 1e-3  # relative, of losses and gradient norms


@dataclass
class Measured:
    """What one process found. Times are those of the updates behind the warm-up."""

    samples: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0  # of this process and its threads: what a busy machine disturbs least
    waited: float = 0.0  # of the seconds, for data
    operations: float = 0.0  # that the mathematics needs, attention's own products left out
    peak_bytes: int = 0
    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Samples per second."""
        return self.samples / self.seconds


class Stopwatch:
    """Listens to a run of either side."""

    def __init__(self) -> None:
        self.measured = Measured()
        self._warm_until: tuple[float, float, float] | None = None

    def update(self, samples: int, loss: float, grad_norm: float, waited: float = 0.0) -> None:
        """An update is done. The first one starts the watch."""
        now = time.perf_counter(), time.process_time(), waited
        self.measured.losses.append(loss)
        self.measured.grad_norms.append(grad_norm)
        if self._warm_until is None:
            self._warm_until = now
            return
        self.measured.samples += samples
        self.measured.seconds = now[0] - self._warm_until[0]
        self.measured.cpu_seconds = now[1] - self._warm_until[1]
        self.measured.waited = now[2] - self._warm_until[2]

    def stop(self) -> Measured:
        """The result, with the memory that the whole process ever had."""
        unit = 1 if sys.platform == "darwin" else 1024
        self.measured.peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        return self.measured


# --- in a process of its own ------------------------------------------------------------------------------------------


def stopwatch_listener(watch: Stopwatch):
    """A listener that hands the steps of the real run to a stopwatch."""
    from minimind_v.core.monitor.metrics import Listener

    class OursListener(Listener):
        samples, last = 0, None  # metrics

        def step(self, metrics, logged: bool) -> None:
            watch.update(metrics.samples - self.samples, metrics.loss, metrics.grad_norm, metrics.data_seconds)
            self.samples, self.last = metrics.samples, metrics

    return OursListener()


def recipe_of(stage: str, preset: str):
    """The published settings of a stage."""
    from minimind_v.core.config.presets import PRESETS
    from minimind_v.core.config.recipes import RECIPES

    return RECIPES[stage](PRESETS[preset])


def build_ours(folder: Path, stage: str, preset: str, steps: int, listener, features: Path):
    """The real training run, ready to start; `features` is where pictures are remembered."""
    from minimind_v.core.config.load import build_config
    from minimind_v.core.train.run import assemble

    options = {
        "preset": preset,
        "data.file": folder / f"{stage}.jsonl",
        "data.images": folder / f"{stage}.zip",
        "data.tokenizer": folder / "tokenizer",
        "vision_model": folder / "vision",
        "init": folder / "weights.safetensors",
        "out": folder / "out",
        "features": "exact",
        "features_dir": features,
        "max_steps": steps,
        "save_every": 0,
        "save_minutes": 0,
        "seed": SEED,
        "device": "cpu",
        "dtype": "float32",
    }
    return assemble(build_config(stage, options=options), listener, overwrite=True)


def prepare(folder: Path, tokenizer: Path, preset: str) -> dict:
    """Make the material, and remember all pictures; returns per stage the order of the rows, which all sides follow."""
    from benchmarks.material import make_material

    steps = 1 + UPDATES["ours"]
    rows = {stage: steps * recipe_of(stage, preset).data.batch_size for stage in STAGES}
    make_material(folder, tokenizer, rows, SEED, preset)
    order = {}
    for stage in STAGES:
        run = build_ours(folder, stage, preset, steps, stopwatch_listener(Stopwatch()), folder / "features")
        run.run()
        plan = run.plan
        locations = [location for number in range(steps) for batch in plan[number] for location in batch.locations]
        order[stage] = [int(location.rpartition(":")[2]) - 1 for location in locations]
    return order


def measure(folder: Path, stage: str, preset: str, side: str, rows: list[int], profile: bool) -> dict:
    """Train with one side, as many updates as UPDATES says and one to warm up."""
    from benchmarks.plain import PlainRun, run_plain

    watch, steps = Stopwatch(), 1 + UPDATES[side]
    if side in OURS:
        measure_ours(folder, stage, preset, side, 3 if profile else steps, watch, profile)
    else:
        recipe = recipe_of(stage, preset)
        batch = recipe.data.batch_size
        run_plain(
            PlainRun(
                folder=folder,
                stage=stage,
                row_numbers=rows[: steps * batch],
                batch_size=batch,
                length=recipe.data.max_length,
                lr=recipe.lr,
                total=1 + UPDATES["ours"],
                attention=side,
                workers=recipe.data.workers,
                preset=preset,
            ),
            watch.update,
        )
    return asdict(watch.stop())


def measure_ours(folder: Path, stage: str, preset: str, side: str, steps: int, watch: Stopwatch, profile: bool) -> None:
    """The real run, with nothing remembered yet or all of it."""
    from minimind_v.core.bench import operations

    listener = stopwatch_listener(watch)
    features = folder / "features" if side == "later" else Path(tempfile.mkdtemp(dir=folder))
    run = build_ours(folder, stage, preset, steps, listener, features)
    if profile:
        print_profile(stage, run.run)
    else:
        run.run()
    last, measured = listener.last, watch.measured
    each = operations(run.train_step.model, last.tokens / last.samples, last.supervised_tokens / last.samples)
    if side == "ours":
        each += looking_operations(run.train_step.model)
        shutil.rmtree(features)
    measured.operations = each * measured.samples


def looking_operations(model) -> float:
    """What the vision tower must compute for one picture, attention's own products left out."""
    assert model.vision_encoder is not None
    tower, patches = model.vision_encoder.tower, model.spec.tokens_per_image
    class_token = hasattr(tower.embeddings, "class_embedding")
    return sum(
        2 * weight.numel() * (patches + (class_token and weight.ndim == 2))  # the convolution sees no class token
        for name, weight in tower.named_parameters()
        if weight.ndim in (2, 4) and "position" not in name
    )


def measure_matmul() -> dict:
    """The rate of large products, in operations per second."""
    import torch

    from minimind_v.core.bench import matmul_rate

    return {"rate": matmul_rate(torch.device("cpu"), torch.float32)}


def print_profile(stage: str, work) -> None:
    """Run `work` and print where its time went, on stderr."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        work()
    table = profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=48)
    print(f"{stage}, ours, three updates:\n{table}", file=sys.stderr)


def do_job(job: dict, threads: int) -> None:
    """What a process of its own is started for; answers on stdout."""
    import torch

    torch.set_num_threads(threads)
    folder = Path(job["folder"])
    if job["do"] == "prepare":
        answer = prepare(folder, Path(job["tokenizer"]), job["preset"])
    elif job["do"] == "matmul":
        answer = measure_matmul()
    else:
        answer = measure(folder, job["stage"], job["preset"], job["do"], job["rows"], job["profile"])
    print(json.dumps(answer))


# --- in the process that was started ----------------------------------------------------------------------------------


def start_job(job: dict, threads: int) -> dict:
    """Do a job in a new process and return its answer."""
    command = [sys.executable, "-m", "benchmarks.train", "--threads", str(threads), "--job", json.dumps(job)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{job['do']}: the process failed with exit code {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def find_tokenizer(preset: str = "small") -> Path:
    """The published tokenizer where it is at hand, else the demo's, which gives somewhat longer rows."""
    suffix, folder = ("-3v", "3v") if preset == "3v" else ("", "")
    published = ROOT.parent / "shared" / f"tokenizer{suffix}"
    return published if published.is_dir() else ROOT / "minimind_v" / "core" / "demo" / "assets" / folder


def check_agreement(stage: str, sides: dict[str, list[Measured]]) -> float:
    """The largest relative difference of losses and gradient norms to ours. Stops where it is too large."""
    differences = [0.0]
    ours = sides["ours"][0]
    for measured in (run for runs in sides.values() for run in runs):
        for name in ("losses", "grad_norms"):
            pairs = zip(
                getattr(ours, name), getattr(measured, name), strict=False
            )  # sides do different numbers of updates
            differences += [abs(b - a) / abs(a) for a, b in pairs]
    if not all(difference <= AGREEMENT for difference in differences):  # nor is NaN
        raise SystemExit(
            f"{stage}: the sides do not compute the same (relative differences up to {max(differences):.1e}): "
            "nothing is compared"
        )
    return max(differences)


def summarise(runs: list[Measured], matmul: float) -> dict:
    """Medians over rounds, and the slowest and the fastest round; `matmul` is the machine's rate of products."""
    rates = [run.rate for run in runs]
    return {
        "samples_per_second": statistics.median(rates),
        "slowest": min(rates),
        "fastest": max(rates),
        "cpu_seconds_per_sample": statistics.median(run.cpu_seconds / run.samples for run in runs),
        "peak_bytes": statistics.median(run.peak_bytes for run in runs),
        "waiting": statistics.median(run.waited / run.seconds for run in runs),
        "matmul_share": statistics.median(run.operations / run.seconds for run in runs) / matmul,
    }


def report(results: dict[str, dict[str, dict]], agreement: dict[str, float]) -> str:
    """The table, and one line of ratios per stage and plain side."""
    lines = [f"{'stage':10}{'side':28}{'samples/s':>10}{'spread':>14}{'CPU s/sample':>14}{'peak memory':>13}"]
    ratios = []
    for stage, sides in results.items():
        for side, summary in sides.items():
            spread = f"{summary['slowest']:.3f}–{summary['fastest']:.3f}"
            lines.append(
                f"{stage:10}{SIDES[side]:28}{summary['samples_per_second']:10.3f}{spread:>14}"
                f"{summary['cpu_seconds_per_sample']:14.2f}{summary['peak_bytes'] / 1e9:10.2f} GB"
            )
        for mine in OURS:
            ours = sides[mine]
            ratios.append(
                f"{stage}: {SIDES[mine]}: {ours['matmul_share']:.0%} of the rate of products, "
                f"{ours['waiting']:.1%} of the time waiting for data"
            )
            ratios += [
                f"{stage}: {SIDES[mine]} against {SIDES[side]}: "
                f"{ours['samples_per_second'] / other['samples_per_second']:.2f} × the samples per second, "
                f"{ours['peak_bytes'] / other['peak_bytes']:.2f} × the memory"
                for side, other in sides.items()
                if side not in OURS
            ]
        ratios.append(f"{stage}: losses and gradient norms of all agree within {agreement[stage]:.0e}")
    return "\n".join([*lines, "", *ratios])


def page(results: dict[str, dict[str, dict]], threads: int, matmul: float) -> str:
    """The table of docs/performance.md."""
    plain = [side for side in SIDES if side not in OURS]
    lines = [
        f"{threads} threads, which multiply fp32 matrices at {matmul / 1e9:.0f} GFLOP/s; medians, in brackets the "
        "slowest and the fastest round.",
        "",
        "| | samples/s | peak memory | share of the products' rate | waiting for data "
        f"| {' | '.join(f'against {SIDES[side]}' for side in plain)} |",
        "|---|---|---|---|---|" + "---|" * len(plain),
    ]
    for stage, sides in results.items():
        for side, summary in sides.items():
            share, waiting = (
                (f"{summary['matmul_share']:.0%}", f"{summary['waiting']:.1%}") if side in OURS else ("", "")
            )
            ratios = [
                f"{summary['samples_per_second'] / sides[other]['samples_per_second']:.2f}× "
                f"({sides[other]['cpu_seconds_per_sample'] / summary['cpu_seconds_per_sample']:.2f}× by CPU time), "
                f"{summary['peak_bytes'] / sides[other]['peak_bytes']:.2f} of the memory"
                if side in OURS and other in sides
                else ""
                for other in plain
            ]
            lines.append(
                f"| {stage}, {SIDES[side]} | {summary['samples_per_second']:.2f} "
                f"({summary['slowest']:.2f} – {summary['fastest']:.2f}) | {summary['peak_bytes'] / 1e9:.2f} GB "
                f"| {share} | {waiting} | {' | '.join(ratios)} |"
            )
    return "\n".join(lines)


def compare(options: argparse.Namespace) -> dict:
    """Measure every side of every stage, round by round."""
    with tempfile.TemporaryDirectory() as name:
        common = {"folder": name, "preset": options.preset}
        tokenizer = str(find_tokenizer(options.preset))
        prepared = start_job(common | {"do": "prepare", "tokenizer": tokenizer}, options.threads)
        runs: dict[str, dict[str, list[Measured]]] = {
            stage: {side: [] for side in options.sides} for stage in options.stages
        }
        if options.profile:
            for stage in options.stages:
                job = common | {"do": "ours", "stage": stage, "rows": [], "profile": True}
                start_job(job, options.threads)
            return {}
        rates = []
        for number in range(options.rounds):
            rates.append(start_job({"do": "matmul", "folder": name}, options.threads)["rate"])
            for stage in options.stages:
                for side in options.sides:
                    job = common | {"do": side, "stage": stage, "rows": prepared[stage], "profile": False}
                    result = Measured(**start_job(job, options.threads))
                    runs[stage][side].append(result)
                    where = f"round {number + 1}/{options.rounds}  {stage:9}{SIDES[side]:27}"
                    print(f"{where}{result.rate:7.3f} samples/s  {result.peak_bytes / 1e9:6.2f} GB", file=sys.stderr)
                check_agreement(stage, runs[stage])
    agreement = {stage: check_agreement(stage, sides) for stage, sides in runs.items()}
    matmul = statistics.median(rates)
    results = {
        stage: {side: summarise(measurements, matmul) for side, measurements in sides.items()}
        for stage, sides in runs.items()
    }
    print(f"matrix products: {matmul / 1e9:.0f} GFLOP/s with {options.threads} threads")
    print(report(results, agreement))
    if options.docs:
        block = "training" if options.preset == "small" else f"training {options.preset}"
        write_block(PAGE, block, page(results, options.threads, matmul))
    measured = {
        stage: {side: [asdict(result) for result in measurements] for side, measurements in sides.items()}
        for stage, sides in runs.items()
    }
    return {"threads": options.threads, "matmul": matmul, "results": results, "agreement": agreement, "runs": measured}


def main() -> None:
    """Read the options and do what they ask."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="how often every side is measured [3]")
    parser.add_argument("--quick", action="store_true", help="one round")
    parser.add_argument("--preset", choices=("small", "3v"), default="small", help="the model that is trained [small]")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--against", nargs="+", choices=[side for side in SIDES if side not in OURS], help="[both]")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each side [all cores]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all that was measured")
    parser.add_argument("--docs", action="store_true", help="write the table into docs/performance.md")
    parser.add_argument("--profile", action="store_true", help="print ours' costliest operators; measure nothing")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        do_job(json.loads(options.job), options.threads)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the processes and the folder go with this one
    options.rounds = 1 if options.quick else options.rounds
    options.sides = [*OURS, *(options.against or [side for side in SIDES if side not in OURS])]
    comparison = compare(options)
    if options.json and comparison:
        options.json.write_text(json.dumps(comparison, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
