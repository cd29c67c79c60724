"""The loop: changed examples of each format are read in processes with limits, and each case gets a verdict.

A case is a format, a seed and a number; nothing else decides what its files are. A worker reads case after case and
reports each. Where it dies, the case after the last report has killed it, and the next worker goes on behind that case.
"""

from __future__ import annotations

import faulthandler
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from minimind_v.core.errors import MmvError
from tests.fuzz import seeds
from tests.fuzz.mutate import mutate
from tests.fuzz.readers import Data, Format, Refused, digest

Tree = dict[str, bytes]  # the files of an example by their names below its folder
Cases = Iterator[Tree]

DATA, ERROR = "data", "error"  # verdicts; all others are faults
EXCEPTION, WRONG, HANG, MEMORY, DEAD, EXAMPLE = "exception", "wrong data", "hang", "memory", "dead", "example"
ADDRESSES = 2**34  # bytes of address space above what a worker begins with: what is only reserved harms nobody
DONE, AGAIN = "done", "again"  # what a worker says last: whether another is to go on behind it
KEPT = 3  # cases that are kept of one fault
LINE = 5000  # characters of an error; `readable` keeps it below
CONTEXT = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class Limits:
    """What one case may take."""

    cpu: int = 10  # seconds of the processor
    wall: int = 60  # seconds
    memory: int = 2**31  # resident bytes above what its worker begins with


@dataclass(frozen=True)
class Verdict:
    """What became of one case; `where` is a line of code, for a fault that has one."""

    kind: str
    text: str = ""
    where: str = ""


@dataclass
class Fault:
    """A way to fail that some cases have in common."""

    format: str
    kind: str
    where: str
    text: str
    cases: list[int] = field(default_factory=list)
    kept: list[Path] = field(default_factory=list)


@dataclass
class Report:
    """What became of all cases."""

    counts: dict[str, Counter[str]] = field(default_factory=dict)
    faults: dict[tuple[str, str, str], Fault] = field(default_factory=dict)

    def add(self, name: str, number: int, verdict: Verdict) -> Fault | None:
        """Count a case; returns the fault that it has shown, if any."""
        self.counts.setdefault(name, Counter())[verdict.kind] += 1
        if verdict.kind in (DATA, ERROR):
            return None
        key = name, verdict.kind, verdict.where
        fault = self.faults.setdefault(key, Fault(name, verdict.kind, verdict.where, verdict.text))
        fault.cases.append(number)
        return fault


# --- examples and cases -----------------------------------------------------------------------------------------------


def make_examples(formats: Mapping[str, Format]) -> dict[str, Tree]:
    """An example of each format. Made in a process of its own: forked workers inherit no threads of the libraries."""
    with tempfile.TemporaryDirectory() as root:
        folders = {name: Path(root) / f"{number}" for number, name in enumerate(formats)}
        maker = CONTEXT.Process(target=_make, args=(formats, folders))
        maker.start()
        maker.join()
        if maker.exitcode:
            raise RuntimeError("the examples cannot be made")
        return {name: read_tree(folder) for name, folder in folders.items()}


def _make(formats: Mapping[str, Format], folders: Mapping[str, Path]) -> None:
    for name, folder in folders.items():
        folder.mkdir()
        formats[name].make(folder)


