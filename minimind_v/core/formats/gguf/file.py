"""Reading and writing one GGUF file, and its number types."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from minimind_v.core.errors import MissingInput, UsageError, WeightsError, nearest
from minimind_v.core.formats.gguf.header import read_header

# What the `gguf` package can write. Half of each: the type of a language model's matrices, and that of the vision
# tower's, which is never squeezed below eight bits: it is what the model sees with, and small enough.
QUANTIZATIONS = {
    "f32": "f32",
    "f16": "f16",
    "bf16": "f16",
    "q8_0": "q8_0",
    "q5_1": "q8_0",
    "q5_0": "q8_0",
    "q4_1": "q8_0",
    "q4_0": "q8_0",
}
MADE_BY = "minimind_v.made_by"  # the key by which a file of ours is known
STAGE, SOURCE = "minimind_v.stage", "minimind_v.source"


def need_gguf() -> Any:
    """The `gguf` package. Raises MissingInput, with the command that installs it, where it is absent."""
    try:
        import gguf
    except ImportError:
        raise MissingInput("GGUF needs the `gguf` package — pip install 'minimind-v[gguf]'") from None
    return gguf


def check_quantization(name: str) -> None:
    """Raises UsageError where `name` is no type that can be written."""
    if name not in QUANTIZATIONS:
        choices = ", ".join(QUANTIZATIONS)
        raise UsageError(f"--quantize {name!r} must be one of {choices}{nearest(name, QUANTIZATIONS)}")


class Writer:
    """Collects keys and tensors, and writes them as one file. Numbers change their type only as they are written."""

    def __init__(self, path: Path, arch: str, type: str) -> None:
        self.gguf = need_gguf()
        self.type = self.gguf.GGMLQuantizationType[type.upper()]
        self.file = self.gguf.GGUFWriter(path, arch)
        self.tensors: list[tuple[str, Tensor, Any]] = []
        self.file.add_quantization_version(self.gguf.GGML_QUANT_VERSION)
        self.file.add_file_type(self.gguf.LlamaFileType[f"{'ALL' if type == 'f32' else 'MOSTLY'}_{type.upper()}"])

    def matrix(self, name: str, tensor: Tensor) -> None:
        """A tensor that is multiplied with: in the file's type, or in f16 where its rows are no whole blocks."""
        block, _ = self.gguf.GGML_QUANT_SIZES[self.type]
        self._add(name, tensor, self.type if tensor.shape[-1] % block == 0 else self.gguf.GGMLQuantizationType.F16)

    def embedding(self, name: str, tensor: Tensor) -> None:
        """The embeddings, which are the head as well: never below eight bits."""
        block, size = self.gguf.GGML_QUANT_SIZES[self.type]
        small = (
            self.gguf.GGMLQuantizationType.Q8_0 if tensor.shape[-1] % 32 == 0 else self.gguf.GGMLQuantizationType.F16
        )
        self._add(name, tensor, self.type if size >= block and tensor.shape[-1] % block == 0 else small)

    def half(self, name: str, tensor: Tensor) -> None:
        """A tensor that llama.cpp takes as f32 or f16 only."""
        exact = self.type == self.gguf.GGMLQuantizationType.F32
        self._add(name, tensor, self.type if exact else self.gguf.GGMLQuantizationType.F16)

    def exact(self, name: str, tensor: Tensor) -> None:
        """A tensor that is small, or delicate: f32 in every file."""
        self._add(name, tensor, self.gguf.GGMLQuantizationType.F32)

    def _add(self, name: str, tensor: Tensor, type: Any) -> None:
        if type == self.gguf.GGMLQuantizationType.F16 and float(tensor.abs().max()) > float(np.finfo(np.float16).max):
            raise WeightsError(f"{name} does not fit in f16: its values are too large — use --quantize f32 or bf16")
        self.tensors.append((name, tensor.detach(), type))
        block, size = self.gguf.GGML_QUANT_SIZES[type]
        self.file.add_tensor_info(name, tensor.shape, np.dtype(np.float32), tensor.numel() // block * size, type)

    def close(self) -> None:
        """Write everything."""
        self.file.write_header_to_file()
        self.file.write_kv_data_to_file()
        self.file.write_ti_data_to_file()
        for _, tensor, type in self.tensors:
            numbers = np.ascontiguousarray(tensor.float().cpu().numpy())
            self.file.write_tensor_data(self.gguf.quantize(numbers, type))
        self.file.close()


class Reader:
    """Keys and tensors of a file, as numbers again."""

    def __init__(self, path: Path) -> None:
        gguf = need_gguf()
        if not path.is_file():
            raise MissingInput(f"no file {path}")
        sizes = {int(type): size for type, size in gguf.GGML_QUANT_SIZES.items()}
        try:
            header = read_header(path, sizes)
        except (ValueError, OSError) as error:
            raise WeightsError(f"{path}: truncated, damaged or not a GGUF file ({error}) — convert again") from None
        self.gguf, self.path = gguf, path
        self.keys: Mapping[str, Any] = header.keys
        self.places = header.tensors

    def key(self, name: str) -> Any:
        """A value. Raises WeightsError where it is not there."""
        if name not in self.keys:
            raise WeightsError(f"{self.path}: not written by `mmv convert --to gguf` (it has no {name})")
        return self.keys[name]

    def number(self, name: str, kind: type[int | float] = int) -> Any:
        """A key's number. Raises WeightsError where there is none, or something else."""
        value = self.key(name)
        if type(value) not in (int, kind):
            raise WeightsError(f"{self.path}: {name} is {value!r}, not a number — convert again")
        return value

    def tensor(self, name: str, *shape: int) -> Tensor:
        """A tensor of a shape as float32. Raises WeightsError where it is not there, or of another shape."""
        place = self.places.get(name)
        if place is None:
            raise WeightsError(f"{self.path}: not written by `mmv convert --to gguf` (it has no tensor {name})")
        if place.shape != shape:
            raise WeightsError(f"{self.path}: {name} is {list(place.shape)}, not {list(shape)} — convert again")
        import torch

        type = self.gguf.GGMLQuantizationType(place.type)
        stored = np.memmap(self.path, np.uint8, "r", place.begin, (place.bytes,))
        dtype = {"F32": np.float32, "F16": np.float16}.get(type.name)
        data = (
            stored.view(dtype).reshape(place.shape)
            if dtype
            else stored.reshape(self.gguf.quant_shape_to_byte_shape(place.shape, type))
        )
        try:
            return torch.from_numpy(np.array(self.gguf.dequantize(data, type), dtype=np.float32))
        except NotImplementedError:
            raise WeightsError(f"{self.path}: {name} has the unsupported type {type.name} — convert again") from None
