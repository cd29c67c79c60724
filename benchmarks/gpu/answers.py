"""Talking: whether recorded steps are those that are launched one by one, and how many tokens come in a second."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from unittest import mock

import torch
from PIL import Image
from torch import Tensor

from benchmarks.gpu import curve
from benchmarks.gpu.card import Card, Result
from minimind_v.core.generate import cuda_graph as replay
from minimind_v.core.generate import prompt_cache as memory
from minimind_v.core.generate.cuda_graph import EAGER, SPAN, Replay, record_cuda
from minimind_v.core.generate.prompt_cache import ready
from minimind_v.core.generate.rows import Row, Rows
from minimind_v.core.generate.sampling import GREEDY, Sampler, Sampling
from minimind_v.core.model.vlm import VLM

WARM = Sampling(0.65, 0.85, seed=1)  # as published


class Recorder:
    """Records steps, and counts. A CPU does them again."""

    def __init__(self, card: Card) -> None:
        self.card, self.made, self.failed = card, 0, 0

    def __call__(self, work, device):
        replayed = record_cuda(work, device) if self.card.cuda else work
        self.made += replayed is not None
        self.failed += replayed is None
        return replayed


class Likeliest:
    """Draws the likeliest id and keeps the logits."""

    def __init__(self) -> None:
        self.logits: list[Tensor] = []

    def __call__(self, logits: Tensor, text_ids: Sequence[int]) -> int:
        self.logits.append(logits.float().clone())
        return int(logits.argmax())


@contextmanager
def precision(card: Card, half: bool) -> Iterator[None]:
    """In which a model talks: bf16 where the card has it, or fp32."""
    memory._READY.clear()
    with mock.patch.object(memory, "has_bf16", return_value=half and card.cuda):
        yield
    memory._READY.clear()


def prompts(rows: int, longest: int) -> tuple[Tensor, Tensor]:
    """Random ids [B, T] and their mask; rows are shorter in turn."""
    draw = torch.Generator().manual_seed(rows)
    ids = torch.randint(3, 6400, (rows, longest), generator=draw)
    lengths = longest - torch.arange(rows) % 7
    return ids, torch.arange(longest) < lengths[:, None]


def answer(
    model: VLM, recorder: Callable | None, ids: Tensor, mask: Tensor, limits: list[int], draws: list
) -> list[list[int]]:
    """The ids of each row, by steps that are recorded or not."""
    decoder = ready(model).decoder
    decoder.replay = Replay(recorder) if recorder else None
    rows = [Row(row[real].tolist(), *how) for row, real, *how in zip(ids, mask, draws, limits, strict=True)]
    together = Rows(model)
    for row in rows:
        together.add(row)
    while together:
        for drawn in together.step():
            if drawn.error is not None:
                raise drawn.error
            if len(drawn.row.drawn) == drawn.row.max_new_tokens:
                together.remove(drawn.row)
    return [row.drawn for row in rows]


def decoding(card: Card, result: Result) -> None:
    """Graph = eager: ids and logits, over the end of a recording's span, with rows that leave, after a rewind."""
    model = curve.make_model(card.tiny).to(card.device).eval()
    begin, count = (SPAN - 12, 24) if card.tiny else (SPAN - 60, 160)
    checks = result.setdefault("checks", {})
    for half in (False, True):
        with precision(card, half):
            for rows in (1, 2) if card.tiny else (1, 8, 16):
                ids, mask = prompts(rows, begin)
                limits = [count - 5 * (row % 4) for row in range(rows)]  # some leave before others
                sides: list[tuple[list[list[int]], list[Likeliest]]] = []
                recorder = Recorder(card)
                for record in (None, recorder):
                    draws = [Likeliest() for _ in range(rows)]
                    sides.append((answer(model, record, ids, mask, limits, draws), draws))
                name = f"{'bf16' if half else 'fp32'}, {rows} rows"
                result[name] = comparison = compare(*sides) | {"recorded": recorder.made, "failed": recorder.failed}
                checks[f"{name}: recorded"] = recorder.made > 0 and not recorder.failed and not replay._FAILED
                checks[f"{name}: as eager"] = comparison["largest_gap"] <= (0.05 if half else 1e-3)
                checks[f"{name}: the same ids"] = comparison["same_ids"] or (half and comparison["ties"])
            if not half:
                checks["the same after a rewind"] = _after_a_rewind(card, model)
    if card.cuda:
        result["pool"] = pool = _conversations(card, model)
        checks["20 conversations take no more memory than 3"] = pool["after_20"] <= 1.05 * pool["after_3"]


