"""`--batch-size auto`: the largest batch that fits, the same step, and no trace of the trial."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import cycle
from types import SimpleNamespace

import pytest
import torch
import yaml

from minimind_v.core.config.load import build_config, resolve
from minimind_v.core.errors import RunError
from minimind_v.core.formats.checkpoint import read_checkpoint
from minimind_v.core.train import batch_size as fitting
from minimind_v.core.train.batch_size import HEADROOM, Gauge, find_batch_size
from minimind_v.core.train.distributed import World
from minimind_v.core.train.trial import Trial
from tests.cli.harness import ASSETS, EYE, installed, read_rows, run_mmv, tiny_data
from tests.conftest import train_until_killed

NAME = "pretrain_vlm_128"
CPU = torch.device("cpu")
MIB = 2**20


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setattr(fitting, "gc", SimpleNamespace(collect=lambda: None))  # stand-ins leave nothing to collect
    options = {"preset": "demo", "vision_model": EYE, "tokenizer": ASSETS, "out": tmp_path, "max_length": 128}
    return build_config("pretrain", options=options | {"batch_size": 12, "accumulate": 2})


class Small(Gauge):
    """A machine on which rows take what is said, with so much room for them."""

    def __init__(self, room, row, model=50 * MIB):
        self.left, self.row, self.model, self.asked = room, row, model, []

    def room(self):
        return int(self.left / (1 - HEADROOM)) + 1

    def held(self):
        return self.model

    def peak(self, work):
        work()
        return self.model + (self.row * self.asked[-1] if self.asked else 0)


class NoModel:
    """Takes part in a trial without any work."""

    moments, length, device, row = 10 * MIB, 128, CPU, MIB

    def __init__(self, gauge):
        self.gauge = gauge

    def __call__(self, rows):
        self.gauge.asked.append(rows)


def fitted(config, gauge, world=None):
    divided, why = find_batch_size(config, CPU, world or World(), gauge, lambda *_: NoModel(gauge))
    assert divided.data.batch_size * divided.accumulate == config.data.batch_size * config.accumulate
    data = replace(config.data, batch_size=divided.data.batch_size)
    assert divided == replace(config, data=data, accumulate=divided.accumulate)
    return divided.data.batch_size, why


# --- how much --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows_that_fit", "chosen"), [(1000, 24), (24, 24), (23.9, 12), (11, 8), (7.9, 6), (2, 2), (1, 1), (0.5, 1)]
)
def test_the_largest_divisor_that_fits(config, rows_that_fit, chosen):
    gauge = Small(10 * MIB + rows_that_fit * 100 * MIB, 100 * MIB)
    size, why = fitted(config, gauge)
    assert size == chosen
    assert f"batch size {chosen}, accumulate {24 // chosen}, for the 24 rows of a step: " in why
    assert max(gauge.asked) <= max(1, rows_that_fit), "never more than a machine may have room for"


def test_two_rows_are_not_tried_where_one_fills_the_half(config):
    gauge = Small(150 * MIB, 100 * MIB)
    assert fitted(config, gauge)[0] == 1
    assert 2 not in gauge.asked


def test_processes_on_one_machine_share_its_memory(config):
    room = 10 * MIB + 24 * 100 * MIB
    assert fitted(config, Small(room, 100 * MIB))[0] == 24
    assert fitted(replace(config, gpus=3), Small(room, 100 * MIB))[0] == 6  # asked before any has started


def test_all_take_what_fits_on_the_smallest(config, monkeypatch):
    gathered = []
    monkeypatch.setattr(World, "gather", lambda world, numbers: gathered.append(numbers) or [numbers, [4.0]])
    monkeypatch.setattr(World, "gather_objects", lambda world, item: [item, "elsewhere"])
    size, why = fitted(config, Small(10**12, 100 * MIB), World(rank=0, size=2, placed=True))
    assert size == 4
    assert why.endswith("for the 24 rows of a step per process: another process has no memory for more")
    assert gathered[-1] == [24]


def test_a_gpu_is_tried_from_the_largest_down(config, monkeypatch):
    asked = []
    share = 1.0
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (7 * 2**30, 16 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2**30)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: share, raising=False)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2 * 2**30)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 2 * 2**30 + taken)
    monkeypatch.setattr(torch, "empty", lambda size, **more: asked.append(size))
    taken = 2**30

    class Full(NoModel):
        def __call__(self, rows):
            if rows > limit:
                raise next(errors)
            self.gauge.append(rows)

    errors = cycle(
        [
            torch.OutOfMemoryError("CUDA out of memory."),
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        ]
    )
    gone, limit = [], 9
    size, why = fitting._by_trial(Full(gone), [24, 12, 8, 6])
    assert (size, gone, len(asked)) == (8, [8], 3)
    assert asked[0] == 15 * MIB + int(0.08 * 8 * 2**30), "what a run holds besides, and some more"
    assert why == "measured with rows of 128 tokens on 8.0 GiB"
    limit, taken = 24, 3.1 * 2**30  # as much again, for recordings, is more than there is
    with pytest.raises(RunError, match="a single row"):
        fitting._by_trial(Full(gone), [24, 12])
    assert fitting._by_trial(Full(gone), [24, 1])[0] == 1, "which is launched kernel by kernel"
    limit, share = 0, 0.25
    with pytest.raises(RunError, match="a single row of 128 tokens does not fit into 4"):
        fitting._by_trial(Full(gone), [2, 1])
    errors = cycle([RuntimeError("CUDA error: an illegal memory access was encountered")])
    with pytest.raises(RuntimeError, match="illegal"):
        fitting._by_trial(Full(gone), [2, 1])


# --- measuring -------------------------------------------------------------------------------------------------------


def test_the_room_is_what_the_tightest_limit_leaves(tmp_path):
    def write(name, text):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    write("proc/meminfo", "MemTotal:  16000 kB\nMemAvailable:    9000 kB\nHugePages_Total:       0\n")
    assert Gauge(tmp_path).room() == 9000 * 1024
    write("proc/self/cgroup", "0::/user/job\n")
    write("sys/fs/cgroup/user/job/memory.max", "max\n")
    write("sys/fs/cgroup/user/job/memory.current", "4000\n")
    assert Gauge(tmp_path).room() == 9000 * 1024
    write("sys/fs/cgroup/user/memory.max", "10000\n")
    write("sys/fs/cgroup/user/memory.current", "8000\n")
    write("sys/fs/cgroup/user/memory.stat", "anon 5000\ninactive_file 3000\n")
    assert Gauge(tmp_path).room() == 5000, "a limit around ours; cached files can go"
    write("proc/self/cgroup", "3:cpu:/a\n4:memory:/docker/x\n")
    write("sys/fs/cgroup/memory/memory.limit_in_bytes", "7000\n")
    write("sys/fs/cgroup/memory/memory.usage_in_bytes", "6000\n")
    assert Gauge(tmp_path).room() == 1000, "the older kind, seen from inside a container"


@pytest.mark.long
def test_what_is_measured_is_enough_for_more_rows(config):
    """The real thing, with rows so short that many go through together; in a process that has nothing to spare."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
        two, four, more, row = fresh.submit(_taken, config).result()
    assert 0 < two <= four <= more
    assert more < (four + 5 * max((four - two) / 2, row)) / (1 - HEADROOM)


