"""GGUF files that ask for more than they say, byte for byte."""

from __future__ import annotations

import struct

U8, U32, STRING, ARRAY, U64 = 0, 4, 8, 9, 10


def text(value):
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def key(name, type, value):
    return text(name) + struct.pack("<I", type) + value


def array(type, count, data=b""):
    return struct.pack("<IQ", type, count) + data


def tensor(name, dims, type=0, offset=0):
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, type, offset)


def file(keys=(), tensors=(), data=b"", counts=None, version=3):
    ours = key("general.architecture", STRING, text("llama"))
    counts = counts or (len(tensors), 1 + len(keys))
    head = b"GGUF" + struct.pack("<IQQ", version, *counts) + ours + b"".join(keys) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + data


def bombs():
    """Name → bytes, and words of the line that refuses them."""
    entry = key("a", U8, b"\1")
    return {
        "tensors": (file(counts=(2**60, 1)), "tensors; the maximum is"),
        "keys": (file(counts=(0, 2**60)), "keys; the maximum is"),
        "few_keys": (file(counts=(0, 9000)), "not a GGUF file"),
        "array": (file([key("a", ARRAY, array(U8, 2**40))]), "an array of"),
        "array_64": (file([key("a", ARRAY, array(U64, 2**61))]), "an array of"),
        "short_array": (file([key("a", ARRAY, array(U64, 100_000))]), "bytes at byte"),
        "strings": (file([key("a", ARRAY, array(STRING, 2_000_000))], data=bytes(1000)), "bytes at byte"),
        "nested": (file([key("a", ARRAY, array(ARRAY, 1) * 100_000)]), "an array of type 9"),
        "arrays": (
            file([key(f"a{n}", ARRAY, array(U8, 900_000, bytes(900_000))) for n in range(3)]),
            "2,097,152 in all",
        ),
        "string": (file([key("a", STRING, struct.pack("<Q", 2**62))]), "a text of"),
        "name": (file([text(b"a" * 70_000) + struct.pack("<I", U8) + b"\1"]), "a text of 70,000 bytes"),
        "no_text": (file([key("a", STRING, text(b"\xff\xfe"))]), "not a GGUF file"),
        "twice": (file([entry, entry]), "the key a occurs twice"),
        "type": (file([key("a", 77, b"\1")]), "a value of type 77"),
        "version": (file(version=9), "format version is 9"),
        "alignment": (
            file([key("general.alignment", U32, struct.pack("<I", 2**31))]),
            "general.alignment is 2147483648",
        ),
        "alignment_0": (file([key("general.alignment", U32, bytes(4))]), "general.alignment is 0"),
        "alignment_text": (file([key("general.alignment", STRING, text("32"))]), "general.alignment is '32'"),
        "dims": (file(tensors=[tensor("t", [2**40, 2**40])]), "ends after the end of the file"),
        "wrap": (file(tensors=[tensor("t", [2**63, 2, 2])], data=bytes(64)), "ends after the end of the file"),
        "zero": (file(tensors=[tensor("t", [0, 2**40])], data=bytes(64)), "not a whole number of blocks"),
        "many_dims": (file(tensors=[text("t") + struct.pack("<I", 2**31)]), "dimensions; the maximum is 4"),
        "offset": (file(tensors=[tensor("t", [4], offset=2**63)], data=bytes(64)), "ends after the end of the file"),
        "kind": (file(tensors=[tensor("t", [4], type=999)], data=bytes(64)), "unknown type 999"),
        "block": (file(tensors=[tensor("t", [33], type=8)], data=bytes(64)), "not a whole number of blocks of 32"),
        "names": (file(tensors=[tensor("t", [4]), tensor("t", [4], offset=32)], data=bytes(64)), "occurs twice"),
        "overlap": (file(tensors=[tensor("t", [8]), tensor("u", [8], offset=4)], data=bytes(64)), "u overlaps another"),
    }