def compare(eager, recorded) -> Result:
    """Ids, and logits up to where the ids part. A tie is a choice between two that differ less than the sides do."""
    gap, same, ties = 0.0, eager[0] == recorded[0], True
    for row, (expected, other) in enumerate(zip(eager[0], recorded[0], strict=True)):
        parted = next((n for n, (a, b) in enumerate(zip(expected, other, strict=True)) if a != b), len(expected))
        for a, b in zip(eager[1][row].logits[: parted + 1], recorded[1][row].logits, strict=False):
            gap = max(gap, float((a - b).abs().max() / a.abs().max()))
        if parted < len(expected):
            a, b = eager[1][row].logits[parted], recorded[1][row].logits[parted]
            ties &= float(a[expected[parted]] - a[other[parted]]) <= 2 * float((a - b).abs().max())
    return {"same_ids": same, "ties": ties, "largest_gap": gap}


@torch.inference_mode()
def _after_a_rewind(card: Card, model: VLM) -> bool:
    """A conversation is taken back and goes on otherwise, with a recording that is there."""
    ids, _ = prompts(1, 40)
    sides = []
    for record in (None, Recorder(card)):
        decoder = ready(model).decoder
        decoder.replay = Replay(record) if record else None
        cache, turns = decoder.new_cache(1, SPAN), []
        for turn in range(3):
            chunk = ids[:, 10 * turn : 10 * turn + 10].to(card.device)
            logits = decoder.read(model.embed(chunk), cache)
            for _ in range(14):
                turns.append(int(logits.argmax()))
                logits = decoder.step(model.embed(logits.argmax(dim=-1, keepdim=True)), [cache])
            cache.rewind(cache.used - 9)
        sides.append(turns)
    return sides[0] == sides[1]


def _conversations(card: Card, model: VLM) -> Result:
    reserved = {}
    for number in range(1, 21):
        ids, mask = prompts(1, 100 + 3 * number)
        answer(model, record_cuda, ids, mask, [24], [Likeliest()])
        if number in (3, 20):
            reserved[f"after_{number}"] = torch.cuda.memory_reserved(card.device)
    return reserved


def talking(card: Card, result: Result) -> None:
    """Tokens per second by streams, drawing and launching; the first token; the plain side at one stream."""
    model = curve.make_model(card.tiny).to(card.device).eval()
    count = 16 if card.tiny else 128
    with precision(card, True):
        ready(model).prefixes.limit = 0  # no prompt is recalled
        for streams in (1, 2) if card.tiny else (1, 8, 16, 64):
            for drawing, sampling in (("greedy", GREEDY), ("sampled", WARM)):
                for launching, record in (("eager", None), ("graph", record_cuda if card.cuda else Recorder(card))):
                    if launching == "graph" and streams > 16:
                        continue  # more rows are not recorded
                    times: list[float] = []
                    ids, mask = prompts(streams, 240)
                    for tokens in (8, count):  # the first time makes what stays
                        times.clear()
                        draws = [_timed(Sampler(sampling), times) for _ in range(streams)]
                        answer(model, record, ids, mask, [tokens] * streams, draws)
                    later = times[(EAGER + 3) * streams :]  # behind the steps in which a recording is made
                    result[f"{streams} streams, {drawing}, {launching}"] = {
                        "tokens_s": round((len(later) - streams) / (later[-1] - later[streams - 1]), 1)
                    }
        repeated, new = _first_tokens(card, model)
        result["first token, length seen"] = {"ms": round(repeated * 1e3, 2)}
        result["first token, new length"] = {"ms": round(new * 1e3, 2)}
    if (card.folder / "clip").is_dir():
        result["plain, 1 stream, sampled"] = _plain(card, count)


def _timed(sampler: Sampler, times: list[float]):
    def draw(logits: Tensor, text_ids: Sequence[int]) -> int:
        token = sampler(logits, text_ids)
        times.append(time.perf_counter())
        return token

    return draw


def _first_tokens(card: Card, model: VLM) -> tuple[float, float]:
    """Medians of reading a prompt and drawing, at lengths that were met before and at others. Without a picture."""
    medians = []
    for lengths in ([240] * 8, range(241, 249)):
        times = []
        for length in lengths:
            ids, mask = prompts(1, length)
            card.wait()
            begun = time.perf_counter()
            answer(model, None, ids, mask, [1], [Likeliest()])
            times.append(time.perf_counter() - begun)
        medians.append(sorted(times)[len(times) // 2])
    return medians[0], medians[1]


def _plain(card: Card, count: int) -> Result:
    from benchmarks.plain_chat import PlainChat

    chat = PlainChat(card.folder, str(card.device))
    picture = card.folder / "asked.png"
    Image.new("RGB", (128, 128), "red").save(picture)
    times: list[float] = []
    with torch.autocast(card.device.type, torch.bfloat16, enabled=card.cuda):
        for _ in range(2):
            times.clear()
            begun = time.perf_counter()
            message = {"role": "user", "content": "<image>\nWhat is this?"}
            for _ in chat.answer([message], [picture], count, 0.65, 0.85):
                times.append(time.perf_counter())
    if len(times) < 3:
        return {"skipped": "its answer ended at once"}
    return {
        "tokens_s": round((len(times) - 1) / (times[-1] - times[0]), 1),
        "first_ms": round((times[0] - begun) * 1e3, 2),
    }