def _taken(config):
    """The bytes of 2, 4 and 9 rows, and what is said of one."""
    gauge, trial = Gauge(), Trial(config, CPU)
    held = gauge.held()
    return *(gauge.peak(partial(trial, rows)) - held for rows in (2, 4, 9)), trial.row


# --- no trace --------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_a_run_is_the_same_to_the_last_bit_as_with_the_size_given(tmp_path):
    small = _yaml(tmp_path, batch_size=4, accumulate=2)
    auto = run_mmv(*tiny_data().train(tmp_path / "auto", batch_size="auto", features="off"), "--config", small)
    given = run_mmv(*tiny_data().train(tmp_path / "given", batch_size=8, features="off"))
    assert (auto.code, given.code) == (0, 0), auto.err + given.err
    curves = [[(record["loss"], record["grad_norm"]) for record in read_rows(tmp_path / out / NAME / "metrics.jsonl")]
              for out in ("auto", "given")]  # fmt: skip
    assert curves[0] == curves[1]
    ours, theirs = (read_checkpoint(tmp_path / out / f"{NAME}.pth").tensors for out in ("auto", "given"))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    config = yaml.safe_load((tmp_path / "auto" / NAME / "config.yaml").read_text())
    assert (config["data"]["batch_size"], config["accumulate"]) == (8, 1)


def _yaml(folder, **keys):
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump({"data": {"batch_size": keys["batch_size"]}, "accumulate": keys["accumulate"]}))
    return path


def test_a_resumed_run_is_divided_as_before(tmp_path):
    """On a machine that has more room meanwhile: bits depend on how the rows of a step are divided."""
    line = tiny_data().train(tmp_path / "out", batch_size="auto", accumulate=2, epochs=2, save_every=1)
    train_until_killed(1, tiny_data().train(tmp_path / "out", batch_size=4, accumulate=8, epochs=2, save_every=1))
    ended = run_mmv(*line, "--resume")
    assert ended.code == 0, ended.err
    assert "resuming after step 1 of 4" in ended.err
    config = yaml.safe_load((tmp_path / "out" / NAME / "config.yaml").read_text())
    assert (config["data"]["batch_size"], config["accumulate"]) == (4, 8)


@pytest.mark.long
def test_two_processes_agree(tmp_path):
    ended = installed(*tiny_data().train(tmp_path / "out", batch_size="auto", accumulate=2, gpus=2, max_steps=2))
    assert ended.code == 0, ended.err
    assert "batch size 32, accumulate 1, for the 32 rows of a step per process: " in ended.err
    assert "on 2 processes (cpu)" in ended.err


# --- asking for it ---------------------------------------------------------------------------------------------------


def test_auto_stands_in_yaml_in_options_and_in_sets(tmp_path):
    file = _yaml(tmp_path, batch_size="auto", accumulate=3)
    asked = resolve("pretrain", file)
    assert asked.auto
    assert (asked.config.data.batch_size, asked.config.accumulate) == (16, 3), "the recipe's rows"
    assert not resolve("pretrain", file, {"batch_size": 4}).auto, "who comes later decides"
    later = resolve("pretrain", _yaml(tmp_path, batch_size=6, accumulate=3), {}, ["data.batch_size=auto"])
    assert later.auto
    assert later.config.data.batch_size == 6


def test_the_configuration_shows_what_was_chosen(tmp_path):
    ended = run_mmv(*tiny_data().train(tmp_path / "out", batch_size="auto"), "--print-config")
    assert ended.code == 0, ended.err
    assert "batch_size: 16 " in ended.out
    assert "--batch-size auto: batch size 16, accumulate 1, for the 16 rows" in ended.out
    assert yaml.safe_load(ended.out)["data"]["batch_size"] == 16
    wrong = run_mmv(*tiny_data().train(tmp_path / "out", batch_size="many"))
    assert wrong.code == 2
    assert "neither a number of rows nor `auto`" in wrong.err
