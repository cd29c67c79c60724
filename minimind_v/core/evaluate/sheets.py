"""Sheets: the questions of an evaluation that a report shows with their images, and the thumbnails of these."""

from __future__ import annotations

import base64
import io
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from minimind_v.core.errors import DataError
from minimind_v.core.evaluate.ask import BLANK, SEEN
from minimind_v.core.evaluate.results import Line, by_variant
from minimind_v.core.evaluate.tasks import TASKS
from minimind_v.core.files import as_json, bounded_lines, write_text
from minimind_v.core.rows.row import parse_json

CARDS = 9  # of a sheet
THUMBNAILS = "thumbnails.jsonl"  # in the folder of an evaluation
MOST_IMAGES, OF_QUESTION = 1000, 4  # that have a thumbnail; images of a question at most
SIDE = 112  # pixels of a thumbnail
LONGEST = 1 << 18  # bytes of a line of thumbnails, which usually has some 10,000
FLAT = 1e-9  # a score this near to the mean is neither better nor worse

Thumbnails = Mapping[str, Sequence[bytes]]  # the `picture` of predictions → JPEG files


@dataclass(frozen=True)
class Card:
    """A question with its image, and with a blank one."""

    with_image: Line
    blank: Line | None


def sheets_of(lines: Sequence[Line]) -> dict[str, list[Card]]:
    """`best` and `worst` answers, some at `random`, those that the image `helped`, and those that it `misled`.

    The best are better than the mean, the worst worse; all are the same in any order of the lines.
    """
    variants, sign = by_variant(lines), -1 if TASKS[lines[0]["task"]].lower_is_better else 1
    blank = {line["id"]: line for line in variants.get(BLANK, [])}
    ordered = sorted(variants[SEEN], key=lambda line: str(line["id"]))
    mean = float(np.mean([line["score"] for line in ordered]))
    cards = [Card(line, blank.get(line["id"])) for line in random.Random(0).sample(ordered, len(ordered))]

    def first(amount: Callable[[Card], float]) -> list[Card]:
        """The cards of the largest amounts above 0, the surest answers first."""
        amounts = [(amount(card), card.with_image["confidence"] or 0.0, card) for card in cards]
        above = [entry for entry in amounts if entry[0] > FLAT]
        return [card for *_, card in sorted(above, key=lambda entry: entry[:2], reverse=True)[:CARDS]]

    def gain(card: Card) -> float:
        return sign * (card.with_image["score"] - card.blank["score"]) if card.blank is not None else 0.0

    return {
        "best": first(lambda card: sign * (card.with_image["score"] - mean)),
        "worst": first(lambda card: sign * (mean - card.with_image["score"])),
        "random": cards[-CARDS:],
        "helped": first(gain),
        "misled": first(lambda card: -gain(card)),
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
    path = folder / THUMBNAILS
    with suppress(OSError):
        lines = bounded_lines(path, LONGEST) if path.stat().st_size <= MOST_IMAGES * LONGEST else iter(())
        for line in islice(lines, MOST_IMAGES):
            with suppress(DataError, KeyError, TypeError, ValueError):
                own = parse_json(line or b"")
                thumbnails[str(own["picture"])] = [base64.b64decode(text, validate=True) for text in own["jpeg"]]
    return thumbnails
