"""Runs `mmv` in the three ways that its tests need, over tiny data of the demo's world.

`run_mmv` runs it inside the test's own process: quick, for all that needs no process of its own. `installed` is the
command as a user has it, from start to end. `Running` is that command while it runs: to be watched and sent signals.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import IO, Any
from unittest import mock

import torch

from minimind_v.cli.app import app
from minimind_v.cli.terminal import run_app
from minimind_v.core.data.tokenizer import Tokenizer
from minimind_v.core.demo import world
from minimind_v.core.demo.dataset import write_pretrain, write_sft
from minimind_v.core.files import as_json
from minimind_v.core.formats.checkpoint import export_tensors, load_into, read_checkpoint, write_checkpoint
from minimind_v.core.formats.vision_tower import load_encoder
from minimind_v.core.model.vlm import VLM
from tests import fork_server

MMV, ROOT = fork_server.MMV, fork_server.ROOT
ASSETS = Path(str(files("minimind_v.core.demo") / "assets"))
BASE = ASSETS / "lm_128.safetensors"
EYE = ASSETS / "vision"
PATIENCE = 120  # seconds that a machine full of other work may need for what takes one
ROWS = 40
SIGHT = ("--vision-model", EYE, "--tokenizer", ASSETS)


@dataclass
class Ended:
    """How a command ended, and what it said."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The line of an error, with its indented items; fails where it is not the last and only one."""
        lines = self.err.replace("\0", "").splitlines()  # torch's handler of a bus error writes one behind its line
        assert "Traceback" not in self.err
        assert "this is a bug in mmv; --debug shows the traceback" not in self.err
        (begin,) = (number for number, line in enumerate(lines) if line.startswith("error: "))
        message, *items = lines[begin:]
        assert all(item.startswith("  ") for item in items), self.err
        return " ".join(filter(None, [message.removeprefix("error: "), "; ".join(map(str.strip, items))]))

    @property
    def json(self) -> Any:
        """The one JSON object on stdout; fails where anything else is there."""
        assert self.code == 0, self.err
        assert self.out.count("\n") == 1, self.out
        return json.loads(self.out)


