"""Several processes learn what one does: the same losses and weights, the same rows, one voice, one end."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import nn

from minimind_v.core.config.schema import DataConfig, RunConfig
from minimind_v.core.cuda_graph import EAGER
from minimind_v.core.data.batch import Batch
from minimind_v.core.data.feature_cache import FeatureCache
from minimind_v.core.data.loader import BatchPlan
from minimind_v.core.errors import UsageError
from minimind_v.core.formats.checkpoint import read_checkpoint
from minimind_v.core.model.kernels.accelerate import accelerate
from minimind_v.core.train.distributed import World, slurm_address
from minimind_v.core.train.launch import Launch
from minimind_v.core.train.step import TrainStep
from tests.cli.harness import (
    MMV,
    ROOT,
    Running,
    installed,
    read_rows,
    run_mmv,
    sessions,
    tiny_data,
    tokenizer,
    write_rows,
)
from tests.model.conftest import SPEC, tiny_vlm
from tests.train.late import make_batch, make_step, no_waits, record_steps, tensors_of
from tests.train.staying import STEP, UNTIL, stay

NAME = "pretrain_vlm_128"
ROWS = {"epochs": 2, "batch_size": 8, "save_every": 3}  # 40 rows: 10 steps, none of them short
HALF = ROWS | {"batch_size": 4, "gpus": 2}


def curve(out: Path, name: str = NAME) -> list[dict]:
    return read_rows(out / name / "metrics.jsonl")


def assert_close(out: Path, reference: Path, name: str = NAME, weights: float = 1e-5) -> None:
    ours, theirs = curve(out, name), curve(reference, name)
    assert len(ours) == len(theirs)
    for key in ("step", "samples", "tokens", "supervised_tokens", "token_accuracy", "lr", "epoch"):
        assert [entry[key] for entry in ours] == [entry[key] for entry in theirs], key
    for key in ("loss", "grad_norm"):
        assert [entry[key] for entry in ours] == pytest.approx([entry[key] for entry in theirs], rel=1e-5), key
    entry, other = (newest_state(folder, name) for folder in (out, reference))
    for key in other:
        if key.startswith("weight."):
            torch.testing.assert_close(entry[key], other[key], atol=weights, rtol=1e-5)


def newest_state(out: Path, name: str = NAME) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(max((out / name / "states").glob("*.safetensors")))


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("alone") / "out"
    ended = run_mmv(*tiny_data().train(out, **ROWS))
    assert ended.code == 0, ended.err
    return out


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Path:
    """Two processes with half the batch each."""
    out = tmp_path_factory.mktemp("pair") / "out"
    ended = installed(*tiny_data().train(out, **HALF), afresh=True)
    assert ended.code == 0, ended.err
    assert "10 steps of 8 rows on 2 processes (cpu)" in ended.err
    assert ended.err.count("done after 10 steps") == 1
    assert ended.err.count("step 10/10") == 1, "one voice"
    assert "Warning" not in ended.err
    return out


@pytest.mark.long
def test_two_processes_learn_what_one_does(pair, alone):
    assert_close(pair, alone)


@pytest.mark.long
@pytest.mark.parametrize("experts", [True, False])
def test_fifty_steps_of_fine_tuning_with_uneven_ends_and_accumulation(tmp_path, experts):
    """Rows that no number here divides: processes without a row, text-only steps, experts that nobody chose."""
    options = ("--set", f"model.use_moe={str(experts).lower()}", "--set", "model.num_hidden_layers=2")
    name = "sft_vlm_128_moe" if experts else "sft_vlm_128"
    lines = [json.loads(line) for line in tiny_data().data("sft").read_text().splitlines()][:31]
    text = {"conversations": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "red"}]}
    lines[3:3] = [text] * (3 if experts else 9)
    data = write_rows(tmp_path / "rows.jsonl", lines)
    common = {
        "data": data,
        "images": tiny_data().images("sft"),
        "init": "none",
        "epochs": 9,
        "max_steps": 50,
        "lr": 1e-3,
    }
    single = run_mmv(*tiny_data().train(tmp_path / "one", "sft", batch_size=6, **common), *options)
    assert single.code == 0, single.err
    two = installed(*tiny_data().train(tmp_path / "two", "sft", batch_size=1, accumulate=3, gpus=2, **common), *options)
    assert two.code == 0, two.err
    assert len(curve(tmp_path / "two", name)) == 50
    assert_close(tmp_path / "two", tmp_path / "one", name, weights=2e-4)


@pytest.mark.parametrize("count", [1, 7, 8, 9, 40])
@pytest.mark.parametrize(("batch_size", "accumulate", "processes"), [(8, 1, 1), (4, 1, 2), (2, 2, 2), (3, 1, 3)])
def test_no_row_is_lost_or_repeated(tmp_path, count, batch_size, accumulate, processes):
    from minimind_v.core.data.dataset import RowDataset
    from minimind_v.core.data.prompt import PromptEncoder
    from minimind_v.core.rows.stores import open_rows

    text = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = open_rows(write_rows(tmp_path / "rows.jsonl", [{"conversations": text}] * count), None)
    dataset = RowDataset(rows, PromptEncoder(tokenizer(), 4), 8, 100)
    rows_per_step = batch_size * accumulate * processes

    def plan(batch_size, processes, rank):
        return BatchPlan(dataset, batch_size, 0, 5, 2, rows_per_step=rows_per_step, processes=processes, rank=rank)

    whole = plan(rows_per_step, 1, 0)
    plans = [plan(batch_size, processes, rank) for rank in range(processes)]
    for number in range(len(whole)):
        batches = [steps[number] for steps in plans]
        assert len({len(mine) for mine in batches}) == 1, "all take part equally often"
        assert all(len(batch) <= batch_size for mine in batches for batch in mine)
        locations = [location for mine in batches for batch in mine for location in batch.locations]
        assert sorted(locations) == sorted(location for batch in whole[number] for location in batch.locations)


# --- another number of processes --------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize(
    ("changes", "steps"),
    [({"batch_size": 4, "gpus": 1}, 10), ({"batch_size": 8, "gpus": 1}, 10), ({"batch_size": 4, "gpus": 3}, 10)],
    ids=["one, as it was called", "one, with the whole batch", "three"],
)
def test_a_run_of_two_processes_resumes_with_another_number(tmp_path, pair, alone, changes, steps):
    out = shutil.copytree(pair, tmp_path / "out")
    (out / NAME / "states" / max(path.name for path in (out / NAME / "states").iterdir())).unlink()
    run = installed if changes["gpus"] > 1 else run_mmv
    ended = run(*tiny_data().train(out, **ROWS | changes), "--resume")
    assert ended.code == 0, ended.err
    assert "resuming after step 9 of 10" in ended.err
    assert_close(out, alone)


@pytest.mark.long
def test_three_processes_resume_with_the_same_bits(tmp_path):
    """Three numbers have no sum of their own: they are always added in the same order."""
    whole = tmp_path / "whole"
    ended = installed(*tiny_data().train(whole, **ROWS | {"batch_size": 4, "gpus": 3}))
    assert ended.code == 0, ended.err
    out = shutil.copytree(whole, tmp_path / "out")
    (out / NAME / "states" / max(path.name for path in (out / NAME / "states").iterdir())).unlink()
    ended = installed(*tiny_data().train(out, **ROWS | {"batch_size": 4, "gpus": 3}), "--resume")
    assert ended.code == 0, ended.err
    assert "resuming after step" in ended.err
    entry, other = newest_state(out), newest_state(whole)
    assert all(torch.equal(entry[key], other[key]) for key in other)


@pytest.mark.long
def test_other_rows_per_update_are_another_run(tmp_path, pair):
    out = shutil.copytree(pair, tmp_path / "out")
    ended = run_mmv(*tiny_data().train(out, **ROWS | {"batch_size": 5}), "--resume")
    assert ended.code == 2
    assert "rows_per_update: 8 in the interrupted run, 5 now" in ended.err
    assert "accept it with --allow rows_per_update, start over" in ended.error


# --- killed -----------------------------------------------------------------------------------------------------------


def workers_of(run: Running) -> list[int]:
    """The training processes that a launcher has started, in the order of their ranks."""
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(run.pid)], capture_output=True, text=True, check=False)
    return sorted(int(pid) for pid in listed.stdout.split())


def start(
    folder: Path, out: Path, *options: object, prepare: Callable[[], None] | None = None, **changes: object
) -> Running:
    return Running(folder, *tiny_data().train(out, **HALF | changes), *options, prepare=prepare)


@pytest.mark.long
def test_a_pair_that_is_stopped_and_killed_ends_as_if_it_had_not(tmp_path, pair):
    """Every process on one thread, as in `pair`: what is compared bit for bit."""
    out, rng = tmp_path / "out", random.Random(0)
    left: list[int] = []
    for number, sent in enumerate((signal.SIGTERM, signal.SIGKILL)):
        run = start(tmp_path / f"run{number}", out, "--resume")
        run.until(lambda run=run: not run.alive or run.err.count("\nstep ") >= 2)  # a busy machine may let it end
        time.sleep(rng.uniform(0, 0.2))
        left += workers_of(run)
        with contextlib.suppress(ProcessLookupError):
            run.send(sent)
        code = run.wait().code
        assert code in (0, -sent if sent == signal.SIGKILL else 128 + sent)
        if code == 143:
            assert "death signal" not in run.err, "torch's own words"
            assert run.err.splitlines()[-1].startswith(f"resume with: {MMV} train pretrain ")
    end = time.monotonic() + 20
    while alive := [pid for pid, _ in sessions() if pid in left]:
        assert time.monotonic() < end, f"a killed launcher left {alive}"
        time.sleep(0.1)
    ended = start(tmp_path / "last", out, "--resume").wait()
    assert ended.code == 0, ended.err
    exact = ("step", "loss", "token_accuracy", "grad_norm", "samples", "supervised_tokens")
    assert [[record[key] for key in exact] for record in curve(out)] == [
        [record[key] for key in exact] for record in curve(pair)
    ]
    ours, theirs = (read_checkpoint(folder / f"{NAME}.pth").tensors for folder in (out, pair))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.long
def test_who_starts_when_the_launcher_is_gone_already_ends(tmp_path):
    """Killed at once, a launcher is no parent any more when its processes look for it."""
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    left = {"MMV_ERRORS": str(tmp_path), "MMV_LAUNCHER": gone.stdout.decode().strip()}
    alone = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    command = [sys.executable, "-m", "minimind_v", *tiny_data().train(tmp_path / "out", **HALF)]
    assert subprocess.run(command, cwd=ROOT, env=os.environ | left | alone, timeout=100, check=False).returncode == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.long
@pytest.mark.parametrize("victim", [0, 1])
def test_one_that_is_killed_ends_all_within_seconds(tmp_path, victim):
    """Long before gloo would give up: after half an hour."""
    run = start(tmp_path / "run", tmp_path / "out", epochs=10_000)
    run.until(lambda: "step 3/" in run.err)
    os.kill(workers_of(run)[victim], signal.SIGKILL)
    ended = run.wait()
    assert ended.code == 1
    assert "was ended by SIGKILL, often because memory ran out — add --resume" in ended.error


@pytest.mark.long
def test_after_one_process_is_killed_all_resume(tmp_path, pair, monkeypatch):
    """Those that start again are no forks, and so do not stay in a step."""
    out = tmp_path / "out"
    monkeypatch.setenv(STEP, "4")
    monkeypatch.setenv(UNTIL, str(tmp_path / "never"))
    run = start(tmp_path / "run", out, "--max-restarts", "1", prepare=stay, save_every=1)
    run.until(lambda: "step 4/" in run.err)
    os.kill(workers_of(run)[0], signal.SIGKILL)
    ended = run.wait()
    assert ended.code == 0, ended.err
    assert "a process was lost: all processes have restarted" in ended.err
    assert "resuming after step" in ended.err
    assert [record["loss"] for record in curve(out)] == [record["loss"] for record in curve(pair)]


# --- one error --------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_an_existing_run_is_refused_once_with_the_code_of_a_usage_error(pair):
    """Another try would resume it."""
    ended = installed(*tiny_data().train(pair, **HALF), "--max-restarts", 3)
    assert ended.code == 2
    assert "exists from an earlier run" in ended.error
    assert "restarted" not in ended.err


@pytest.mark.long
def test_a_row_that_breaks_on_one_process_is_counted_by_all(tmp_path):
    lines = tiny_data().data("pretrain").read_text().splitlines()
    data = write_rows(tmp_path / "rows.jsonl", ["{", *lines, "{"])
    images = tiny_data().images("pretrain")
    few = installed(
        *tiny_data().train(tmp_path / "few", **HALF | {"epochs": 1}, data=data, images=images),
        "--set", "data.bad_rows=0.5",
    )  # fmt: skip
    assert few.code == 0, few.err
    assert "2 broken rows skipped" in few.err
    assert curve(tmp_path / "few")[-1]["samples"] == 40
    many = installed(*tiny_data().train(tmp_path / "many", **HALF, data=data, images=images))
    assert many.code == 1
    assert "of 42 rows are broken, more than 1%" in many.error


# --- finding one's place ----------------------------------------------------------------------------------------------


def test_a_process_of_torchrun_reads_its_rank():
    world = World.find({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "TORCHELASTIC_RESTART_COUNT": "2"})
    assert (world.rank, world.size, world.local_rank, world.restarts, world.leads) == (3, 8, 1, 2, False)
    assert World.find({"RANK": "0", "WORLD_SIZE": "1"}).placed, "one alone, but launched: it launches nothing"


def test_a_process_of_slurm_reads_its_rank():
    slurm = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "70123"}
    world = World.find(slurm)
    assert (world.rank, world.size, world.local_rank, world.leads) == (5, 8, 1, False)
    assert World.find({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}) == World()
    for hosts, first in (("gpu[07-09,12],login", "gpu07"), ("node3", "node3"), ("a-1,a-2", "a-1"), ("n[1,3]", "n1")):
        assert slurm_address(slurm | {"SLURM_STEP_NODELIST": hosts}) == {
            "MASTER_ADDR": first,
            "MASTER_PORT": "30123",
        }
    with pytest.raises(UsageError, match="neither MASTER_ADDR nor"):
        slurm_address(slurm)
    with pytest.raises(UsageError, match="cannot be read"):
        World.find({"RANK": "x", "WORLD_SIZE": "2"})


def list_threads_at_the_end() -> None:
    tasks = Path("/proc/self/task")
    atexit.register(lambda: print(*{(task / "comm").read_text().strip() for task in tasks.iterdir()}, flush=True))


@pytest.mark.long
def test_started_by_torchrun_or_slurm(tmp_path, alone, monkeypatch):
    """Two processes with nothing in common but their environment; nothing of their contact is left when they are done.

    A thread of gloo that frees a tensor while the interpreter shuts down ends its process by SIGABRT.
    """
    port = str(random.Random(os.getpid()).randrange(20000, 40000))
    environments_of = {
        "torchrun": [{"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)} for rank in range(2)],
        "slurm": [{"SLURM_PROCID": str(rank), "SLURM_NTASKS": "2", "SLURM_LOCALID": str(rank)} for rank in range(2)],
    }
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", port)
    for name, environments in environments_of.items():
        command, started = tiny_data().train(tmp_path / name, **HALF | {"gpus": None}), []
        for rank, environment in enumerate(environments):
            with mock.patch.dict(os.environ, environment):
                started.append(Running(tmp_path / f"{name}{rank}", *command, prepare=list_threads_at_the_end))
        ended = [run.wait() for run in started]
        assert [process.code for process in ended] == [0, 0], [process.err for process in ended]
        assert all("python" in process.out or "mmv" in process.out for process in ended)
        assert not any("gloo" in process.out for process in ended), ended
        assert "done after" not in ended[1].err
        assert_close(tmp_path / name, alone)


@pytest.mark.long
def test_two_machines(tmp_path, alone):
    """Two launchers that meet at an address, each with a process of its own."""
    port = random.Random(os.getpid() + 1).randrange(20000, 40000)
    options = ("--nnodes", 2, "--rdzv-endpoint", f"127.0.0.1:{port}")
    runs = [
        Running(tmp_path / f"machine{rank}", *tiny_data().train(tmp_path / "out", **HALF | {"gpus": 1}), *options,
                "--node-rank", rank, afresh=True)
        for rank in range(2)
    ]  # fmt: skip
    ended = [run.wait() for run in runs]
    assert [process.code for process in ended] == [0, 0], [process.err for process in ended]
    assert_close(tmp_path / "out", alone)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"processes": 2, "nnodes": 0}, "--nnodes must be at least 1"),
        ({"processes": 2, "nnodes": 2}, "--nnodes 2 needs --rdzv-endpoint HOST:PORT"),
        ({"processes": 2, "rdzv_endpoint": "a:1"}, "give their number with --nnodes"),
        ({"processes": 2, "nnodes": 2, "node_rank": 2, "rdzv_endpoint": "a:1"}, "must be at most 1 with 2 machines"),
        ({"processes": 2, "max_restarts": -1}, "--max-restarts must be at least 0"),
    ],
)
def test_what_cannot_be_launched(given, message):
    with pytest.raises(UsageError, match=message):
        Launch(**given)


def test_more_processes_than_gpus(monkeypatch):
    from minimind_v.core.device import pick_device

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UsageError, match="process 3 on this machine, which has 2 GPUs"):
        pick_device("auto", 2)


def test_a_gpu_that_is_named_is_the_one_that_is_asked(monkeypatch):
    from minimind_v.core import device

    chosen, ones = [], torch.ones
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch, "ones", lambda count, device: ones(count))  # there is no such GPU here
    assert device.pick_device("cuda:1") == torch.device("cuda:1")
    assert chosen == [torch.device("cuda:1")]
    device.pick_device("cpu")
    assert len(chosen) == 1


@pytest.mark.parametrize("native", [False, True])
def test_bf16_that_a_gpu_only_imitates_is_not_taken(native, monkeypatch):
    from minimind_v.core.device import has_bf16

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: native or including_emulation)
    assert has_bf16(torch.device("cuda:0")) is native
    assert not has_bf16(torch.device("cpu"))


@pytest.fixture
def meeting(tmp_path):
    """A process that has met itself."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    yield World(size=2)
    torch.distributed.destroy_process_group()