def read_tree(folder: Path) -> Tree:
    """All files below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def write_tree(folder: Path, tree: Tree) -> None:
    """Make a folder hold these files and nothing else."""
    shutil.rmtree(folder, ignore_errors=True)
    for name, data in tree.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    seeds.set_times(folder)


def changed_tree(name: str, format: Format, example: Tree, seed: int, number: int) -> Tree:
    """The files of a case."""
    rng = random.Random(f"{seed} {name} {number}")
    names = [file for file in example if _matches(file, format.changed)]
    file = rng.choice(names)
    donor = b"" if format.proof else example[rng.choice(list(example))]
    kind = "yaml" if file.endswith(".yaml") else format.kind
    return example | {file: mutate(example[file], rng, kind, donor)}


def _matches(file: str, pattern: str) -> bool:
    return pattern == "**/*" or (file.count("/") == pattern.count("/") and Path(file).match(pattern))


# --- one case ---------------------------------------------------------------------------------------------------------


def judge(format: Format, folder: Path, original: Data | None) -> Verdict:
    """Read what is in a folder; `original` holds digests of the unchanged data."""
    try:
        data = format.read(folder)
    except MmvError as error:
        line = str(error)
        if not line.strip() or "\n" in line or "\r" in line or len(line) > LINE:
            return Verdict(EXCEPTION, f"not one line: {line!r:.300}", _origin(error))
        return Verdict(ERROR, line)
    except BaseException as error:
        return Verdict(
            EXCEPTION, f"{type(error).__name__}: {error}"[:300], f"{type(error).__name__} in {_origin(error)}"
        )
    if original is not None and format.proof and (wrong := _differences(format.proof, digests(data), original)):
        return Verdict(WRONG, f"without a word: {', '.join(wrong)}"[:300])
    return Verdict(ERROR if any(isinstance(value, Refused) for value in data.values()) else DATA)


def digests(data: Data) -> Data:
    """The data by its digests, what was refused as it is."""
    return {name: value if isinstance(value, Refused) else digest(value) for name, value in data.items()}


def _differences(proof: str, data: Data, original: Data) -> list[str]:
    wrong = [name for name, value in data.items() if not isinstance(value, Refused) and value != original.get(name)]
    return wrong + ([name for name in original if name not in data] if proof == "whole" else [])


def _origin(error: BaseException) -> str:
    """The last line of the project's own code that an error came through."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "minimind_v" in frame.filename] or frames
    return f"{_short(own[-1].filename)}:{own[-1].lineno} {own[-1].name}"


def _short(path: str) -> str:
    return path.rpartition("minimind_v/")[2]


# --- workers ----------------------------------------------------------------------------------------------------------


def _work(connection: Connection, folder: Path, format: Format, example: Tree, limits: Limits, cases: Cases) -> None:
    """Read case after case; a report each. The first report is about the unchanged example, which must be data."""
    _begin(folder, limits)
    files = folder / "files"
    write_tree(files, example)
    try:
        read = format.read(files)
        refused = [value.line for value in read.values() if isinstance(value, Refused)]
        original, trouble = digests(read), "; ".join(refused)
    except BaseException as error:
        original, trouble = {}, f"{type(error).__name__}: {error} ({_origin(error)})"
    usual = _peak()
    connection.send((usual, trouble))
    if trouble:
        return
    for tree in cases:
        write_tree(files, tree)
        _allow(limits)
        verdict = judge(format, files, original)
        signal.setitimer(signal.ITIMER_REAL, 0)
        much = _peak() > usual + limits.memory  # given back before the parent has noticed
        connection.send(Verdict(MEMORY, _more_than(limits)) if much else verdict)
        if much:  # the peak remains: the next case needs a process of its own
            connection.send(AGAIN)
            return
    connection.send(DONE)


def _peak() -> int:
    """The most bytes that were resident so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def _more_than(limits: Limits) -> str:
    return f"more than {limits.memory >> 20:,} MB"


def _begin(folder: Path, limits: Limits) -> None:
    """What libraries say goes to a file; what ends the process says where."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    folder.mkdir(exist_ok=True)
    output = os.open(folder / "said", os.O_CREAT | os.O_TRUNC | os.O_RDWR | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    faulthandler.enable(output)
    for ended in (signal.SIGXCPU, signal.SIGALRM):
        signal.signal(ended, signal.SIG_DFL)
        faulthandler.register(ended, file=output, all_threads=False, chain=True)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    pages = Path("/proc/self/statm")
    if pages.exists():
        size = int(pages.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + ADDRESSES, resource.RLIM_INFINITY))


def _allow(limits: Limits) -> None:
    """A case's time begins: the system ends this process when it is over, wherever it is stuck."""
    used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    resource.setrlimit(resource.RLIMIT_CPU, (int(used + limits.cpu) + 1, resource.RLIM_INFINITY))
    signal.setitimer(signal.ITIMER_REAL, limits.wall)


