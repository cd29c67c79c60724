"""Check the contents of a torch file before torch loads it.

torch believes the sizes in a file: a compressed record, a tensor of 10¹⁰ numbers over a storage of one, and a call that
doubles a text thirty times all exhaust the memory. This module reads the zip's directory and the pickle first, with
only sizes in place of storages and tensors, and compares these with the size of the file.
"""

from __future__ import annotations

import io
import pickle
import struct
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import torch

from minimind_v.core.rows.members import ENCRYPTED, PIECE, STORED, Member, directory, entries

MOST_TENSORS = 10_000  # of a file: ten times those of a large vision-language model
MOST_PICKLE = 2 << 20  # bytes of the names and sizes of so many tensors, and of values saved beside them
_MOST_CALLS = 5 * MOST_TENSORS  # in a pickle: a parameter takes five
_MOST_COPIES = 1 << 20  # entries and letters that they may copy
_MOST_VIEWS = 4  # how many tensors may share each number of a file: tied weights are two

_LOCAL = 30  # bytes of the header before a record, without its name
_END, _END64, _LOCATOR = 22, 56, 20  # bytes of what ends a zip; the last two are of a large one


def check_torch_file(path: Path, whole: bool = True) -> None:
    """Raise pickle.UnpicklingError, ValueError or another error of a reader where torch did not write a file.

    `whole`: also where a byte has changed since, which torch itself never notices. This reads the file.
    """
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(0)
        if file.read(4) == b"PK\x03\x04":
            _check_zip(file, size, whole)
        else:
            file.seek(0)
            _check_old(file, size)


# --- the zip ----------------------------------------------------------------------------------------------------------


def _check_zip(file: BinaryIO, size: int, whole: bool) -> None:
    records = _read_directory(file, size)
    root = next(iter(records), "").partition("/")[0]  # torch takes the folder of the first record
    pickled = records.get(f"{root}/data.pkl")
    length = pickled.size if pickled else 0
    if pickled is None or not length or length > MOST_PICKLE:
        raise ValueError(f"its data.pkl has {length:,} bytes; the maximum is {MOST_PICKLE:,}")
    _seek(file, pickled)
    sizes = {name: record.size for name, record in records.items()}
    outline = Outline(io.BytesIO(file.read(length)), sizes, f"{root}/data/")
    outline.load()
    outline.check_views()
    for name, record in records.items() if whole else ():
        _check_sum(file, name, record)


def _seek(file: BinaryIO, record: Member) -> None:
    """Go to the data of a record, behind its header, its name and its extra fields."""
    file.seek(record.offset)
    header = file.read(_LOCAL)
    file.seek(sum(struct.unpack_from("<HH", header, 26)), 1)


def _check_sum(file: BinaryIO, name: str, record: Member) -> None:
    """Raise ValueError where the bytes of a record are not those that were written."""
    if not record.crc:  # torch was told to write none
        return
    _seek(file, record)
    crc, rest = 0, record.size
    while rest and (data := file.read(min(rest, PIECE))):
        crc, rest = zlib.crc32(data, crc), rest - len(data)
    if crc != record.crc:
        raise ValueError(f"its record {name} has other bytes than were written")


def _read_directory(file: BinaryIO, size: int) -> dict[str, Member]:
    """The records by their names in lower case: torch ignores case.

    All zip readers agree on a file only where its directory ends it, without a comment, as torch writes it.
    """
    begin, end, count, prefix = directory(file)
    file.seek(max(size - _END - _LOCATOR, 0))
    locator = file.read(_LOCATOR)
    wide = locator[:4] == b"PK\x06\x07"
    behind = _END64 + _LOCATOR + _END if wide else _END
    if prefix or size - end != behind or (wide and int.from_bytes(locator[8:16], "little") != end):
        raise ValueError("its directory is damaged")
    if count > MOST_TENSORS + 100:  # and a few records of torch's own
        raise ValueError(f"it has {count:,} records; the maximum is {MOST_TENSORS + 100:,}")
    records: dict[str, Member] = {}
    total = 0
    for _, record in entries(file, begin, end):
        name = record.raw_name.decode().lower()
        if name in records or len(records) == count:
            raise ValueError("its directory is damaged")
        if record.method != STORED or record.flags & ENCRYPTED or record.packed != record.size:
            raise ValueError(f"its record {name} is compressed, which torch never does")
        total += record.size
        if total > size or record.offset + _LOCAL + record.size > size:
            raise ValueError(f"its record {name} is larger than the file")
        records[name] = record
    if len(records) < count:
        raise ValueError("its directory is damaged")
    return records


# --- the form before 2020: pickles, then the storages -----------------------------------------------------------------