def run_mmv(*args: object, stdin: str | bytes = b"") -> Ended:
    """Run `mmv` in this process, with `stdin` piped in."""
    data = stdin.encode() if isinstance(stdin, str) else stdin
    out, err, code, heeds = io.StringIO(), io.StringIO(), 0, signal.getsignal(signal.SIGTERM)
    with (
        mock.patch.object(sys, "argv", ["mmv", *map(str, args)]),
        mock.patch.object(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8")),
        mock.patch.dict(os.environ),  # what a command sets there is for itself
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            run_app(app)
        except SystemExit as end:
            code = int(end.code or 0)
    assert signal.getsignal(signal.SIGTERM) is heeds, "a process that is forked later would not end by this signal"
    return Ended(code, out.getvalue(), err.getvalue())


def installed(
    *args: object, stdin: str = "", cwd: Path | None = None, afresh: bool = False, **environment: str
) -> Ended:
    """Run the installed command to its end; other keywords add to its environment."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        read, write = os.pipe()
        files = [read, out.fileno(), err.fileno()]
        process = fork_server.start([*map(str, args)], files, os.environ | environment, cwd, afresh=afresh)
        os.close(read)
        with contextlib.suppress(BrokenPipeError), open(write, "w", encoding="utf-8") as pipe:
            pipe.write(stdin)
        try:
            code = process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        return Ended(code, *(_text(file) for file in (out, err)))


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode().replace("\r\n", "\n")


_IN_FORKS = """
import json, os, sys, tempfile
from minimind_v.cli.app import main
outcomes = []
for args in json.load(sys.stdin):
    out, err, modules = files = [tempfile.TemporaryFile("w+", encoding="utf-8") for _ in range(3)]
    pid = os.fork()
    if not pid:
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        sys.argv = ["mmv", *args]
        try:
            sys.exit(main())
        finally:
            json.dump(list(sys.modules), modules)
            modules.flush()
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    for file in files:
        file.seek(0)
    outcomes.append((code, out.read(), err.read(), json.load(modules)))
print(json.dumps(outcomes))
"""


def in_forks(*lines: str, cwd: Path | None = None) -> dict[str, tuple[Ended, set[str]]]:
    """Run each line in a fork of a fresh process that has imported the command line only.

    Returns by line how it ended, and the modules that were imported then.
    """
    command, words = [sys.executable, "-c", _IN_FORKS], json.dumps([line.split() for line in lines])
    done = subprocess.run(command, input=words, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    outcomes = [(Ended(code, out, err), set(modules)) for code, out, err, modules in json.loads(done.stdout)]
    return dict(zip(lines, outcomes, strict=True))


# --- processes --------------------------------------------------------------------------------------------------------


class Running:
    """The installed `mmv`, leader of a session of its own."""

    def __init__(
        self,
        folder: Path,
        *args: object,
        terminal: str | None = None,
        prepare: Callable[[], None] | None = None,
        afresh: bool = False,
    ) -> None:
        """`folder` gets the files `stdout` and `stderr`, unless `terminal` is the name of one.

        `prepare` and `afresh` are those of `fork_server.start`.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        names = [terminal or folder / name for name in ("stdin", "stdout", "stderr")]
        files = [os.open(name, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOCTTY) for name in names]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        if terminal:  # its own size counts, not what a worker of pytest exports
            environment = {name: value for name, value in environment.items() if name not in ("COLUMNS", "LINES")}
        self.process = fork_server.start([*map(str, args)], files, environment, None, bool(terminal), prepare, afresh)
        for file in files:
            os.close(file)
        self.pid = self.process.pid

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    @property
    def out(self) -> str:
        return self._read("stdout")

    @property
    def err(self) -> str:
        return self._read("stderr")

    def _read(self, name: str) -> str:
        path = self.folder / name
        return path.read_text(encoding="utf-8") if path.exists() else ""

    def until(self, happened: Callable[[], object]) -> Running:
        """Wait until something has happened; fails where the process ends before it has."""
        end = time.monotonic() + PATIENCE
        while not happened():
            assert self.alive, f"ended with {self.process.returncode}: {self.err}"
            assert time.monotonic() < end, f"nothing happened: {self.err}"
            time.sleep(0.01)
        return self

    def send(self, number: signal.Signals, group: bool = False) -> Running:
        (os.killpg if group else os.kill)(self.pid, number)
        return self

    def wait(self) -> Ended:
        return Ended(self.process.wait(PATIENCE), self.out, self.err)

    def left_behind(self) -> list[int]:
        """Processes of its session that are still there, itself not counted."""
        return [pid for pid, session in sessions() if session == self.pid and pid != self.pid]


def sessions() -> Iterator[tuple[int, int]]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                state, _, _, session = (entry / "stat").read_text().rpartition(") ")[2].split()[:4]
                if state != "Z":
                    yield int(entry.name), int(session)


# --- material ---------------------------------------------------------------------------------------------------------


@dataclass
class TinyData:
    """A folder with data for both stages."""

    folder: Path

    def data(self, stage: str) -> Path:
        return self.folder / f"{stage}_data.jsonl"

    def images(self, stage: str) -> Path:
        return self.folder / f"{stage}_images.zip"

    def train(self, out: Path, stage: str = "pretrain", **changes: object) -> list[str]:
        """The command line of a short training run; keywords change its options, None leaves one out."""
        given = {
            "preset": "demo",
            "data": self.data(stage),
            "images": self.images(stage),
            "vision_model": EYE,
            "tokenizer": ASSETS,
            "init": BASE,
            "out": out,
            "epochs": 1,
            "batch_size": 4,
            "log_every": 1,
            "seed": 1,
            "device": "cpu",
            "workers": 0,
        } | changes
        options = [(f"--{name.replace('_', '-')}", str(value)) for name, value in given.items() if value is not None]
        return ["train", stage, *(word for option in options for word in option)]

    def picture(self, number: int = 0) -> Path:
        """A picture of the world as a file."""
        path = self.folder / f"picture{number}.jpg"
        if not path.exists():
            rng = random.Random(number)
            path.write_bytes(world.jpeg(world.draw(world.make_scene(rng), rng)))
        return path


@cache
def tiny_data() -> TinyData:
    """Tiny data, made once."""
    repo = TinyData(_folder())
    write_pretrain(repo.folder, random.Random(0), ROWS)
    write_sft(repo.folder, random.Random(1), ROWS)
    return repo


@cache
def sighted() -> Path:
    """Weights that can be talked to: the demo's base behind a projector that has learnt nothing."""
    path = _folder() / "sft_vlm_128.pth"
    write_checkpoint(path, export_tensors(sighted_model()), read_checkpoint(BASE).config, "sft")
    return path


def sighted_model() -> VLM:
    """The model of `sighted`, in fp32."""
    torch.manual_seed(0)
    base, encoder = read_checkpoint(BASE), load_encoder(EYE)
    model = VLM(base.config, encoder.spec, tokenizer().placeholder_id, encoder)
    load_into(model, base, new_projector=True)
    return model.eval()


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.load(ASSETS)


@cache
def _folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="mmv-tests-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def write_rows(path: Path, rows: list[Any]) -> Path:
    """A JSONL file; a text is taken as the line that it is."""
    lines = [row if isinstance(row, str) else as_json(row) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def read_rows(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def tree(folder: Path) -> list[str]:
    """All files below a folder."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
