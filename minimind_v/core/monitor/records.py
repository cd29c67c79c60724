"""Read the records of a run; damaged records are reported and left out.

Every reader of a run uses this module, so that each value has its type.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from minimind_v.core.files import bounded_lines, read_notes

LONGEST = 1 << 20  # bytes of a line; usual ones have some hundred
LARGEST = 1e100  # of a number: sums and quotients of such are numbers
# Keys of a logged step, and of what was measured on rows.
COUNTS = ("step", "steps", "epoch", "samples", "tokens", "supervised_tokens", "seconds", "data_seconds", "rows")
MEASURED = ("loss", "token_accuracy", "lr", "grad_norm", "swapped_loss")  # they may be infinite or NaN
LOSS = ("loss",)  # keys of a logged step
REPORTED = ("loss", "samples", "seconds")  # keys that a report needs
RECALLED = ("rows", "loss", "token_accuracy")
EVALUATIONS = "evaluations.jsonl"  # in a run folder: the lines of `mmv eval --watch`
INTERVAL = ("value", "ci_low", "ci_high")


def read_records(
    path: Path, damaged: Callable[[str], object] = lambda _: None, needed: tuple[str, ...] = LOSS
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Lines of a file with the records that they hold; none where there is no file.

    `damaged` gets `file:line: problem` for each line without a record, or with a logged step without a key of `needed`.
    A last line without an end is still being written, and is skipped silently.
    """
    for number, line in enumerate(bounded_lines(path, LONGEST), 1):
        if line is None:
            damaged(f"{path}:{number}: the line is longer than {LONGEST:,} bytes")
        elif line.endswith(b"\n") and line.strip():
            record, trouble = _parse(line, needed)
            if record is None:
                damaged(f"{path}:{number}: {trouble}")
            else:
                yield line.decode("utf-8", "replace"), record


def read_part(path: Path, kinds: dict[str, type], damaged: Callable[[str], object]) -> dict[str, Any]:
    """A JSON object of a run. A value of another type than in `kinds` is dropped and reported to `damaged`."""
    notes = read_notes(path)
    if not notes and path.is_file() and path.stat().st_size:
        damaged(f"{path}: not a JSON object")
    for key, kind in kinds.items():
        value = notes.get(key)
        good = is_number(value) if kind is float else isinstance(value, kind)
        if key in notes and value is not None and not good:
            damaged(f"{path}: {key} is {_shown(value)}")
        if not good:
            notes.pop(key, None)
    return notes


def is_number(value: Any, finite: bool = True) -> bool:
    """Whether a value is a number that can be computed with."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < LARGEST or (not finite and isinstance(value, float) and not math.isfinite(value))


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of nested mappings by dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat


def _parse(line: bytes, needed: tuple[str, ...]) -> tuple[dict[str, Any] | None, str]:
    if b"\0" in line:
        return None, f"{line.count(0)} NUL bytes, as a power cut leaves them"
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):  # no text, half a line, or lists in lists in lists
        return None, "not a line of JSON; it was cut or changed"
    if not isinstance(record, dict):
        return None, "not a record of a run"
    record = _renamed(record)
    trouble = _trouble(record, needed)
    return (None, trouble) if trouble else (record, "")


def _renamed(record: Any, levels: int = 3) -> Any:
    """A record with today's keys: `token_accuracy` was `hits` in earlier versions."""
    if not isinstance(record, dict) or not levels:
        return record
    return {"token_accuracy" if key == "hits" else key: _renamed(value, levels - 1) for key, value in record.items()}


def _trouble(record: dict[str, Any], needed: tuple[str, ...]) -> str:
    """Why a record is damaged; empty if it is not."""
    step = record.get("step")
    if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step < 2**63:
        return "not a record of a run (it has no step)" if step is None else f"step is {_shown(step)}"
    if "loss" in record and (trouble := _of_numbers(record, needed)):
        return trouble
    for key in ("warning", "sign"):
        if key in record and not isinstance(record[key], str):
            return f"{key} is {_shown(record[key])}"
    if not is_number(record.get("memory_bytes", 0)):
        return f"memory_bytes is {_shown(record['memory_bytes'])}"
    for name, kind in (("validation", ("step", "loss", "token_accuracy", "swapped_loss", "rows")), ("recalled", ())):
        measured = record.get(name, {})
        if not isinstance(measured, dict):
            return f"{name} is {_shown(measured)}"
        if name in record and (trouble := _of_numbers(measured, kind)):
            return f"{name}: {trouble}"
    for name, check in (("evaluation", _of_evaluation), ("best", _of_best)):
        if name in record and (trouble := check(record[name]) if isinstance(record[name], dict) else "no mapping"):
            return f"{name}: {trouble}"
    for when, rows in record.get("recalled", {}).items():
        if not isinstance(rows, dict) or not isinstance(rows.get("data"), str):
            return f"recalled.{when} is {_shown(rows)}"
        if trouble := _of_numbers(rows, RECALLED):
            return f"recalled.{when}: {trouble}"
    return ""


def _of_numbers(record: dict[str, Any], required: tuple[str, ...]) -> str:
    for key in required:
        if key not in record:
            return f"no {key}"
    for key in (*COUNTS, *MEASURED):
        value = record.get(key, 0)
        absent = value is None and key == "swapped_loss"
        if not absent and not is_number(value, finite=key in COUNTS):
            return f"{key} is {_shown(value)}"
    return ""


def _of_evaluation(measured: dict[str, Any]) -> str:
    gains = measured.get("visual_gain")
    gain = gains.get("blank") if isinstance(gains, dict) else None
    if not isinstance(gain, dict):
        return "no visual_gain over blank"
    for key in ("task", "metric", "data"):
        if not isinstance(measured.get(key), str):
            return f"{key} is {_shown(measured.get(key))}"
    for figures, keys in ((measured, (*INTERVAL, "blank")), (gain, INTERVAL)):
        for key in keys:
            if key not in figures or not (figures[key] is None or is_number(figures[key])):
                return f"{key} is {_shown(figures[key])}" if key in figures else f"no {key}"
    return ""


def _of_best(best: dict[str, Any]) -> str:
    numbers = [best.get("step"), best.get("value")]
    usable = all(map(is_number, numbers)) and isinstance(best.get("by"), str)
    return "" if usable else "no step, value and measure"


def _shown(value: Any) -> str:
    if isinstance(value, dict | list):
        return "a list" if isinstance(value, list) else "a mapping"
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 2**63:
        return "a number that is too large"
    return f"{value!r:.50}"