class Worker:
    """A process that reads cases of one format, from the parent's side."""

    def __init__(
        self, name: str, format: Format, example: Tree, cases: Cases, first: int, root: Path, limits: Limits
    ) -> None:
        """`first` is the number of the first case, `root` a folder of folders that workers write to."""
        self.name, self.next, self.limits = name, first, limits
        self.folder = root / name.replace(" ", "-")
        self.connection, theirs = CONTEXT.Pipe(duplex=False)
        args = (theirs, self.folder, format, example, limits, cases)
        self.process = CONTEXT.Process(target=_work, args=args, daemon=True)
        self.process.start()
        theirs.close()
        self.usual = 0  # resident bytes before the first case
        self.heard = time.monotonic()
        self.killed = ""  # for what reason

    def watch(self) -> None:
        """End a process that takes too much, or that no limit of the system has ended."""
        if self.usual and _resident(self.process.pid) > self.usual + self.limits.memory:
            self._kill(MEMORY)
        elif time.monotonic() > self.heard + self.limits.wall + 30:
            self._kill(HANG)

    def _kill(self, why: str) -> None:
        os.kill(self.process.pid, signal.SIGKILL if self.killed else signal.SIGALRM)  # the first says where it is
        self.killed = self.killed or why

    def verdict_of_death(self) -> Verdict:
        """Why the process has ended in the middle of a case."""
        self.process.join()
        output = (self.folder / "said").read_text(errors="replace")
        where = re.findall(r'File "[^"]*minimind_v/([^"]+)", line (\d+) in (\w+)', output)
        location = "{}:{} {}".format(*where[0]) if where else ""
        code = -(self.process.exitcode or 0)
        if self.killed == MEMORY:
            return Verdict(MEMORY, _more_than(self.limits), location)
        if self.killed or code in (signal.SIGXCPU, signal.SIGALRM):
            limit = f"{self.limits.wall} s" if code == signal.SIGALRM else f"{self.limits.cpu} s of the processor"
            return Verdict(HANG, f"more than {limit}", location)
        name = signal.Signals(code).name if code > 0 else f"exit code {-code}"
        return Verdict(DEAD, f"{name}: {output.strip()[:200]}", f"{name} {location}")


def _resident(process: int) -> int:
    try:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * resource.getpagesize()
    except (OSError, IndexError):  # ended, or a system without
        return 0


# --- the loop ---------------------------------------------------------------------------------------------------------


class Loop:
    """Reads changed examples of formats, each for a time or a number of cases."""

    def __init__(
        self, formats: Mapping[str, Format], seed: int, keep: Path | None = None, limits: Limits = Limits()
    ) -> None:
        self.formats, self.seed, self.keep, self.limits = formats, seed, keep, limits
        self.examples = make_examples(formats)
        self.report = Report()
        self._first = dict.fromkeys(formats, 0)  # the next case of each
        memory = Path("/dev/shm")
        self.root = Path(tempfile.mkdtemp(prefix="mmv-fuzz-", dir=memory if os.access(memory, os.W_OK) else None))

    def close(self) -> None:
        """Remove what the workers wrote."""
        shutil.rmtree(self.root, ignore_errors=True)

    def run(self, seconds: float = 1e9, cases: int = 10**9, jobs: int = 1, say: Callable[[str], None] = print) -> None:
        """Give every format its turns, of so many seconds each and at most so many cases."""
        waiting = [(name, cases, seconds) for name in self.formats]
        running: dict[Connection, tuple[Worker, int, float]] = {}
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    name, left, share = waiting.pop(0)
                    worker = self._start(name, left, share)
                    running[worker.connection] = worker, left, time.monotonic() + share
                for connection in wait(list(running), timeout=0.02):
                    worker, left, end = running[connection]  # type: ignore[index]
                    more = self.hear(worker)
                    if more is None:
                        continue
                    del running[connection]  # type: ignore[arg-type]
                    connection.close()
                    left -= worker.next - self._first[worker.name]
                    self._first[worker.name] = worker.next
                    if more and left > 0 and end > time.monotonic():
                        waiting.insert(0, (worker.name, left, end - time.monotonic()))
                    else:
                        say(f"{worker.name}: {_summary(self.report.counts.get(worker.name, Counter()))}")
                for worker, _, _ in running.values():
                    worker.watch()
        finally:
            for worker, _, _ in running.values():
                worker.process.kill()
                worker.process.join()

    def _start(self, name: str, cases: int, seconds: float) -> Worker:
        first, end = self._first[name], time.monotonic() + seconds
        format, example = self.formats[name], self.examples[name]

        def changed() -> Cases:
            for number in range(first, first + cases):
                if time.monotonic() > end:
                    return
                yield changed_tree(name, format, example, self.seed, number)

        return Worker(name, format, example, changed(), first, self.root, self.limits)

    def hear(self, worker: Worker) -> bool | None:
        """Take in a report. None: the worker goes on; else whether another is to go on in its place."""
        worker.heard = time.monotonic()
        try:
            report = worker.connection.recv()
        except EOFError:
            verdict = worker.verdict_of_death()
            if not worker.usual:
                verdict = Verdict(EXAMPLE, f"the example itself: {verdict.kind}, {verdict.text}")
            self._take(worker, verdict)
            return verdict.kind != EXAMPLE
        if report in (DONE, AGAIN):
            worker.process.join()
            return report == AGAIN
        if not worker.usual:
            worker.usual, trouble = report
            if trouble:
                self._take(worker, Verdict(EXAMPLE, f"the example itself: {trouble}"))
                worker.process.join()
                return False
            return None
        self._take(worker, report)
        return None

    def _take(self, worker: Worker, verdict: Verdict) -> None:
        name, number = worker.name, worker.next
        worker.next += 1
        fault = self.report.add(name, number, verdict)
        if fault and self.keep and len(fault.kept) < KEPT:
            tree = self.examples[name]
            if verdict.kind != EXAMPLE:
                tree = changed_tree(name, self.formats[name], tree, self.seed, number)
            fault.kept.append(keep_case(self.keep, name, self.seed, number, verdict, tree))


