"""A program that uses the front door; `make lint` checks its types as strictly as mypy can."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

import minimind_v as mmv


def first_token(path: Path, image: np.ndarray) -> int:
    m: mmv.LoadedVLM = mmv.load(path, device="cpu")
    inputs: dict[str, Tensor] = m.processor("What is this?", images=[image])
    logits = m(**inputs).logits
    assert logits is not None
    return int(logits[0, -1].argmax())


def answers(m: mmv.LoadedVLM, questions: list[str]) -> Iterator[str]:
    chat: mmv.Conversation = m.chat(temperature=0.7, seed=1)
    for question in questions:
        yield chat.ask(question)
    yield from m.stream("And this?", "a.jpg", max_new_tokens=5)


def train(rows: str) -> float:
    config: mmv.RunConfig = mmv.config("sft", data=rows, max_steps=10)
    summary: mmv.Summary = mmv.train(config)
    scores: mmv.Evaluation = mmv.evaluate(mmv.load(summary.weights), rows, limit=8)
    report: dict[str, Any] = mmv.evaluate(summary.weights, rows, task="vqa", out="out")
    return scores.loss + float(report["rows"])
