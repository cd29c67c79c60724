"""Read tensor files without running code; each kind of wrong file has its own error."""

from __future__ import annotations

import codecs
import pickle
import re
import textwrap
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minimind_v.core.errors import RunError, WeightsError
from minimind_v.core.formats.torch_files import MOST_TENSORS, check_torch_file
from minimind_v.core.hub.sources import ROWS, WEIGHTS_ENDINGS
from minimind_v.core.rows.row import PICTURE_BEGINNINGS

_WRAPPERS = ("model_state_dict", "state_dict", "model")  # keys under which other programs keep the weights
_MOST_HEADER = 8 << 20  # bytes of the names and sizes of a safetensors file


def read_tensors(path: Path, without: tuple[str, ...] = ()) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a `.pth` or `.safetensors` file, by its contents, and a safetensors file's metadata.

    Tensors whose names begin with one of `without` are left out; a safetensors file's are not even read.
    """
    if _sniff(path) == "safetensors":
        return _read_safetensors(path, without)
    return {name: tensor for name, tensor in _read_pth(path).items() if not name.startswith(without)}, {}


def _sniff(path: Path) -> str:
    """The format of a file, by its first bytes. Raises WeightsError for other files."""
    with path.open("rb") as file:
        head = file.read(512)
    if not head:
        raise WeightsError(f"{path}: the file is empty — download it again")
    if head[8:9] == b"{":  # first of all: the length before it may begin with the byte of a pickle
        return "safetensors"
    if head[:4] == b"PK\x03\x04" or head[:1] == b"\x80":
        return "pth"
    text = head.removeprefix(codecs.BOM_UTF8).lstrip()
    if text.startswith(b"<"):
        raise WeightsError(
            f"{path}: this is an HTML page, not weights — the file's web page was saved "
            f"(`/blob/` in the address); take the `/resolve/` address, or `mmv download`"
        )
    if text.startswith(b"version https://git-lfs"):
        raise WeightsError(
            f"{path}: this is a git-lfs pointer, not the weights — run `git lfs pull`, or `mmv download`"
        )
    if head.startswith(PICTURE_BEGINNINGS):
        raise WeightsError(f"{path}: this is an image file, not weights — give it with --image")
    if path.name.endswith(ROWS):
        endings = WEIGHTS_ENDINGS if path.suffix == ".json" else ()  # a description has no other
        weights = next((beside for end in endings if (beside := path.with_suffix(end)).is_file()), None)
        raise WeightsError(
            f"{path}: this describes the weights in {weights} — give that file"
            if weights else f"{path}: this is a data file, not weights — name weights here, and data with --data"
        )  # fmt: skip
    raise WeightsError(f"{path}: neither a torch nor a safetensors file — download it again")


def _read_pth(path: Path) -> dict[str, Tensor]:
    try:
        # A file, not its name: torch goes by the ending of a name. Its warnings are about files that are refused here.
        with path.open("rb") as file, warnings.catch_warnings(action="ignore"):
            mapped = path.suffix == ".bin" and file.peek(4)[:4] == b"PK\x03\x04"  # reads only tensors that are used
            check_torch_file(path, whole=not mapped)
            state_dict = torch.load(path if mapped else file, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # torch's reader raises a dozen kinds on damaged files
        raise WeightsError(f"{path}: {_why_unreadable(error)}") from None
    for key in 2 * _WRAPPERS:  # one may contain another
        if isinstance(state_dict, Mapping) and isinstance(state_dict.get(key), Mapping):
            state_dict = state_dict[key]
    if not isinstance(state_dict, Mapping) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in state_dict.items()
    ):
        raise WeightsError(f"{path}: contains no state_dict (names and tensors), so it is not a weights file")
    return dict(state_dict)


def _why_unreadable(error: Exception) -> str:
    """Why torch did not read a file, and the next step."""
    reason = str(error)
    if named := re.search(r"GLOBAL ([\w.]+)", reason):
        return (
            f"opening the file would run code ({named[1]}), so it was not opened — "
            f"a weights file contains only tensors; get it from a source that you trust"
        )
    if isinstance(error, pickle.UnpicklingError):
        return (
            "damaged, or not a plain tensor file; opening it could run code, so it was not opened — "
            "download it again, from a source that you trust"
        )
    first = textwrap.shorten((reason or type(error).__name__).splitlines()[0], 150, placeholder=" …")
    return f"truncated or damaged ({first}) — download it again"


def check_numbers(path: Path, name: str, tensor: Tensor) -> None:
    """Raise WeightsError where a tensor has other values than finite floating-point numbers."""
    if not tensor.is_floating_point() or tensor.layout is not torch.strided or tensor.is_meta:
        kind = str(tensor.dtype if tensor.layout is torch.strided else tensor.layout).removeprefix("torch.")
        raise WeightsError(f"{path}: {name} is not plain floating point ({kind}); quantised weights are not supported")
    # As float32, like in computation: larger float64 numbers are infinite there, and torch cannot test 8-bit floats.
    numbers = tensor if tensor.element_size() in (2, 4) else tensor.float()
    # NaN and infinity are the least or the largest of any numbers; aminmax is ten times as fast as a test of each.
    if numbers.numel() and not all(bool(extreme.isfinite()) for extreme in numbers.aminmax()):
        raise WeightsError(f"{path}: {name} contains NaN or infinite values — this file is unusable")


def _read_safetensors(path: Path, without: tuple[str, ...]) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise WeightsError(f"{path}: safetensors needs a file name in UTF-8 — rename it") from None
    try:
        _check_header(path)
        with safe_open(path, framework="pt") as file:
            if (count := len(file.keys())) > MOST_TENSORS:
                raise ValueError(f"it has {count:,} tensors; the maximum is {MOST_TENSORS:,}")
            meta = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys() if not name.startswith(without)}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise WeightsError(f"{path}: {_why_unreadable(error)}") from None
    return tensors, meta


def _check_header(path: Path) -> None:
    """Raise ValueError where the names and sizes of a safetensors file are longer than the file, or absurd."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    most = min(path.stat().st_size - 8, _MOST_HEADER)
    if length > most:
        raise ValueError(f"its header has {length:,} bytes; the maximum is {most:,}")


def cast(name: str, tensor: Tensor, dtype: str) -> Tensor:
    """A tensor in another type. Raises RunError where it does not fit."""
    changed = tensor.to(getattr(torch, dtype))
    if not bool(changed.isfinite().all()):
        raise RunError(f"{name} does not fit in {dtype} — choose another --dtype")
    return changed