def test_the_tower_that_each_process_has_read_is_not_sent_again(meeting, monkeypatch):
    model, sent = tiny_vlm(with_tower=True), []
    monkeypatch.setattr(torch.distributed, "broadcast", lambda tensor, src: sent.append(tensor.data_ptr()))
    meeting.share_weights(model)
    names = {tensor.data_ptr(): name for name, tensor in model.named_parameters()}
    assert {names[address] for address in sent if address in names} == {
        name for name in names.values() if not name.startswith("vision_encoder.")
    }


def test_recorded_steps_that_are_exchanged_ask_a_gpu_nothing(meeting, tmp_path):
    """Which weights were reached is read in the first step with images, and in the first without."""
    alone, train_step, warnings = make_step(tmp_path), make_step(tmp_path), []
    tapes = record_steps(train_step, warnings.append, meeting)
    torch.manual_seed(5)
    for step in range(2 * EAGER + 8):
        images = 2 * (1 - step % 2)
        batch = make_batch([32 - step % 5, 20], [images, 0], [3, 2])
        recorded_or_compared = step // 2 in (EAGER - 1, EAGER)
        with nullcontext() if step < 2 or recorded_or_compared else no_waits():
            pending = train_step([batch], 5, 2, 1e-3, images)
        assert pending.result.loss == pytest.approx(alone([batch], 5, 2, 1e-3).result.loss, rel=1e-5)
    assert tapes.made == 4
    assert tapes.replayed == 16
    assert not warnings
    weights = tensors_of(alone)
    for name, tensor in tensors_of(train_step).items():
        torch.testing.assert_close(tensor, weights[name], atol=5e-6, rtol=1e-5)