def keep_case(keep: Path, name: str, seed: int, number: int, verdict: Verdict, tree: Tree) -> Path:
    """Write the files of a case, and how to read them again."""
    folder = keep / name.replace(", ", "-").replace(" ", "-") / f"{seed}-{number}-{verdict.kind.replace(' ', '-')}"
    write_tree(folder / "files", tree)
    record = {"format": name, "seed": seed, "case": number, "verdict": verdict.kind, "where": verdict.where}
    record |= {"text": verdict.text, "repeat": f"python -m tests.fuzz --again {folder}"}
    (folder / "case.json").write_text(json.dumps(record, indent=1) + "\n")
    return folder


def read_again(formats: Mapping[str, Format], folder: Path, limits: Limits = Limits()) -> Verdict:
    """The verdict over a case that was kept, as the code is now."""
    name = json.loads((folder / "case.json").read_text())["format"]
    loop = Loop({name: formats[name]}, 0, None, limits)
    cases = iter([read_tree(folder / "files")])
    try:
        worker = Worker(name, formats[name], loop.examples[name], cases, 0, loop.root, limits)
        while loop.hear(worker) is None:
            while not worker.connection.poll(0.02):
                worker.watch()
        (kind,) = loop.report.counts[name]
        fault = next(iter(loop.report.faults.values()), None)
        return Verdict(kind, fault.text if fault else "", fault.where if fault else "")
    finally:
        loop.close()


def _summary(counts: Counter[str]) -> str:
    return f"{counts.total():,} cases, " + ", ".join(f"{count:,} {kind}" for kind, count in counts.most_common())


def table(report: Report) -> str:
    """The report as lines: a table of formats, and each fault."""
    lines = [f"{'format':<22}{'cases':>9}{'errors':>9}{'data':>9}{'faults':>9}"]
    for name, counts in report.counts.items():
        total, errors, data = counts.total(), counts[ERROR], counts[DATA]
        lines.append(f"{name:<22}{total:>9,}{errors:>9,}{data:>9,}{total - errors - data:>9,}")
    for fault in report.faults.values():
        lines.append(f"\n{fault.format}: {fault.kind}, {len(fault.cases)} ×: {fault.where or '–'}\n  {fault.text}")
        lines += [f"  python -m tests.fuzz --again {path}" for path in fault.kept]
    return "\n".join(lines)


def as_json(report: Report) -> dict[str, Any]:
    """The report for a program to read."""
    faults = [
        {name: value for name, value in vars(fault).items() if name not in ("kept", "cases")}
        | {"cases": len(fault.cases), "first": fault.cases[:KEPT], "kept": [str(path) for path in fault.kept]}
        for fault in report.faults.values()
    ]
    return {"formats": {name: dict(counts) for name, counts in report.counts.items()}, "faults": faults}


if __name__ == "__main__":
    sys.exit("python -m tests.fuzz")
