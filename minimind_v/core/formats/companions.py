"""The vision model and the tokenizer of a checkpoint: recorded when it is saved, found when it is loaded.

A record holds two paths of each, the one that the run was given and the one from the folder of the weights, so that
folders which move together are found wherever they are. A digest of what it computes tells it from any other of the
same size.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from minimind_v.core.config.schema import VisionSpec
from minimind_v.core.config.settings import read_settings
from minimind_v.core.data.tokenizer import Tokenizer
from minimind_v.core.errors import MmvError
from minimind_v.core.model.vision.spec import tower_type

RECORD = "trained_with"  # the key of all this in the description of weights


@dataclass(frozen=True)
class Companion:
    """A vision model or a tokenizer, by the places where it may be, the likeliest first."""

    places: tuple[Path, ...]
    digest: str | None = None  # None: of an older run, which did not record it


@dataclass(frozen=True)
class Companions:
    """What weights were trained with; None where nothing says so."""

    vision_model: Companion | None = None
    tokenizer: Companion | None = None
    layout: str = "chatml"  # of the prompts: one of CHAT_LAYOUTS


UNKNOWN = Companions()


def vision_digest(spec: VisionSpec, tensors: Mapping[str, Tensor]) -> str:
    """Tells a vision model from others of its sizes by its biases and norms, the same in half and in full precision."""
    digest = hashlib.blake2b(spec.identity.encode(), digest_size=8)
    unused = tower_type(spec.model_type).unused
    for name, tensor in sorted(tensors.items()):
        if tensor.ndim == 1 and not name.startswith(unused):
            digest.update(f"{name} {len(tensor)};".encode())
            digest.update(tensor.detach().cpu().half().numpy().tobytes())
    return digest.hexdigest()


def tokenizer_digest(tokenizer: Tokenizer) -> str:
    """Tells a tokenizer from others of its size by the ids of its tokens."""
    ids = json.dumps(sorted(tokenizer.backend.get_vocab().items()))
    return hashlib.blake2b(ids.encode(), digest_size=8).hexdigest()


def as_record(companions: Companions, folder: Path) -> dict[str, Any]:
    """The record for the description of weights in `folder`."""
    record: dict[str, Any] = {}
    for name in ("vision_model", "tokenizer"):
        if companion := getattr(companions, name):
            place = next((place for place in companion.places if place.exists()), companion.places[0])
            paths = [_seen_from(folder, place), str(companion.places[-1])]
            record[name] = {"paths": paths, "digest": companion.digest}
    if record or companions.layout != UNKNOWN.layout:
        record["layout"] = companions.layout
    return record


def read_record(record: Any, folder: Path) -> Companions:
    """The companions that the description of weights in `folder` names."""
    record = record if isinstance(record, dict) else {}
    layout = record.get("layout")
    return Companions(
        _read(record.get("vision_model"), folder),
        _read(record.get("tokenizer"), folder),
        layout if isinstance(layout, str) else UNKNOWN.layout,
    )


def of_the_run(weights: Path) -> Companions:
    """The companions that `config.yaml` in the run's folder names: for weights that have no record themselves."""
    if not weights.is_file():
        return UNKNOWN
    folder = weights.with_name(weights.stem.removesuffix("_best"))
    try:
        config = read_settings(folder / "config.yaml")
        out = Path(config["out"])
        given = {"vision_model": Path(config["vision_model"]), "tokenizer": Path(config["data.tokenizer"])}
    except (OSError, KeyError, TypeError, MmvError):  # no run, or no longer the file that it wrote
        return UNKNOWN
    found = {}
    for name, path in given.items():
        places = [path]
        if path.is_absolute() == out.is_absolute():  # so the way from one to the other is known
            places.insert(0, tidy(_resolved(folder.parent) / os.path.relpath(path, out)))
        found[name] = Companion(tuple(places))
    return Companions(**found, layout=config.get("data.layout", UNKNOWN.layout))


def _read(record: Any, folder: Path) -> Companion | None:
    paths = record.get("paths") if isinstance(record, dict) else None
    if not isinstance(paths, list) or not paths or not all(isinstance(path, str) for path in paths):
        return None
    beside, *given = paths
    digest = record.get("digest")
    places = (tidy(_resolved(folder) / beside), *map(Path, given))
    return Companion(places, digest if isinstance(digest, str) else None)


def _seen_from(folder: Path, path: Path) -> str:
    """The path of something from a folder, or as it is where they are on different drives."""
    path = _resolved(path.parent) / path.name
    try:
        return os.path.relpath(path, _resolved(folder))
    except ValueError:
        return str(path)


def _resolved(path: Path) -> Path:
    return Path(os.path.realpath(path))


def tidy(path: Path) -> Path:
    """An absolute path without `..`, and from the working folder where it lies in it."""
    path = Path(os.path.normpath(path))
    here = _resolved(Path())
    return path.relative_to(here) if path.is_relative_to(here) else path
