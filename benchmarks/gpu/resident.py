"""A step alone, on batches that lie on the card: frozen weights cast once or not, as a CUDA graph, compiled, and both.

What a run's step could reach if nothing else had to be done: no batch is copied, padded or read, and each length has a
graph of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import cycle

import torch
from torch import Tensor, nn

from benchmarks.gpu import curve
from benchmarks.gpu.card import Card, Result, bf16
from minimind_v.core.model.kernels.accelerate import accelerate
from minimind_v.core.model.kernels.compiled import compile_decoder
from minimind_v.core.model.kernels.cuda_linear import CudaLinear
from minimind_v.core.model.loss import supervised, supervised_loss
from minimind_v.core.model.vlm import VLM
from minimind_v.core.train.freeze import freeze

Batch = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # ids, features, places of patches, positions read, next ids
STAGES = {  # rows, lengths, answer, what trains
    "pretrain": (16, range(230, 310, 5), 41, "projector+last"),
    "sft": (4, range(260, 900, 40), 225, "all"),
}
# Name, and whether frozen weights are cast once, the decoder is compiled, and the step is a graph.
WAYS = (
    ("eager", True, False, False),
    ("frozen weights cast at every call", False, False, False),
    ("graph", True, False, True),
)
COMPILED = (WAYS[0], ("compiled", True, True, False), ("both", True, True, True))  # some minutes


def resident(card: Card, result: Result) -> None:
    """Milliseconds of an update by each way of launching it."""
    _measure(card, result, WAYS)


def compiled(card: Card, result: Result) -> None:
    """The same with a compiled decoder."""
    _measure(card, result, COMPILED)


def _measure(card: Card, result: Result, ways: Sequence[tuple[str, bool, bool, bool]]) -> None:
    for name, once, compiled, graph in ways:
        for stage, (rows, lengths, answer, policy) in STAGES.items():
            if card.tiny and (stage == "sft" or name == "both"):
                continue
            rows, lengths = (2, range(230, 235, 5)) if card.tiny else (rows, lengths)
            batches = [_prepare(card, rows, length, answer) for length in lengths]
            try:
                step, loss = _steps(card, batches, policy, once, compiled, graph)
                taken = card.seconds(step, 4 * len(batches), 2 * len(batches))
            except (RuntimeError, AssertionError) as error:  # of which those of a compiler are some
                result[f"{stage}, {name}"] = {"failed": " ".join(str(error).split())[:300]}
                continue
            finally:
                torch._dynamo.reset()
            result[f"{stage}, {name}"] = {
                "ms": round(taken * 1e3, 3),
                "samples_s": round(rows / taken, 1),
                "loss": loss(),
            }
            if name != "eager":
                gap = abs(loss() / result[f"{stage}, eager"]["loss"] - 1)
                result.setdefault("checks", {})[f"{stage}: {name} learns as eager does"] = gap < 0.02


def _prepare(card: Card, rows: int, length: int, answer: int) -> Batch:
    batch = curve.make_batch(length, rows, length, answer).to(card.device)
    positions = batch.image_mask.flatten().nonzero()[:, 0]
    return batch.input_ids, batch.image_features, positions, *supervised(batch.labels)


def _steps(card: Card, batches: list[Batch], policy: str, once: bool, compiled: bool, graph: bool):
    """What does the next update, and what tells the last loss."""
    model = accelerate(curve.make_model(card.tiny).to(card.device).train(), card.device)
    trained = freeze(model, policy)
    if not once:
        for module in model.modules():
            module.__class__ = nn.Linear if type(module) is CudaLinear else type(module)
    if compiled and (reason := compile_decoder(model.model, lambda: bf16(card), "inductor" if card.cuda else "eager")):
        raise RuntimeError(reason)
    # At a rate of 0 all ways have the same weights however often they have warmed up: their losses can be compared.
    device_numbers = {"capturable": True} if card.cuda else {}
    optimiser = torch.optim.AdamW(trained, lr=torch.tensor(0.0, device=card.device), fused=True, **device_numbers)
    loss = torch.zeros((), device=card.device)

    def step(batch: Batch) -> None:
        optimiser.zero_grad(set_to_none=True)
        with bf16(card):
            total = _loss(model, batch)
        total.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        loss.copy_(total.detach())

    works: list[Callable[[], object]] = [lambda batch=batch: step(batch) for batch in batches]
    if graph:
        works = _record(card, works)
    order = cycle(works)
    return lambda: next(order)(), lambda: float(loss)


def _loss(model: VLM, batch: Batch) -> Tensor:
    ids, features, positions, read, following = batch
    x = model.model.embed_tokens(ids)  # [B, T, D]
    projected = model.vision_proj(features.to(x.dtype)).flatten(0, 1).to(x.dtype)  # [M·P, D]
    x = x.flatten(0, 1).index_copy(0, positions, projected).view_as(x)
    hidden, aux = model.model(x, None, None, read)  # [S, D]
    loss, _ = supervised_loss(model.lm_head(hidden), following)
    return loss / len(read) + aux


def _record(card: Card, works: list[Callable[[], object]]) -> list[Callable[[], object]]:
    """Each as a CUDA graph, all of them in one pool of memory. A CPU does them as they are."""
    if not card.cuda:
        return works
    stream, pool, graphs = torch.cuda.Stream(), None, []
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for work in works:
            work()
            work()
    torch.cuda.current_stream().wait_stream(stream)
    for work in works:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            work()
        pool = graph.pool()
        graphs.append(graph)
    return [graph.replay for graph in graphs]
