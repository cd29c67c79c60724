"""What each lever of CPU training is worth alone: an epoch with all of them against one without it.

    python -m benchmarks.levers             seven rounds, some minutes on two cores
    python -m benchmarks.levers --docs      writes the table into docs/performance.md

The small preset under ViT-B/16 on rows of the published lengths, in pretraining (freeze `projector`) and fine-tuning
(`all`). All blocks of a kind take the same time, so that of a step is measured in two parts: a block between others,
seven times, and a model of one block, with embedding, projector, head and loss. The first epoch encodes each image,
later ones have its features. CPU time of one thread: what a busy machine disturbs least. Sides take turns, and each
round gives a ratio; the medians of these are shown.
"""

from __future__ import annotations

import argparse
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks.material import ANSWER_TOKENS, BASE_TOWER, CAPTION_TOKENS, QUESTION_TOKENS, make_model
from benchmarks.pages import PAGE, write_block
from minimind_v.core.config.presets import PRESETS
from minimind_v.core.data.batch import Batch
from minimind_v.core.model import ops
from minimind_v.core.model.decoder import Attention, Block, Decoder, RMSNorm
from minimind_v.core.model.feed_forward import FeedForward
from minimind_v.core.model.kernels import accelerate as kernels
from minimind_v.core.model.kernels import cpu_training
from minimind_v.core.model.loss import IGNORE
from minimind_v.core.model.vision.clip import ClipVision
from minimind_v.core.model.vision.spec import ClipConfig
from minimind_v.core.model.vlm import VLM
from minimind_v.core.train.freeze import freeze
from minimind_v.core.train.step import CPU_POSITIONS

CPU = torch.device("cpu")
PRESET = PRESETS["small"]
PATCHES, WIDTH = 196, 768
BEFORE, BETWEEN = 20, 8  # tokens of a row before its image, and of a turn around question and answer
STAGES = {"pretraining": ("projector", 5), "fine-tuning": ("all", 3)}  # freeze policy, rows: one micro-batch
WORTH = 1.05  # an epoch without a lever must take so many times as long in some case


@contextmanager
def without(*classes: type[nn.Module]) -> Iterator[None]:
    """Modules of these classes stay plain."""
    fast = {slow: quick for slow, quick in kernels.FAST["cpu"].items() if slow not in classes}
    with mock.patch.dict(kernels.FAST, {"cpu": fast}):
        yield


@contextmanager
def every_position() -> Iterator[None]:
    """The last block computes for all positions; those of the loss are taken from what comes out."""
    forward = Decoder.forward

    def whole(self: Decoder, x: Tensor, *args: object, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
        hidden, aux_loss = forward(self, x, *args[:2])
        return ops.select(hidden, args[2] if len(args) > 2 else positions), aux_loss

    with mock.patch.object(Decoder, "forward", whole):
        yield


LEVERS: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "norms written out": partial(without, RMSNorm),
    "feed-forward written out": partial(without, FeedForward),
    "attention written out, its weights kept": partial(without, Attention),
    "attention's weights kept": lambda: mock.patch.object(cpu_training, "WEIGHTS_KEPT", 0),
    "all of these": partial(without, RMSNorm, FeedForward, Attention),
    "last block only where the loss reads it": every_position,
}


@dataclass
class Times:
    """CPU seconds of a micro-batch of so many rows."""

    block: float
    one_block_model: float
    rows: int

    @property
    def row(self) -> float:
        return (self.block * (PRESET.num_hidden_layers - 1) + self.one_block_model) / self.rows


def cpu_seconds(work: Callable[[], object]) -> float:
    begun = time.process_time()
    work()
    return time.process_time() - begun


def make_rows(stage: str, count: int) -> Batch:
    """Rows of random ids with one image each, of the lengths that `material` writes."""
    rng, ends, spans = random.Random(0), [], []
    for number in range(count):
        end, answers = BEFORE + PATCHES, []
        for _ in range(2 + number % 2 if stage == "fine-tuning" else 1):  # rows of like length stand together
            begin = end + BETWEEN + rng.randint(*QUESTION_TOKENS)
            end = begin + 2 + rng.randint(*(ANSWER_TOKENS if stage == "fine-tuning" else CAPTION_TOKENS))
            answers.append(slice(begin, end))
        ends.append(end)
        spans.append(answers)
    input_ids = torch.randint(100, 6000, (count, max(ends)))
    at, labels = torch.arange(max(ends)).expand_as(input_ids), torch.full_like(input_ids, IGNORE)
    for row, answers in enumerate(spans):
        for answer in answers:
            labels[row, answer] = input_ids[row, answer]
    image_mask = (at >= BEFORE) & (at < BEFORE + PATCHES)
    features = torch.randn(count, PATCHES, WIDTH)
    return Batch(input_ids, at < torch.tensor(ends)[:, None], labels, image_mask, None, features)


