"""Several machines, as far as network namespaces are such: each with an address of its own, joined by one wire.

Their name stands for the loopback, as on many a machine; a way to each other is found all the same.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator

import pytest

from minimind_v.core.train import launch
from minimind_v.core.train.launch import way_to
from tests.cli.harness import Running, read_rows, run_mmv, tiny_data
from tests.train.namespace import HOST, enter_host
from tests.train.test_distributed import workers_of

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


@pytest.fixture
def start(hosts, tmp_path, monkeypatch):
    """Both machines at work; what is left of them at the end is killed."""
    started: list[Running] = []

    def both(name="run", afresh=False, **changes):
        for rank, host in enumerate(hosts):
            monkeypatch.setenv(HOST, host)
            line = tiny_data().train(tmp_path / name / "out", **LINE | changes)
            options = ["--nnodes", "2", "--node-rank", rank, "--rdzv-endpoint", FIRST]
            started.append(Running(tmp_path / name / str(rank), *line, *options, prepare=enter_host, afresh=afresh))
        return started[-2:]

    yield both
    for host in started:
        for pid in (*workers_of(host), host.pid) if host.alive else ():
            os.kill(pid, signal.SIGKILL)


@pytest.mark.long
def test_two_machines_learn_what_one_does(start, tmp_path):
    """Started as users start them: torch, if it is not hushed before its import, warns of machines without a name."""
    both = start(afresh=True, batch_size=4)
    ended = [host.wait() for host in both]
    assert [host.code for host in ended] == [0, 0], ended
    assert ended[0].err.startswith(f"2 machines connect at {FIRST}: waiting up to")
    assert "steps of 8 rows on 2 processes (cpu)" in ended[0].err
    assert ended[1].err.count("\n") == 1, ended[1].err
    assert [host.out for host in ended] == ["", ""]
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
    first.until(lambda: "step 3/" in first.err).send(signal.SIGTERM)
    ended = [host.wait() for host in (first, second)]
    assert [host.code for host in ended] == [143, 143], ended
    assert "stopped by SIGTERM" in ended[0].err
    assert "error" not in ended[1].err
    first, second = start("other", epochs=10_000)
    first.until(lambda: "step 3/" in first.err)
    second.send(signal.SIGKILL)
    ended = first.wait()
    assert ended.code == 1
    assert ended.error == (
        "another machine has stopped or cannot be reached — add --resume to resume from the last state"
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
