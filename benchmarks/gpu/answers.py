"""Talking: whether recorded steps are those that are launched one by one, and how many tokens come in a second."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import torch
from PIL import Image
from torch import Tensor

from benchmarks.gpu import curve
from benchmarks.gpu.card import Card, Result
from minimind_v.core import cuda_graph
from minimind_v.core.cuda_graph import EAGER, record_cuda
from minimind_v.core.generate import prompt_cache as memory
from minimind_v.core.generate.prompt_cache import ready
from minimind_v.core.generate.rows import Row, Rows
from minimind_v.core.generate.sampling import GREEDY, Sampler, Sampling
from minimind_v.core.generate.slots import SPAN
from minimind_v.core.model.vlm import VLM

WARM = Sampling(0.65, 0.85, seed=1)  # as published
# Name, sampling, whether the host draws, whether steps are recorded, whether rows have slots in one cache.
WAYS = (
    ("greedy, eager", GREEDY, False, False, True),
    ("greedy, graph", GREEDY, False, True, True),
    ("sampled, eager", WARM, False, False, True),
    ("sampled, graph", WARM, False, True, True),
    ("sampled by the host, graph", WARM, True, True, True),
    ("sampled, without slots", WARM, False, False, False),
)


class Recorder:
    """Records steps, and counts. A CPU does them again."""

    def __init__(self, card: Card) -> None:
        self.card, self.made = card, 0

    def __call__(self, work, device, pool):
        replay = record_cuda(work, device, pool) if self.card.cuda else work
        self.made += 1
        return replay


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


@contextmanager
def launching(model: VLM, record: Callable | None, together: bool = True) -> Iterator[None]:
    """How steps are launched: recorded, or one by one; and whether rows are decoded together in slots."""
    decoder = ready(model).decoder
    decoder.uses_slots, decoder._free_slots = together, []
    if together:
        slots = decoder.take_slots()
        slots.graphs.on = record is not None
        slots.graphs.record = record or slots.graphs.record
        decoder.give_back(slots)
    yield
    decoder._free_slots = []


def answer(
    model: VLM, ids: Tensor, mask: Tensor, limits: list[int], draws: Sequence, times: list[float] | None = None
) -> list[list[int]]:
    """The ids of each row; `times` gets the second of each."""
    rows = [Row(row[real].tolist(), *how) for row, real, *how in zip(ids, mask, draws, limits, strict=True)]
    together = Rows(model)
    for row in rows:
        together.add(row)
    while together:
        for drawn in together.step():
            if drawn.error is not None:
                raise drawn.error
            if times is not None:
                times.append(time.perf_counter())
            if len(drawn.row.drawn) == drawn.row.max_new_tokens:
                together.remove(drawn.row)
    return [row.drawn for row in rows]


def decoding(card: Card, result: Result) -> None:
    """Recorded steps of rows in slots = rows by themselves: ids and logits, over the end of a span, as rows leave."""
    model = curve.make_model(card.tiny).to(card.device).eval()
    begin, count = (SPAN - 12, 24) if card.tiny else (SPAN - 60, 160)
    checks = result.setdefault("checks", {})
    for half in (False, True):
        with precision(card, half):
            for rows in (1, 2) if card.tiny else (1, 8, 16, 64):
                ids, mask = prompts(rows, begin)
                limits = [count - 5 * (row % 4) for row in range(rows)]  # some leave before others
                sides: list[tuple[list[list[int]], list[Likeliest]]] = []
                recorder = Recorder(card)
                for record, together in ((None, False), (recorder, True)):
                    draws = [Likeliest() for _ in range(rows)]
                    with launching(model, record, together):
                        sides.append((answer(model, ids, mask, limits, draws), draws))
                name = f"{'bf16' if half else 'fp32'}, {rows} rows"
                result[name] = comparison = compare(*sides) | {"recorded": recorder.made}
                checks[f"{name}: recorded"] = recorder.made > 0 and not cuda_graph._FAILED
                checks[f"{name}: as eager"] = comparison["largest_gap"] <= (0.05 if half else 1e-3)
                checks[f"{name}: the same ids"] = comparison["same_ids"] or (half and comparison["ties"])
            if not half:
                checks["drawn on the card as on the host"] = _drawn_alike(card, model)
                checks["a conversation in used slots is as in new ones"] = _conversation_again(card, model)
    checks["a recording outlives one of another kind"] = _outlives(card)
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


def _drawn_alike(card: Card, model: VLM) -> bool:
    """Rows of several settings in fp32, by the card's own draws and by those of the host."""
    settings = [GREEDY, WARM, Sampling(1.2, 1.0), Sampling(1.3, 0.9, top_k=20, repetition_penalty=1.2)]
    settings = [replace(sampling, seed=row) for row, sampling in enumerate(settings)]
    ids, mask = prompts(len(settings), 40)
    sides = []
    for on_host in (False, True):
        with launching(model, Recorder(card)):
            samplers = [Sampler(sampling) for sampling in settings]
            draws = [_host_draw(sampler) for sampler in samplers] if on_host else samplers
            sides.append(answer(model, ids, mask, [24] * len(settings), draws))
    return sides[0] == sides[1]


