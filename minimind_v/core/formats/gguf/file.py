"""Read and write one GGUF file, and its number types."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from minimind_v.core.errors import MissingInput, UsageError, WeightsError, nearest
from minimind_v.core.formats.gguf.header import read_header

# The type of the language model's matrices, as the `gguf` package can write it, and that of the vision tower's, which
# is never below eight bits: the tower is small, and all features depend on it.
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
OURS = "minimind_v."  # how the keys begin that only mmv reads
MADE_BY, STAGE, SOURCE = f"{OURS}made_by", f"{OURS}stage", f"{OURS}source"
LANGUAGE_ONLY = f"{OURS}language_only"  # the key of a model whose vision encoder llama.cpp cannot hold


def need_gguf() -> Any:
    """Import the `gguf` package. Raises MissingInput, with the command that installs it, where it is absent."""
    try:
        import gguf
    except ImportError:
        raise MissingInput("GGUF needs the `gguf` package — pip install 'minimind-v[gguf]'") from None
    return gguf


def check_quantization(name: str) -> None:
    """Raises UsageError where `name` is not one of QUANTIZATIONS."""
    if name not in QUANTIZATIONS:
        choices = ", ".join(QUANTIZATIONS)
        raise UsageError(f"--quantize {name!r} must be one of {choices}{nearest(name, QUANTIZATIONS)}")


class Writer:
    """Collects keys and tensors, and writes them as one file. Numbers change their type only when they are written."""

    def __init__(self, path: Path, arch: str, type: str) -> None:
        self.gguf = need_gguf()
        self.types = self.gguf.GGMLQuantizationType
        self.type = self.types[type.upper()]
        self.file = self.gguf.GGUFWriter(path, arch)
        self.tensors: list[tuple[str, Tensor, Any]] = []
        self.file.add_quantization_version(self.gguf.GGML_QUANT_VERSION)
        self.file.add_file_type(self.gguf.LlamaFileType[f"{'ALL' if type == 'f32' else 'MOSTLY'}_{type.upper()}"])

    def matrix(self, name: str, tensor: Tensor) -> None:
        """Add a matrix: in the file's type, or in f16 where its rows are not whole blocks."""
        block, _ = self.gguf.GGML_QUANT_SIZES[self.type]
        self._add(name, tensor, self.type if tensor.shape[-1] % block == 0 else self.types.F16)

    def embedding(self, name: str, tensor: Tensor) -> None:
        """Add the embeddings, which are also the head: never below eight bits."""
        block, size = self.gguf.GGML_QUANT_SIZES[self.type]
        small = self.types.Q8_0 if tensor.shape[-1] % 32 == 0 else self.types.F16
        self._add(name, tensor, self.type if size >= block and tensor.shape[-1] % block == 0 else small)

    def half(self, name: str, tensor: Tensor) -> None:
        """Add a tensor that llama.cpp reads as f32 or f16 only."""
        self._add(name, tensor, self.type if self.type == self.types.F32 else self.types.F16)

    def exact(self, name: str, tensor: Tensor) -> None:
        """Add a small or delicate tensor: f32 in every file."""
        self._add(name, tensor, self.types.F32)

    def _add(self, name: str, tensor: Tensor, type: Any) -> None:
        if type == self.types.F16 and float(tensor.abs().max()) > float(np.finfo(np.float16).max):
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
    """Reads the keys and tensors of a file, tensors as float32."""

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
        self.keys, self.entries = header.keys, header.tensors

    def key(self, name: str) -> Any:
        """The value of a key. Raises WeightsError where it is missing."""
        if name not in self.keys:
            raise WeightsError(f"{self.path}: not written by `mmv convert --to gguf` (it has no {name})")
        return self.keys[name]

    def number(self, name: str, kind: type[int | float] = int) -> Any:
        """The number of a key. Raises WeightsError where it is missing, or no number of `kind`."""
        value = self.key(name)
        if type(value) not in (int, kind):
            raise WeightsError(f"{self.path}: {name} is {value!r}, not a number — convert again")
        return value

    def tensor(self, name: str, *shape: int) -> Tensor:
        """A tensor of a shape as float32. Raises WeightsError where it is missing, or has another shape."""
        entry = self.entries.get(name)
        if entry is None:
            raise WeightsError(f"{self.path}: not written by `mmv convert --to gguf` (it has no tensor {name})")
        if entry.shape != shape:
            raise WeightsError(f"{self.path}: {name} is {list(entry.shape)}, not {list(shape)} — convert again")
        import torch

        type = self.gguf.GGMLQuantizationType(entry.type)
        stored = np.memmap(self.path, np.uint8, "r", entry.begin, (entry.bytes,))
        if dtype := {"F32": np.float32, "F16": np.float16}.get(type.name):
            data = stored.view(dtype).reshape(entry.shape)
        else:
            data = stored.reshape(self.gguf.quant_shape_to_byte_shape(entry.shape, type))
        try:
            return torch.from_numpy(np.array(self.gguf.dequantize(data, type), dtype=np.float32))
        except NotImplementedError:
            raise WeightsError(f"{self.path}: {name} has the unsupported type {type.name} — convert again") from None
