"""Sheets: the questions of an evaluation that a report shows with their images, and the thumbnails of these."""

from __future__ import annotations

import base64
import io
import random
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from minimind_v.core.errors import DataError
from minimind_v.core.evaluate.ask import BLANK, SEEN
from minimind_v.core.evaluate.results import Line, by_variant
from minimind_v.core.evaluate.tasks import TASKS
from minimind_v.core.files import as_json, write_text
from minimind_v.core.rows.row import parse_json

CARDS = 8  # of a sheet
THUMBNAILS = "thumbnails.jsonl"  # in the folder of an evaluation
MOST_IMAGES, OF_QUESTION = 1000, 4  # that have a thumbnail; images of a question at most
SIDE = 112  # pixels of a thumbnail
FLAT = 1e-9  # a score this near to the mean is neither better nor worse

Thumbnails = Mapping[str, Sequence[bytes]]  # the `picture` of predictions → JPEG files


@dataclass(frozen=True)
class Card:
    """A question with its image, and with a blank one."""

    seen: Line
    blank: Line | None


def sheets_of(lines: Sequence[Line]) -> dict[str, list[Card]]:
    """`best` and `worst` answers, some at `random`, those that the image `helped`, and those that it `misled`.

    Better or worse than the mean, the surest answers first; random draws are the same in any order of the lines.
    """
    task, variants = TASKS[lines[0]["task"]], by_variant(lines)
    sign = -1 if task.lower_is_better else 1
    blank = {line["id"]: line for line in variants.get(BLANK, [])}
    ordered = sorted(variants[SEEN], key=lambda line: str(line["id"]))
    cards = [Card(line, blank.get(line["id"])) for line in random.Random(0).sample(ordered, len(ordered))]
    scores = [sign * card.seen["score"] - sign * float(np.mean([line["score"] for line in ordered])) for card in cards]
    by_score = sorted(zip(scores, cards, strict=True), key=lambda pair: (-pair[0], -(pair[1].seen["confidence"] or 0)))
    worst = sorted(by_score, key=lambda pair: (pair[0], -(pair[1].seen["confidence"] or 0)))
    gains = {id(card): sign * (card.seen["score"] - card.blank["score"]) for card in cards if card.blank is not None}
    turned = sorted((card for card in cards if gains.get(id(card))), key=lambda card: -gains[id(card)])
    return {
        "best": [card for score, card in by_score if score > FLAT][:CARDS],
        "worst": [card for score, card in worst if score < -FLAT][:CARDS],
        "random": cards[-CARDS:],
        "helped": [card for card in turned if gains[id(card)] > 0][:CARDS],
        "misled": [card for card in reversed(turned) if gains[id(card)] < 0][:CARDS],
    }


def thumbnail(pixels: np.ndarray) -> bytes:
    """A JPEG of an image as the model receives it; pixels uint8 [3, S, S]."""
    image = Image.fromarray(pixels.transpose(1, 2, 0))
    image.thumbnail((SIDE, SIDE))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=80)
    return file.getvalue()


def write_thumbnails(folder: Path, thumbnails: Thumbnails) -> None:
    """Write them into the folder of an evaluation. Raises RunError."""
    lines = (
        {"picture": name, "jpeg": [base64.b64encode(data).decode() for data in files]}
        for name, files in thumbnails.items()
    )
    write_text(folder / THUMBNAILS, "".join(f"{as_json(line)}\n" for line in lines))


def read_thumbnails(folder: Path) -> dict[str, list[bytes]]:
    """The thumbnails in the folder of an evaluation; what cannot be read has none."""
    thumbnails: dict[str, list[bytes]] = {}
    with suppress(OSError, UnicodeDecodeError):
        for line in (folder / THUMBNAILS).read_text(encoding="utf-8").split("\n"):
            with suppress(DataError, KeyError, TypeError, ValueError):
                own = parse_json(line, "")
                thumbnails[str(own["picture"])] = [base64.b64decode(text, validate=True) for text in own["jpeg"]]
    return thumbnails
