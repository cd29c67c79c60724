"""A hundred clients for minutes: slow readers, cut connections, odd images, floods (`make soak-serve`).

Checked: each answer that was accepted comes whole and is the one given alone, nothing fails inside the server, its
memory stays flat, and no slot is left behind.

    python -m tests.serve.soak --seconds 300 --clients 100
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.cli.harness import tiny_data
from tests.serve.harness import QUESTION, Server, image_item, raw_request, text_item

KINDS = {"whole": 8, "stream": 8, "slow": 2, "cut": 4, "cut at once": 2, "odd image": 2, "odd request": 2, "flood": 1}
WARM = 30  # seconds, before which memory is not compared
GROWTH = 1.10  # of the server's memory, from the end of the first third on


@dataclass
class Case:
    """A request, and the answer that it gets alone."""

    body: dict[str, Any]
    answer: str = ""


@dataclass
class Report:
    """What happened."""

    counts: Counter[str] = field(default_factory=Counter)
    troubles: list[str] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)  # MB, each second
    first_seconds: list[float] = field(default_factory=list)  # until the first byte of an accepted answer


def cases() -> list[Case]:
    """Questions with and without images, greedy and drawn."""
    images = [image_item(tiny_data().picture(number).read_bytes()) for number in range(6)]
    texts = [QUESTION, "What colour is the star?", "有几个物体？", "Is there a red cross?"]
    chosen = []
    for number in range(24):
        content = [text_item(texts[number % 4]), *images[number % 6 : number % 6 + number % 3]]
        settings = {"temperature": 0} if number % 2 else {"temperature": 1.2, "top_p": 1, "seed": number}
        messages = [{"role": "user", "content": content}]
        if number % 5 == 0:
            messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "yes"}, *messages]
        chosen.append(Case({"messages": messages, "max_tokens": 8 + number * 2, **settings}))
    return chosen


class Client:
    """One client, which behaves in a random way each time."""

    def __init__(self, server: Server, cases: list[Case], report: Report, seed: int, end: float) -> None:
        self.server, self.cases, self.report, self.random, self.end = server, cases, report, random.Random(seed), end

    async def run(self) -> None:
        while time.monotonic() < self.end:
            kind = self.random.choices(list(KINDS), list(KINDS.values()))[0]
            case = self.random.choice(self.cases)
            try:
                await self._behave(kind, case)
            except (OSError, asyncio.IncompleteReadError, ValueError, KeyError, IndexError) as error:
                self.report.troubles.append(f"{kind}: {type(error).__name__}: {error}")

    async def _behave(self, kind: str, case: Case) -> None:
        if kind == "flood":
            await asyncio.gather(*(self._ask(case, self.random.random() < 0.5) for _ in range(8)))
        elif kind == "odd image":
            data = self.random.choice([b"", b"PK\3\4", b"\x89PNG\r\n\x1a\n" + self.random.randbytes(300)])
            await self._refused({"messages": [{"role": "user", "content": [image_item(data), text_item()]}]})
        elif kind == "odd request":
            odd = [{}, {"messages": 5}, case.body | {"n": 9}, case.body | {"top_p": 7}]
            await self._refused(self.random.choice(odd))
        elif kind.startswith("cut"):
            await self._cut(case, kind == "cut at once")
        else:
            await self._ask(case, kind != "whole", kind == "slow")

    async def _ask(self, case: Case, stream: bool, slow: bool = False) -> None:
        while True:
            begin = time.monotonic()
            reader, writer = await self._send(case.body | {"stream": stream})
            try:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                waited = time.monotonic() - begin
                body = b""
                while data := await reader.read(64 if slow else 65536):
                    body += data
                    if slow:
                        await asyncio.sleep(0.02)
            finally:
                writer.close()
            if not head.startswith("HTTP/1.1 429 "):
                break
            self.report.counts["429"] += 1
            seconds = float(head.lower().partition("retry-after: ")[2].partition("\r")[0])
            await asyncio.sleep(seconds * (1 + self.random.random()))
        if not head.startswith("HTTP/1.1 200 "):
            raise ValueError(head.partition("\r")[0] + body.decode()[:200])
        self.report.counts["accepted"] += 1
        self.report.first_seconds.append(waited)
        text = streamed(body) if stream else json.loads(body)["choices"][0]["message"]["content"]
        if text != case.answer:
            raise ValueError(f"{text!r} instead of {case.answer!r}")
        self.report.counts["equal to alone"] += 1

    async def _refused(self, body: dict[str, Any]) -> None:
        reader, writer = await self._send(body)
        head = await reader.readuntil(b"\r\n")
        writer.close()
        if not head.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 429 ")):
            raise ValueError(f"{head!r} for {str(body)[:100]}")
        self.report.counts["refused"] += 1

    async def _cut(self, case: Case, at_once: bool) -> None:
        reader, writer = await self._send(case.body | {"stream": self.random.random() < 0.7})
        if not at_once:
            with suppress(TimeoutError):
                await asyncio.wait_for(reader.read(300), self.random.random())
        writer.transport.abort()
        self.report.counts["cut"] += 1

    async def _send(self, body: dict[str, Any]) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection(self.server.host, self.server.port)
        writer.write(raw_request(json.dumps(body).encode(), "Connection: close"))
        await writer.drain()
        return reader, writer


def streamed(body: bytes) -> str:
    """The text of a chunked response of server-sent events; fails where it is not whole."""
    events = b""
    while body:
        size, _, rest = body.partition(b"\r\n")
        length = int(size, 16)
        events += rest[:length]
        body = rest[length + 2 :]
        if not length:
            break
    else:
        raise ValueError("the response breaks off")
    lines = events.decode().split("\n\n")
    if lines[-2:] != ["data: [DONE]", ""]:
        raise ValueError(f"the stream ends with {lines[-2:]}")
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    return "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)


def megabytes(pid: int) -> float:
    """Resident memory of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