class Unused(nn.Module):
    """A layer with a second layer that it never uses, as an extension may add it."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer, self.spare = layer, nn.Linear(2, 2)

    def forward(self, x):
        return self.layer(x)


@pytest.mark.parametrize("kind", ["dense", "experts", "an unused layer"])
def test_a_step_moves_the_weights_that_it_moves_in_a_process_alone(kind, meeting, tmp_path):
    """AdamW would move a weight whose gradient is 0: the projector without an image, a layer that nothing uses."""
    none = tmp_path / "none"  # no input is read
    labels = torch.arange(12).view(2, 6)
    mask = torch.ones_like(labels, dtype=torch.bool)
    image = Batch(labels, mask, labels, mask & (labels % 6 < 4), image_features=torch.ones(2, 4, SPEC.width))
    text = Batch(labels, mask, labels, ~mask)
    moved = []
    for world in (World(), meeting):
        model = tiny_vlm(use_moe=kind == "experts")
        if kind == "an unused layer":
            model.model.layers[0].mlp.down_proj = Unused(model.model.layers[0].mlp.down_proj)
        config = RunConfig("sft", model.config, DataConfig(none, none, none), none, none, dtype="float32")
        train_step, steps = TrainStep(config, accelerate(model, torch.device("cpu")), FeatureCache(), world), []
        for batch in (image, text, text, image):
            before = {name: weight.clone() for name, weight in model.named_parameters()}
            train_step([batch], 10, 2, 1e-2, images=batch.images)
            steps.append({name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])})
        moved.append((steps, {name: weight.detach() for name, weight in model.named_parameters()}))
    (alone, weights), (together, others) = moved
    assert together == alone
    assert not any("spare" in name for step in alone for name in step)
    assert [any("vision_proj" in name for name in step) for step in alone] == [True, False, False, True]
    assert all(torch.equal(weights[name], others[name]) for name in weights), "to the last bit"
