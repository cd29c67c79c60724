"""The vision model and the tokenizer of a checkpoint: recorded when it is saved, found when it is loaded.

A record holds two paths of each: the one given to the run, and the one relative to the folder of the weights, so that
folders which move together are found again. A digest of what it computes distinguishes it from others of its size.
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

from minimind_v.core.config.schema import TextConfig, VisionSpec
from minimind_v.core.config.settings import read_settings
from minimind_v.core.data.tokenizer import Tokenizer
from minimind_v.core.errors import MmvError
from minimind_v.core.model.vision.spec import tower_type

RECORD = "trained_with"  # the key of the record in the description of weights


@dataclass(frozen=True)
class Companion:
    """A vision model or a tokenizer, by the paths where it may be, the likeliest first."""

    paths: tuple[Path, ...]
    digest: str | None = None  # None: an older run did not record it


@dataclass(frozen=True)
class Companions:
    """What weights were trained with; None: unknown."""

    vision_model: Companion | None = None
    tokenizer: Companion | None = None
    layout: str | None = None  # of the prompts, one of CHAT_LAYOUTS; None: that of the tokenizer
    ignored: str = ""  # the sentence about a run folder that is not that of the weights


UNKNOWN = Companions()


def vision_digest(spec: VisionSpec, tensors: Mapping[str, Tensor]) -> str:
    """The digest of a vision model's spec, biases and norms; half and full precision give the same."""
    digest = hashlib.blake2b(spec.identity.encode(), digest_size=8)
    unused = tower_type(spec.model_type).unused
    for name, tensor in sorted(tensors.items()):
        if tensor.ndim == 1 and not name.startswith(unused):
            digest.update(f"{name} {len(tensor)};".encode())
            digest.update(tensor.detach().cpu().half().numpy().tobytes())
    return digest.hexdigest()


def tokenizer_digest(tokenizer: Tokenizer) -> str:
    """The digest of a tokenizer's tokens and their ids."""
    ids = json.dumps(sorted(tokenizer.backend.get_vocab().items()))
    return hashlib.blake2b(ids.encode(), digest_size=8).hexdigest()


def as_record(companions: Companions, folder: Path) -> dict[str, Any]:
    """The record for the description of weights in `folder`."""
    record: dict[str, Any] = {}
    for name in ("vision_model", "tokenizer"):
        if companion := getattr(companions, name):
            path = next(filter(Path.exists, companion.paths), companion.paths[0])
            paths = [_relative_to(folder, path), str(companion.paths[-1])]
            record[name] = {"paths": paths, "digest": companion.digest}
    if companions.layout:
        record["layout"] = companions.layout
    return record


def read_record(record: Any, folder: Path) -> Companions:
    """The companions that the description of weights in `folder` names."""
    record = record if isinstance(record, dict) else {}
    layout = record.get("layout")
    return Companions(
        _read(record.get("vision_model"), folder),
        _read(record.get("tokenizer"), folder),
        layout if isinstance(layout, str) else None,
    )


def of_the_run(weights: Path, sizes: Mapping[str, Any]) -> Companions:
    """The companions that `config.yaml` in the run folder names, for weights of these sizes without a record."""
    if not weights.is_file():
        return UNKNOWN
    folder = run_folder_of(weights)
    if trouble := trouble_of_run(folder, sizes):
        return Companions(ignored=f"{trouble} than {weights}: it is ignored")
    config = run_settings(folder)
    try:
        out = Path(config["out"])
        paths = {"vision_model": Path(config["vision_model"]), "tokenizer": Path(config["data.tokenizer"])}
    except (KeyError, TypeError):  # no run, or its file was changed
        return UNKNOWN
    companions: dict[str, Any] = {"layout": config.get("data.layout")}
    for name, path in paths.items():
        moved: tuple[Path, ...] = ()
        if path.is_absolute() == out.is_absolute():  # so the relative path is known
            moved = (tidy(_resolved(folder.parent) / os.path.relpath(path, out)),)
        companions[name] = Companion((*moved, path))
    return Companions(**companions)


def run_folder_of(weights: Path) -> Path:
    """The folder that has the records of the run of some weights, if there was one."""
    return weights.with_suffix("").with_name(weights.stem.removesuffix("_best"))


def run_settings(folder: Path) -> dict[str, Any]:
    """The settings in a run folder's `config.yaml`; none where it is missing or no longer readable."""
    try:
        return read_settings(folder / "config.yaml")
    except (OSError, MmvError):
        return {}


def trouble_of_run(folder: Path, sizes: Mapping[str, Any]) -> str | None:
    """Why a run folder is not that of weights of these sizes: files of both generations have the same names."""
    config = run_settings(folder)
    if not config:
        return None
    recorded = {"qk_norm": TextConfig.qk_norm}  # older releases did not record it
    recorded |= {name: config[f"model.{name}"] for name in sizes if f"model.{name}" in config}
    others = [
        f"{name} {recorded.get(name)}, not {size}" for name, size in sizes.items() if recorded.get(name, size) != size
    ]
    return f"{folder} is the run of another model ({', '.join(others[:2])})" if others else None


def _read(record: Any, folder: Path) -> Companion | None:
    paths = record.get("paths") if isinstance(record, dict) else None
    if not isinstance(paths, list) or not paths or not all(isinstance(path, str) for path in paths):
        return None
    digest = record.get("digest")
    return Companion(
        (tidy(_resolved(folder) / paths[0]), *map(Path, paths[1:])), digest if isinstance(digest, str) else None
    )


def _relative_to(folder: Path, path: Path) -> str:
    """A path relative to a folder, or unchanged where they are on different drives."""
    path = _resolved(path.parent) / path.name
    try:
        return os.path.relpath(path, _resolved(folder))
    except ValueError:
        return str(path)


def _resolved(path: Path) -> Path:
    return Path(os.path.realpath(path))


def tidy(path: Path) -> Path:
    """An absolute path without `..`, relative to the working folder if it is inside."""
    path = Path(os.path.normpath(path))
    working_folder = _resolved(Path())
    return path.relative_to(working_folder) if path.is_relative_to(working_folder) else path