async def watch(server: Server, report: Report, end: float) -> None:
    while time.monotonic() < end:
        report.memory.append(megabytes(server.running.pid))
        await asyncio.sleep(1)


async def besiege(server: Server, clients: int, seconds: float, chosen: list[Case]) -> Report:
    """Let all clients ask for some seconds."""
    report, end = Report(), time.monotonic() + seconds
    tasks = [Client(server, chosen, report, number, end).run() for number in range(clients)]
    await asyncio.gather(watch(server, report, end), *tasks)
    return report


def soak(folder: Path, clients: int, seconds: float) -> Report:
    """Besiege a server of its own. Raises AssertionError where something was lost, wrong, or left behind."""
    server = Server(folder)
    try:
        chosen = cases()
        for case in chosen:
            response = server.request("POST", "/v1/chat/completions", case.body)
            case.answer = response.json["choices"][0]["message"]["content"]
        report = asyncio.run(besiege(server, clients, seconds, chosen))
        for _ in range(200):  # cut answers leave at the next step
            left = server.metric("mmv_requests_active") + server.metric("mmv_requests_queued")
            if not left:
                break
            time.sleep(0.05)
        first, last = report.memory[len(report.memory) // 3], report.memory[-1]
        tokens = server.metric("mmv_completion_tokens_total")
        waits = sorted(report.first_seconds)
        print(f"{clients} clients, {seconds:g} s: {dict(report.counts)}; {tokens / seconds:.0f} tokens/s")
        median, late = waits[len(waits) // 2], waits[len(waits) * 99 // 100]
        print(f"first byte of an accepted answer: median {median:.2f} s, 99 % {late:.2f} s")
        tenths = [f"{report.memory[(len(report.memory) - 1) * tenth // 10]:.0f}" for tenth in range(11)]
        print(f"memory in MB, each tenth of the time: {' '.join(tenths)}")
        assert not report.troubles, f"{len(report.troubles)} troubles: {report.troubles[:5]}"
        assert report.counts["accepted"] == report.counts["equal to alone"] > 0
        assert not left, f"{left} requests were left behind"
        assert seconds < WARM or last < first * GROWTH, f"memory has grown from {first:.0f} to {last:.0f} MB"
        assert " 500 " not in server.log
        assert server.running.send(15).wait().code == 0
        return report
    finally:
        server.end()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--clients", type=int, default=100)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        try:
            soak(Path(folder), options.clients, options.seconds)
        except AssertionError as error:
            sys.exit(f"failed: {error}")


if __name__ == "__main__":
    main()
