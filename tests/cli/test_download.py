"""The installed `mmv download`: killed, stopped, twice at once, and a second time."""

import json
import random
import signal

import pytest

from tests.cli.harness import Running, in_forks, installed, run_mmv, tree
from tests.hub.server import Hub

LM = random.Random(5).randbytes(8 << 20)


@pytest.fixture
def hub(monkeypatch):
    for name in ("HF_TOKEN", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    with Hub({"models/jingyaogong/MiniMind2-V-PyTorch": {"lm_512.pth": LM}}, delay=0.008) as hub:
        yield hub


def command(hub, root):
    return ["download", "lm", "--hub", "hf", "--endpoint", hub.endpoint, "--dir", root]


def part_size(root):
    return sum(path.stat().st_size for path in root.rglob("*.part"))


@pytest.mark.long
def test_a_download_killed_at_any_moment_continues(hub, tmp_path):
    root = tmp_path / "root"
    for number, size in enumerate((1, 2 << 20, 5 << 20, 7 << 20)):
        running = Running(tmp_path / str(number), *command(hub, root)).until(lambda size=size: part_size(root) >= size)
        running.send(signal.SIGKILL).wait()
        assert not (root / "out" / "lm_512.pth").exists()
    hub.forget()
    done = installed(*command(hub, root), "--json").json
    assert (root / "out" / "lm_512.pth").read_bytes() == LM
    assert hub.sent < 2 << 20
    assert done["files"][0]["action"] == "fetched"
    assert done["transferred"] <= len(LM) - (7 << 20)


@pytest.mark.long
def test_killed_between_the_name_and_the_receipt(hub, tmp_path):
    hub.delay = 0
    assert installed(*command(hub, tmp_path)).code == 0
    receipt = tmp_path / "out" / ".mmv-download" / "receipt.json"
    content = json.loads(receipt.read_text())
    receipt.write_text(json.dumps(content | {"files": {}, "wants": {}}))
    hub.forget()
    assert installed(*command(hub, tmp_path), "--json").json["files"][0]["action"] == "kept"
    assert hub.sent == 0


def test_ctrl_c_says_that_the_same_command_resumes(hub, tmp_path):
    running = Running(tmp_path / "log", *command(hub, tmp_path / "root"))
    ended = running.until(lambda: part_size(tmp_path / "root") > 1 << 20).send(signal.SIGINT).wait()
    assert ended.code == 130
    assert "run the same command again to resume" in ended.err
    assert "Traceback" not in ended.err
    assert [name for name in tree(tmp_path / "root") if ".mmv-download" not in name] == []


def test_two_at_once_transfer_it_once(hub, tmp_path):
    root = tmp_path / "root"
    both = [Running(tmp_path / name, *command(hub, root), "--json") for name in ("one", "two")]
    ended = [running.wait() for running in both]
    assert [finished.code for finished in ended] == [0, 0]
    assert sorted(finished.json["files"][0]["action"] for finished in ended) == ["fetched", "kept"]
    assert "waiting for it" in ended[0].err + ended[1].err
    assert (root / "out" / "lm_512.pth").read_bytes() == LM
    assert hub.sent == len(LM)


def test_a_second_run_asks_nobody_and_imports_no_torch(hub, tmp_path):
    hub.delay = 0
    assert installed(*command(hub, tmp_path)).code == 0
    hub.forget()
    [(ended, modules)] = in_forks(" ".join(map(str, [*command(hub, tmp_path), "--json"]))).values()
    assert ended.json["transferred"] == 0
    assert hub.requests == []
    assert not {"torch", "numpy"} & modules


def test_progress_is_reported_in_lines_without_a_terminal(hub, tmp_path):
    hub.delay = 0
    done = installed(*command(hub, tmp_path))
    assert "MB/s" in done.err
    assert "\r" not in done.err
    assert done.out.startswith("fetched")


def test_hf_endpoint_is_heeded(hub, tmp_path, monkeypatch):
    hub.delay = 0
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    assert installed("download", "lm", "--dir", tmp_path).code == 0
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert installed("download", "lm", "--dir", tmp_path).code == 0
    assert "no hub can be reached" in installed("download", "lm", "--hub", "hf", "--dir", tmp_path / "new").err


@pytest.mark.parametrize(
    ("what", "files"),
    [
        (["--task", "pope"], "  data/test-*.parquet of lmms-lab-encoder/POPE into "),
        (["lm"], "  lm_512.pth of jingyaogong/MiniMind2-V-PyTorch into "),
    ],
)
def test_without_a_network_the_files_and_their_repository_are_named(tmp_path, monkeypatch, what, files):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    first, *below = run_mmv("download", *what, "--hub", "hf", "--dir", tmp_path).err.splitlines()[-2:]
    assert first.endswith("or copy these files yourself and run this command again to verify them:")
    assert below[0].startswith(files)
