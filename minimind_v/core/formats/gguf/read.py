"""Read a model from its two files, `model.gguf` and `mmproj.gguf`.

A model whose vision encoder llama.cpp cannot compute is the first file alone, and is read as a text-only base.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from minimind_v.core.data.tokenizer import Tokenizer
from minimind_v.core.errors import MissingInput, WeightsError
from minimind_v.core.formats.gguf import language, tokenizer, vision
from minimind_v.core.formats.gguf.file import LANGUAGE_ONLY, MADE_BY, SOURCE, STAGE, Reader
from minimind_v.core.formats.vision_tower import StoredTower

MODEL, MMPROJ, MODELFILE = "model.gguf", "mmproj.gguf", "Modelfile"


def is_gguf(path: Path) -> bool:
    """Whether a path is a GGUF file, by its first bytes, or a folder with `model.gguf`."""
    if path.is_dir():
        return (path / MODEL).is_file()
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def read_gguf(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors under the published names, in fp32, and their description: `stage` and `model`.

    `path` is the folder or the language model in it. Raises MissingInput where one of the two files is absent,
    WeightsError where mmv did not write them.
    """
    reader = _open(path)
    if LANGUAGE_ONLY in reader.keys:
        config = language.read_config(reader)
        return language.read_tensors(reader, config), {"stage": "lm", "model": asdict(config)}
    mmproj, config = _open_mmproj(path), language.read_config(reader)
    tensors = language.read_tensors(reader, config) | vision.read_projector(mmproj)
    return tensors, {"stage": reader.key(STAGE), "model": asdict(config)}


def read_vision_tower(path: Path) -> StoredTower:
    """The vision tower in the folder `path`, or beside the file."""
    return vision.read_stored(_open_mmproj(path))


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer inside the language model's file."""
    return tokenizer.read_tokenizer(_open(path))


def describe_gguf(path: Path) -> dict[str, Any]:
    """The sizes, types and origin of a GGUF file of any program."""
    reader = _open(path)
    arch = reader.key("general.architecture")
    types = Counter(reader.gguf.GGMLQuantizationType(entry.type).name for entry in reader.entries.values())
    facts = {
        "kind": "gguf",
        "file": str(reader.path),
        "architecture": arch,
        "name": reader.keys.get("general.name"),
        "parameters": sum(entry.count for entry in reader.entries.values()),
        "types": ", ".join(f"{count} {type}" for type, count in types.most_common()),
        "bytes": reader.path.stat().st_size,
        "stage": reader.keys.get(STAGE),
        "source": reader.keys.get(SOURCE),
        "made_by": reader.keys.get(MADE_BY),
    }
    sizes = {
        name: value for name, value in reader.keys.items()
        if name.startswith(f"{arch}.") and isinstance(value, int | float | str)
    }  # fmt: skip
    return {name: value for name, value in (facts | sizes).items() if value is not None}


def _open(path: Path) -> Reader:
    return Reader(path / MODEL if path.is_dir() else path)


def _open_mmproj(path: Path) -> Reader:
    mmproj = (path if path.is_dir() else path.parent) / MMPROJ
    if not mmproj.is_file():
        if LANGUAGE_ONLY in _open(path).keys:
            raise WeightsError(f"{path}: the language model alone, which cannot encode images — use the model that it "
                               "was converted from")  # fmt: skip
        raise MissingInput(f"{mmproj} is missing, so the model cannot encode images — put it beside {MODEL} again")
    reader = Reader(mmproj)
    reader.key(MADE_BY)
    return reader
