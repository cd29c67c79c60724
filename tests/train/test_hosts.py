"""Several machines, as far as network namespaces are such: each with an address of its own, joined by one wire.

Their name stands for the loopback, as on many a machine; a way to each other is found all the same.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from minimind_v.core.train import launch
from minimind_v.core.train.launch import way_to
from tests.cli.harness import MMV, PATIENCE, Running, read_rows, run_mmv, tiny_data

NAME = "pretrain_vlm_128"
LINE = {"epochs": 2, "save_every": 3}
PORT = 29400  # of a machine that has nothing else to do
FIRST = f"10.77.0.1:{PORT}"


def ip(*args: str) -> bool:
    try:
        return subprocess.run(["ip", *args], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Two namespaces, 10.77.0.1 and 10.77.0.2."""
    names = [f"mmv{os.getpid()}{side}" for side in "ab"]
    wires = [f"v{os.getpid()}{side}" for side in "ab"]
    try:
        created = all(ip("netns", "add", name) for name in names) and ip(
            "link", "add", wires[0], "netns", names[0], "type", "veth", "peer", "name", wires[1], "netns", names[1]
        )
        if not created:
            pytest.skip("no network namespaces can be made here")
        for number, (name, wire) in enumerate(zip(names, wires, strict=True), 1):
            assert ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", wire)
            assert ip("-n", name, "link", "set", wire, "up")
            assert ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            ip("netns", "delete", name)


class Host:
    """`mmv train` on one of them."""

    def __init__(self, folder: Path, host: str, rank: int, **changes: object) -> None:
        folder.mkdir(exist_ok=True)
        self.log = folder / f"{rank}.log"
        line = tiny_data().train(folder / "out", **LINE | changes)
        options = ["--nnodes", "2", "--node-rank", str(rank), "--rdzv-endpoint", FIRST]
        with self.log.open("w") as file:
            self.process = subprocess.Popen(
                ["ip", "netns", "exec", host, MMV, *line, *options],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )

    @property
    def output(self) -> str:
        return self.log.read_text()

    def until(self, text: str) -> None:
        end = time.monotonic() + PATIENCE
        while text not in self.output:
            assert self.process.poll() is None, self.output
            assert time.monotonic() < end, self.output
            time.sleep(0.05)

    def end(self) -> int:
        return self.process.wait(PATIENCE)


@pytest.fixture
def start(hosts, tmp_path):
    """Both machines at work; what is left of them at the end is killed."""
    started = []

    def both(name="run", **changes):
        pair = [Host(tmp_path / name, host, rank, **changes) for rank, host in enumerate(hosts)]
        started.extend(pair)
        return pair

    yield both
    for host in started:
        if host.process.poll() is None:
            os.killpg(host.process.pid, signal.SIGKILL)


@pytest.mark.long
def test_two_machines_learn_what_one_does(start, tmp_path):
    both = start(batch_size=4)
    assert [host.end() for host in both] == [0, 0], both[0].output + both[1].output
    assert both[0].output.startswith(f"2 machines connect at {FIRST}: waiting up to")
    assert "steps of 8 rows on 2 processes (cpu)" in both[0].output
    assert both[1].output.count("\n") == 1, both[1].output
    alone = run_mmv(*tiny_data().train(tmp_path / "alone", **LINE, batch_size=8))
    assert alone.code == 0, alone.err
    curves = [read_rows(tmp_path / out / NAME / "metrics.jsonl") for out in ("run/out", "alone")]
    for key in ("step", "samples", "supervised_tokens"):
        assert [record[key] for record in curves[0]] == [record[key] for record in curves[1]]
    for key in ("loss", "grad_norm"):
        assert [record[key] for record in curves[0]] == pytest.approx([record[key] for record in curves[1]], rel=1e-5)


@pytest.mark.long
def test_a_machine_that_is_gone_ends_the_other_and_a_stop_ends_both(start, tmp_path):
    first, second = start(epochs=10_000)
    first.until("step 3/")
    first.process.send_signal(signal.SIGTERM)
    assert [host.end() for host in (first, second)] == [143, 143], first.output + second.output
    assert "stopped by SIGTERM" in first.output
    assert "error" not in second.output
    first, second = start("other", epochs=10_000)
    first.until("step 3/")
    os.killpg(second.process.pid, signal.SIGKILL)
    gone = time.monotonic()
    assert first.end() == 1
    assert time.monotonic() - gone < 30
    last = first.output.splitlines()[-1]
    assert last == (
        "error: another machine has stopped or cannot be reached — add --resume to resume from the last state"
    )
    assert list((tmp_path / "other" / "out" / NAME / "states").glob("*"))


@pytest.mark.long
def test_waiting_in_vain_is_reported(tmp_path):
    run = Running(tmp_path, *tiny_data().train(tmp_path / "out"), "--nnodes", 2, "--node-rank", 1,
                  "--rdzv-endpoint", "127.0.0.1:9", prepare=meet_soon)  # fmt: skip
    ended = run.wait()
    assert ended.code == 1
    assert "2 machines did not connect at 127.0.0.1:9 — start the command on each" in ended.error


def meet_soon():
    launch.MEETING = 2


def test_the_way_to_oneself_is_the_loopback():
    way = way_to("127.0.0.1")
    if way is None:
        pytest.skip("the system does not tell")
    assert way.address == "127.0.0.1"
    assert way_to("no.such.host.") is None


@pytest.mark.parametrize(
    ("endpoint", "message"), [("10.77.0.1", "must have the form HOST:PORT"), ("no.such.host.:1", "no host")]
)
def test_an_endpoint_that_cannot_be_one(endpoint, message, tmp_path):
    ended = run_mmv(*tiny_data().train(tmp_path / "out"), "--nnodes", 2, "--node-rank", 1, "--rdzv-endpoint", endpoint)
    assert ended.code == 2
    assert message in ended.error