def _host_draw(sampler: Sampler) -> Callable[[Tensor, Sequence[int]], int]:
    """What is no Sampler draws on the host."""
    return lambda logits, text_ids: sampler(logits, text_ids)


def _conversation_again(card: Card, model: VLM) -> bool:
    """The same answer in new slots, and after others that were longer and more, by recordings that are there."""
    recorder = Recorder(card)
    with launching(model, recorder):
        ids, mask = prompts(1, 40)
        first = answer(model, ids, mask, [EAGER + 8], [Sampler(GREEDY)])
        for rows in (3, 1):
            answer(model, *prompts(rows, 90), [EAGER + 8] * rows, [Sampler(WARM) for _ in range(rows)])
        return first == answer(model, ids, mask, [EAGER + 8], [Sampler(GREEDY)])


def _outlives(card: Card) -> bool:
    """Products recorded behind others, whose memory is freed and taken by something else, are what they were."""
    rows, inner, width = (4, 64, 4) if card.tiny else (64, 8192, 512)  # cuBLAS adds them up in memory of its own
    kind = torch.bfloat16 if card.cuda else torch.float32
    left, right = (torch.randn(size, device=card.device, dtype=kind) for size in ((rows, inner), (inner, width)))
    product = torch.zeros(rows, width, device=card.device, dtype=kind)

    def multiply() -> None:
        product.copy_(left @ right)

    kinds = [cuda_graph.CudaGraphs(left.device, "it is tried", print, 0.0, Recorder(card)) for _ in range(2)]
    for graphs in kinds:
        for _ in range(EAGER + 2):
            graphs.run("product", multiply, [product])
    expected = product.clone()
    del kinds[0], graphs
    if card.cuda:
        torch.cuda.empty_cache()
        taken = [torch.full((2**22,), torch.nan, device=card.device) for _ in range(16)]
        del taken
    product.zero_()
    kinds[0].run("product", multiply, [product])
    return kinds[0].recorded == 1 and torch.equal(product, expected)


def _conversations(card: Card, model: VLM) -> Result:
    reserved = {}
    for number in range(1, 21):
        ids, mask = prompts(1, 100 + 3 * number)
        answer(model, ids, mask, [24], [Likeliest()])
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
            for name, sampling, on_host, record, together in WAYS:
                if not together and streams > 16:  # some 30 kernels for each row and token
                    continue
                times: list[float] = []
                ids, mask = prompts(streams, 240)
                recorder = Recorder(card) if record else None
                with launching(model, recorder, together):
                    for tokens in (8, count):  # the first time makes what stays
                        times.clear()
                        samplers = [Sampler(sampling) for _ in range(streams)]
                        draws = [_host_draw(sampler) for sampler in samplers] if on_host else samplers
                        answer(model, ids, mask, [tokens] * streams, draws, times)
                # A prompt is read in each of the first steps, and those in which a recording is made come next.
                begin = streams * (streams + 1) // 2 + (EAGER + 3) * streams
                times = times[begin : streams * count - streams * (streams - 1) // 2]
                result[f"{streams} streams, {name}"] = {
                    "tokens_s": round((len(times) - streams) / (times[-1] - times[streams - 1]), 1)
                }
        repeated, new = _first_tokens(card, model)
        result["first token, length seen"] = {"ms": round(repeated * 1e3, 2)}
        result["first token, new length"] = {"ms": round(new * 1e3, 2)}
    if (card.folder / "vision").is_dir():
        result["plain, 1 stream, sampled"] = _plain(card, count)


def _first_tokens(card: Card, model: VLM) -> tuple[float, float]:
    """Medians of reading a prompt and drawing, at lengths that were met before and at others. Without a picture."""
    medians = []
    for lengths in ([240] * 8, range(241, 249)):
        times = []
        for length in lengths:
            ids, mask = prompts(1, length)
            card.wait()
            begun = time.perf_counter()
            answer(model, ids, mask, [1], [Likeliest()])
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