def _check_old(file: BinaryIO, size: int) -> None:
    begin = io.BytesIO(file.read(MOST_PICKLE))
    for _ in range(3):  # a magic number, the version and the machine
        Outline(begin).load()
    outline = Outline(begin)
    outline.load()
    keys = Outline(begin).load()
    stored = sum(storage.bytes + 8 for storage in outline.storages.values())
    if not isinstance(keys, list) or sorted(map(str, keys)) != sorted(outline.storages):
        raise ValueError("its storages do not match its tensors")
    if stored > size - begin.tell():
        raise ValueError("it is shorter than its tensors")
    outline.check_views()


# --- the pickle -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Storage:
    """In place of a storage."""

    dtype: torch.dtype
    count: int

    @property
    def bytes(self) -> int:
        return self.count * self.dtype.itemsize


@dataclass(frozen=True)
class _Name:
    """In place of a class, a function or a type, and of the objects that torch makes with it."""

    name: str


@dataclass
class _Tensor:
    """In place of a tensor."""

    state: Any = None


class _Mapping(dict[Any, Any]):
    """In place of an OrderedDict: it can have attributes."""


# The types in a state_dict. Opening a file runs every other name in it, so others are refused.
_TYPES = {"torch.Size", "torch.device", "torch.serialization._get_layout", "collections.OrderedDict",
          "collections.Counter", "builtins.set", "builtins.complex", "_codecs.encode"}  # fmt: skip
_CLASSES = ("torch.Tensor", "torch.nn.parameter.Parameter")  # named, never called
_WITH_ATTRIBUTES = "torch._tensor._rebuild_from_type_v2"
_REBUILD = "torch._utils._rebuild_"
_TENSORS = ("tensor", "tensor_v2", "tensor_v3", "qtensor")  # of a storage, an offset, a size and strides
_OTHERS = ("parameter", "parameter_with_state", "sparse_tensor", "meta_tensor_no_storage")
_OPERATIONS = (
    pickle.PROTO, pickle.STOP, pickle.MARK, pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.BININT, pickle.BININT1,
    pickle.BININT2, pickle.LONG1, pickle.BINFLOAT, pickle.BINUNICODE, pickle.SHORT_BINSTRING, pickle.EMPTY_TUPLE,
    pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3, pickle.EMPTY_LIST, pickle.APPEND, pickle.APPENDS,
    pickle.EMPTY_DICT, pickle.EMPTY_SET, pickle.SETITEM, pickle.SETITEMS, pickle.BINGET, pickle.LONG_BINGET,
    pickle.BINPUT, pickle.LONG_BINPUT, pickle.GLOBAL, pickle.REDUCE, pickle.BUILD, pickle.BINPERSID,
)  # fmt: skip