def learn(model: VLM, batch: Batch) -> None:
    """Forward and backward."""
    model(**batch.tokens, image_features=batch.image_features).loss.backward()
    model.zero_grad()


def learn_block(model: VLM, batch: Batch) -> None:
    """Forward and backward of a block between others."""
    x = torch.randn(*batch.input_ids.shape, PRESET.hidden_size, requires_grad=True)
    block = model.model.layers[0]
    assert isinstance(block, Block)
    y, _ = block(x, model.model.context(x, batch.attention_mask))
    y.sum().backward()
    model.zero_grad()


def measure(model: VLM, batches: list[Batch], lever: AbstractContextManager[object]) -> Times:
    """A step by the model as it is accelerated while a lever is off."""
    with lever:
        kernels.accelerate(model, CPU)
        block = sum(cpu_seconds(partial(learn_block, model, batch)) for batch in batches)
        whole = sum(cpu_seconds(partial(learn, model, batch)) for batch in batches)
    return Times(block, whole, sum(map(len, batches)))


def encoding(rounds: int) -> tuple[float, float]:
    """CPU seconds of an image by packed weights, and by the plain tower."""
    tower = ClipVision(ClipConfig(**BASE_TOWER)).eval()
    image, times = torch.randn(1, 3, tower.config.image_size, tower.config.image_size), {True: [], False: []}
    with torch.no_grad():
        for number in range(2 * rounds + 2):
            packed = number % 2 == 0
            kernels.accelerate(tower, CPU) if packed else kernels.plain(tower)
            taken = cpu_seconds(lambda: tower(image))
            if number > 1:
                times[packed].append(taken)
    return statistics.median(times[True]), statistics.median(times[False])


def ratios(stage: str, rounds: int) -> tuple[dict[str, float], float]:
    """For each lever how many times as long a step takes without it; and CPU seconds of a row with all."""
    policy, count = STAGES[stage]
    torch.manual_seed(0)
    model = make_model(replace(PRESET, num_hidden_layers=1), 0).train()
    freeze(model, policy)
    rows, taken = [make_rows(stage, count)], {name: [] for name in LEVERS}
    alone = []
    for number in range(rounds + 1):
        base = measure(model, rows, nullcontext())
        for name, lever in LEVERS.items():
            off = measure(model, rows, lever())
            if number:  # the first round warms up
                taken[name].append(off.row / base.row)
        if number:
            alone.append(base.row)
    medians = {name: statistics.median(values) for name, values in taken.items()}
    batch = make_rows(stage, 16 if stage == "pretraining" else 6)
    whole = [
        measure(model, [batch], nullcontext()).row / measure(model, batch.split(CPU_POSITIONS), nullcontext()).row
        for _ in range(max(rounds // 2, 1))
    ]
    return medians | {"micro-batches": statistics.median(whole)}, statistics.median(alone)


def table(rounds: int) -> str:
    """Markdown: of every lever how long an epoch takes without it."""
    packed, plain = encoding(rounds)
    lines = dict.fromkeys((*LEVERS, "micro-batches", "CLIP's weights packed"), "")
    best = dict.fromkeys(lines, 0.0)
    rows = []
    for stage in STAGES:
        steps, row = ratios(stage, rounds)
        rows.append(f"{stage} {row * 1e3:.0f} ms a row, features known")
        for name in lines:
            later = steps.get(name, 1.0)
            first = (later * row + (plain if name.startswith("CLIP") else packed)) / (row + packed)
            lines[name] += f" {first:.2f} | {later:.2f} |"
            best[name] = max(best[name], first, later)
    body = [f"| {name} |{line} {'yes' if best[name] >= WORTH else 'no'} |" for name, line in lines.items()]
    about = f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"
    return "\n".join([
        f"An epoch without a lever takes so many times as long as with all. {about}; one thread's CPU time; medians of "
        f"{rounds} interleaved rounds; {', '.join(rows)}; an image encoded in {packed * 1e3:.0f} ms, {plain * 1e3:.0f} "
        "ms without packing.",
        "",
        "| lever | pretraining, first epoch | later | fine-tuning, first epoch | later | 5 % of some epoch |",
        "|---|---|---|---|---|---|",
        *body,
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--docs", action="store_true", help="write the table into docs/performance.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    text = table(options.rounds)
    print(text)
    if options.docs:
        write_block(PAGE, "levers", text)


if __name__ == "__main__":
    main()