class Outline(pickle._Unpickler):
    """Reads a pickle of torch without the objects that it names; accepts the operations that torch accepts.

    `records` has the size of each storage in a zip, by `folder` and name; None: storages are not checked.
    """

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {}
    stack: list[Any]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, file: BinaryIO, records: Mapping[str, int] | None = None, folder: str = "") -> None:
        super().__init__(file, encoding="utf-8")
        self.records, self.folder = records, folder
        self.storages: dict[str, _Storage] = {}
        self.tensors = self.viewed = self.calls = self.copied = 0

    def check_views(self) -> None:
        """Raises ValueError where tensors have far more numbers than their storages."""
        if self.viewed > _MOST_VIEWS * sum(storage.count for storage in self.storages.values()):
            raise ValueError(f"its tensors have {self.viewed:,} numbers, far more than the file")

    def find_class(self, module: str, name: str) -> Any:
        """A stand-in for a name. Raises UnpicklingError for a name that no tensor file has."""
        path = f"{'builtins' if module == '__builtin__' else module}.{name}"
        kind = path.removeprefix(_REBUILD)
        is_read = path in (*_TYPES, *_CLASSES, _WITH_ATTRIBUTES) or kind in (*_TENSORS, *_OTHERS)
        if is_read or (module in ("torch", "torch.storage") and (_dtype_of(name) or name.startswith("per_"))):
            return _Name(path)
        raise pickle.UnpicklingError(f"GLOBAL {path.removeprefix('builtins.')}")

    def persistent_load(self, pid: Any) -> _Storage:
        """A stand-in for a storage. Raises ValueError where its bytes are not in the file."""
        self._count()
        kind, cls, key, _, count, *view = pid
        dtype = _dtype_of(cls.name.rpartition(".")[2])
        plain = kind == "storage" and isinstance(key, str) and _is_size(count) and all(each is None for each in view)
        if dtype is None or not plain:
            raise ValueError("it has a storage of an unknown kind")
        storage = _Storage(dtype, count)
        if self.storages.setdefault(key, storage) != storage:
            raise ValueError(f"its storage {key} has two sizes")
        if self.records is not None and storage.bytes > self.records.get(f"{self.folder}{key}".lower(), -1):
            raise ValueError(f"its storage {key} is larger than what is stored")
        return storage

    def load_reduce(self) -> None:
        """A call that makes a tensor or a small object."""
        self._count()
        args = self.stack.pop()
        self.stack[-1] = self._call(self.stack[-1], args)

    def _count(self) -> None:
        self.calls += 1
        if self.calls > _MOST_CALLS:
            raise ValueError(f"it has more than {MOST_TENSORS:,} tensors")

    def _call(self, function: Any, args: Any) -> Any:
        if not isinstance(function, _Name) or not isinstance(args, tuple):
            raise pickle.UnpicklingError("a call of something that is not a function")
        name = function.name
        if name == _WITH_ATTRIBUTES:
            return self._call(args[0], args[2])
        if name.removeprefix(_REBUILD) in _TENSORS:
            return self._tensor(*args[:4])
        if name.startswith(_REBUILD):
            return _Tensor()
        if name not in _TYPES:
            raise pickle.UnpicklingError(f"a call of {name}")
        self.copied += sum(len(arg) for arg in args if hasattr(arg, "__len__"))
        plain = name != "_codecs.encode" or args[1:] == ("latin1",)  # other codecs make more of less
        if self.copied > _MOST_COPIES or not plain or (name == "builtins.set" and not _are_keys(*args)):
            raise pickle.UnpicklingError(f"a call of {name} that a state_dict never contains")
        return _Mapping() if name in ("collections.OrderedDict", "collections.Counter") else function

    def _tensor(self, storage: Any, offset: Any, size: Any, strides: Any) -> _Tensor:
        """Check that each number of a tensor has its own position in the storage."""
        numbers = (offset, *size, *strides)
        plain = all(map(_is_size, numbers)) and len(size) == len(strides) <= 16
        if not isinstance(storage, _Storage) or not plain:
            raise ValueError("it has a tensor of an unknown kind")
        count, last = prod(size), offset + sum((n - 1) * stride for n, stride in zip(size, strides, strict=True))
        if count and (count > storage.count or last >= storage.count):
            raise ValueError(f"its tensor of {list(size)} is larger than what is stored, {storage.count:,} numbers")
        self.tensors += 1
        self.viewed += count
        if self.tensors > MOST_TENSORS:
            raise ValueError(f"it has more than {MOST_TENSORS:,} tensors")
        return _Tensor()

    def load_build(self) -> None:
        """Attributes, which nothing here reads."""
        self.stack.pop()
        if not isinstance(self.stack[-1], _Mapping | _Tensor):
            raise pickle.UnpicklingError("attributes on an object that has none")

    def load_setitem(self) -> None:
        """An entry of a dict."""
        value, key = self.stack.pop(), self.stack.pop()
        self._set({key: value} if _are_keys([key]) else None)

    def load_setitems(self) -> None:
        """Entries of a dict."""
        items = self.pop_mark()
        self._set(dict(zip(items[::2], items[1::2], strict=True)) if _are_keys(items[::2]) else None)

    def _set(self, items: dict[Any, Any] | None) -> None:
        if items is None or not isinstance(self.stack[-1], dict):
            raise pickle.UnpicklingError("an entry that a state_dict never contains")
        self.stack[-1].update(items)

    def refuse(self) -> None:
        """An operation that torch does not use."""
        raise pickle.UnpicklingError("an operation that torch never uses")


Outline.dispatch = dict.fromkeys(range(256), Outline.refuse)
Outline.dispatch |= {code[0]: pickle._Unpickler.dispatch[code[0]] for code in _OPERATIONS}
Outline.dispatch |= {
    pickle.REDUCE[0]: Outline.load_reduce,
    pickle.BUILD[0]: Outline.load_build,
    pickle.SETITEM[0]: Outline.load_setitem,
    pickle.SETITEMS[0]: Outline.load_setitems,
}


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**62


def _are_keys(values: Any) -> bool:
    """Whether values are plain keys of dicts: the hash of deeply nested tuples ends the process."""
    return all(isinstance(value, str | int | float | bytes | None) for value in values)


def _dtype_of(name: str) -> torch.dtype | None:
    """The dtype that `torch.NAME` is, or that a storage of this name has."""
    if name == "UntypedStorage":
        return torch.uint8
    kind = getattr(torch, name, None) if not name.startswith("_") else None
    dtype = getattr(kind, "dtype", kind) if name.endswith("Storage") else kind
    return dtype if isinstance(dtype, torch.dtype) else None
