"""Changes to a file's bytes: a few of many kinds at a time, each drawn from a seeded generator."""

from __future__ import annotations

import io
import json
import random
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable
from functools import cache
from typing import Any

INTEGERS = (0, -1, 1, 2, 127, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**63)
HEAD, TAIL = 256, 192  # bytes of a file where most of its lengths and counts stand
LARGEST = 3 * 2**20  # bytes that a changed file may have

Change = Callable[[bytes, random.Random], bytes]


def mutate(data: bytes, rng: random.Random, kind: str, donor: bytes = b"") -> bytes:
    """One to four changes; `kind` says which structured ones fit the file, `donor` is another file of the format."""
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 4))):
        structured = rng.random() < 0.5 and STRUCTURED.get(kind)
        change: Change = rng.choice(structured or BYTES)
        if donor and rng.random() < 0.05:
            data = splice(data, donor, rng)
        data = change(data, rng)[:LARGEST]
    return data


# --- bytes ------------------------------------------------------------------------------------------------------------


def _position(data: bytes, rng: random.Random) -> int:
    """A place in the file: often where headers and directories stand."""
    draw = rng.random()
    if draw < 0.35:
        return rng.randrange(min(len(data), HEAD) or 1)
    if draw < 0.55:
        return max(0, len(data) - 1 - rng.randrange(TAIL))
    return rng.randrange(len(data) or 1)


def _put(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


def flip_bit(data: bytes, rng: random.Random) -> bytes:
    at = _position(data, rng)
    return _put(data, at, bytes([data[at] ^ 1 << rng.randrange(8)])) if data else data


def set_bytes(data: bytes, rng: random.Random) -> bytes:
    return _put(data, _position(data, rng), rng.choice((bytes, rng.randbytes))(rng.choice((1, 1, 2, 4, 16))))


def cut(data: bytes, rng: random.Random) -> bytes:
    return data[: _position(data, rng)]


def put_integer(data: bytes, rng: random.Random) -> bytes:
    size = rng.choice((1, 2, 4, 8))
    number = rng.choice(INTEGERS) % 2 ** (8 * size)
    return _put(data, _position(data, rng), number.to_bytes(size, rng.choice(("little", "big"))))


def _block(data: bytes, rng: random.Random) -> tuple[int, int]:
    begin = _position(data, rng)
    return begin, begin + rng.choice((1, 4, 8, 30, 200, 2000))


def repeat_block(data: bytes, rng: random.Random) -> bytes:
    begin, end = _block(data, rng)
    times = rng.choice((1, 1, 2, 50, 1000)) if end - begin <= 200 else 1
    return data[:end] + data[begin:end] * times + data[end:]


def remove_block(data: bytes, rng: random.Random) -> bytes:
    begin, end = _block(data, rng)
    return data[:begin] + data[end:]


def move_block(data: bytes, rng: random.Random) -> bytes:
    begin, end = _block(data, rng)
    at = _position(data, rng)
    return data[:at] + data[begin:end] + data[at:]


def splice(data: bytes, donor: bytes, rng: random.Random) -> bytes:
    """The beginning of one file and the end of another, or a block of the other in between."""
    if rng.random() < 0.5:
        return data[: _position(data, rng)] + donor[_position(donor, rng) :]
    begin, end = _block(donor, rng)
    return _put(data, _position(data, rng), donor[begin:end])


BYTES: tuple[Change, ...] = (
    flip_bit, flip_bit, set_bytes, cut, put_integer, put_integer, repeat_block, remove_block, move_block,
)  # fmt: skip


# --- text -------------------------------------------------------------------------------------------------------------

VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 0.5, -0.0, 2**31, 2**40, 2**63, 10**400, 1e308, float("nan"), float("inf"),
    "", " ", "x", "@", "<image>", "\0", "\n", "\u2028", "\ud800", "\x1b[31m", "../../etc/passwd", "/dev/zero",
    "x" * 5000, "9" * 5000, "<image>" * 100, "é" * 300, [], {}, [[]], [None], {"": None}, [1, "a", None],
    {"a": {"b": []}},
)  # fmt: skip
SNIPPETS = (
    b"\0", b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\xff\xfe", b"{", b"}", b"[", b"]", b'"', b",", b":", b"\\",
    b"\n", b"\r", b"\t", b"NaN", b"-Infinity", b"1e999", b"9" * 5000, b"[" * 3000, b'{"a":' * 3000, b"[" * 200000,
    b"\\ud800", b"\\u0000", b"null", b"true", b"\xe2\x80\xa8", b"<image>", b"x" * 100000,
)  # fmt: skip
YAML_SNIPPETS = (
    b"&a", b"*a", b"&a [*a]", b"!!python/object/apply:os.system [id]", b"!!binary x", b"!!set {}", b"!!int x",
    b"2026-11-27", b"2026-99-99", b"1:2:3", b"0x7f", b"0b2", b".inf", b".nan", b"? [1]\n: 2\n",
    b"? {a: b}\n: 2\n", b"<<: *a\n",
    b"<<: {a: 1}\n", b"%YAML 9.9\n", b"---\n", b"...\n", b"- ", b"[" * 2000, b"{a: " * 2000, b"|\n", b">\n", b"'", b"#",
    b"a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b]\n"
    b"d: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c]\ne: &e [*d,*d,*d,*d,*d,*d,*d,*d,*d]\nf: &f [*e,*e,*e,*e,*e,*e,*e,*e,*e]\n"
    b"g: &g [*f,*f,*f,*f,*f,*f,*f,*f,*f]\nh: [*g,*g,*g,*g,*g,*g,*g,*g,*g]\n",
)  # fmt: skip


def put_snippet(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.choice(SNIPPETS) + data[at:]


def put_yaml(data: bytes, rng: random.Random) -> bytes:
    """Something special in the place of a value, of a key, or between two lines."""
    snippet = rng.choice(YAML_SNIPPETS)
    lines = data.split(b"\n")
    at = rng.randrange(len(lines))
    key, colon, _ = lines[at].partition(b"=" if b"=" in lines[at] else b": ")
    match rng.randrange(4):
        case 0:
            lines.insert(at, snippet)
        case 1:
            lines[at] = snippet + b": " + lines[at]
        case _:
            lines[at] = key + (colon or b": ") + snippet
    return b"\n".join(lines)


def change_value(data: bytes, rng: random.Random) -> bytes:
    """Another value after a colon: of text that need not be JSON."""
    ends = [match.end() for match in re.finditer(rb"[:,\[] ?", data[: 2**16])]
    at = rng.choice(ends) if ends else 0
    rest = re.match(rb"[^,}\]\n]*", data[at:])
    return data[:at] + _dumps(rng.choice(VALUES)) + data[at + (rest.end() if rest else 0) :]


def change_json(data: bytes, rng: random.Random) -> bytes:
    """One node of a JSON document, or of one line of JSON lines, replaced, dropped, repeated, wrapped or renamed."""
    lines = data.split(b"\n")
    at = rng.randrange(len(lines))
    for whole in (True, False):
        try:
            tree = json.loads(data if whole else lines[at])
        except (ValueError, RecursionError):
            continue
        try:
            text = _dumps(_changed(tree, rng))
        except (ValueError, RecursionError):
            return data
        if whole:
            return text
        lines[at] = text
        return b"\n".join(lines)
    return change_value(data, rng)


def _dumps(tree: Any) -> bytes:
    return json.dumps(tree, ensure_ascii=False).encode("utf-8", "surrogatepass")


def _changed(tree: Any, rng: random.Random) -> Any:
    """A tree with a change at a node that is found by a walk downwards."""
    if isinstance(tree, dict | list) and tree and rng.random() < 0.8:
        keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
        key = rng.choice(keys)
        draw = rng.random()
        if draw < 0.08:
            del tree[key]
        elif draw < 0.14 and isinstance(tree, list):
            tree.extend(tree[key : key + 1] * rng.choice((1, 2, 500)))
        elif draw < 0.2 and isinstance(tree, dict):
            new = rng.choice(VALUES)
            tree[new if isinstance(new, str) else str(key) + "s"] = tree.pop(key)
        elif draw < 0.24 and isinstance(tree, dict):
            tree[key] = tree[rng.choice(keys)]
        else:
            tree[key] = _changed(tree[key], rng)
        return tree
    match rng.randrange(7):
        case 0:
            return [tree]
        case 1:
            return {"a": tree}
        case 2:
            for _ in range(rng.choice((20, 800))):
                tree = [tree]
            return tree
        case 3 if isinstance(tree, int | float):
            return rng.choice((-tree, tree * 2, tree + 1, tree * 1000, tree * 10**12, str(tree), float(tree % 2**64)))
        case 3 if isinstance(tree, str):
            return rng.choice((tree * 2, tree[:-1], tree + "\0", tree.upper(), tree * 1000, tree[::-1]))
    return rng.choice(VALUES)


# --- containers -------------------------------------------------------------------------------------------------------


def change_safetensors(data: bytes, rng: random.Random) -> bytes:
    """The header changed as JSON, and its length with it."""
    length = int.from_bytes(data[:8], "little")
    text, rest = data[8 : 8 + length], data[8 + length :]
    text = rng.choice((change_json, change_json, change_value, flip_bit))(text, rng)
    return len(text).to_bytes(8, "little") + text + rest


def change_zip(data: bytes, rng: random.Random) -> bytes:
    """A zip written again: a member changed, packed in another way, called otherwise, doubled, gone, or a bomb.

    Its checksums are right then, so that what is inside is read.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = [
                (info.filename, archive.open(info).read(LARGEST)) for info in archive.infolist()
            ]  # may be a bomb
    except Exception:  # damaged by an earlier change
        return put_integer(data, rng)
    if not members:
        return data
    at = rng.randrange(len(members))
    name, content = members[at]
    draw, method = rng.randrange(8), zipfile.ZIP_STORED
    if draw == 0:
        method = rng.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
    elif draw == 1:
        members.append(members[at])
    elif draw == 2:
        members[at] = rng.choice((name.upper(), "../" + name, name + "/", name[1:], "é" + name, "x" * 300)), content
    elif draw == 3:
        del members[at]
    else:
        members[at] = name, rng.choice(BYTES)(content, rng)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive, warnings.catch_warnings(action="ignore"):  # of double names
        for number, (name, content) in enumerate(members):
            info = zipfile.ZipInfo(name)
            info.compress_type = method if number == at else zipfile.ZIP_STORED
            archive.writestr(info, content)
    written = out.getvalue()
    return _bomb(written, rng) if rng.random() < 0.01 else written


def _bomb(data: bytes, rng: random.Random) -> bytes:
    """A stored member of a zip becomes one that unpacks to 2.8 GB, which its directory says or does not say."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        infos = archive.infolist()
        members = [(info.filename, archive.read(info), info.CRC, info.file_size) for info in infos]
    at = rng.randrange(len(members))
    body, size = _zeros()
    declared = rng.choice((size, members[at][3], 0, 1000))
    bodies, entries, offset = [], [], 0
    for number, (name, content, crc, length) in enumerate(members):
        packed = number == at
        encoded = name.encode()
        content, length = (body, declared) if packed else (content, length)
        fields = struct.pack("<5H3L", 20, 0, 8 * packed, 0, 33, crc, len(content), length)
        bodies.append(b"PK\3\4" + fields + struct.pack("<2H", len(encoded), 0) + encoded + content)
        more = struct.pack("<5H2L", len(encoded), 0, 0, 0, 0, 0, offset)
        entries.append(b"PK\1\2" + struct.pack("<H", 20) + fields + more + encoded)
        offset += len(bodies[-1])
    directory = b"".join(entries)
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, len(entries), len(entries), len(directory), offset, 0)
    return b"".join(bodies) + directory + end


@cache
def _zeros() -> tuple[bytes, int]:
    """A deflated stream of zeros, in 2.7 MB, and how many: each piece begins afresh, so one is like another."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    first = packer.compress(bytes(2**22)) + packer.flush(zlib.Z_FULL_FLUSH)
    piece = packer.compress(bytes(2**22)) + packer.flush(zlib.Z_FULL_FLUSH)
    times = LARGEST * 7 // 8 // len(piece)
    return first + piece * times + packer.flush(zlib.Z_FINISH), 2**22 * (times + 1)


def change_png(data: bytes, rng: random.Random) -> bytes:
    """A chunk changed, moved, doubled, gone or new; checksums are made right."""
    chunks, at = [], 8
    while at + 12 <= len(data) and len(chunks) < 200:
        length = int.from_bytes(data[at : at + 4], "big")
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    if not chunks:
        return set_bytes(data, rng)
    at = rng.randrange(len(chunks))
    kind, body = chunks[at]
    match rng.randrange(6):
        case 0:
            chunks.insert(rng.randrange(len(chunks)), chunks[at])
        case 1:
            del chunks[at]
        case 2:
            new = rng.choice((b"zTXt", b"iCCP", b"tEXt", b"tRNS", b"PLTE", b"eXIf", b"acTL", b"fdAT", b"IDAT"))
            body = rng.choice(
                (b"a\0\0" + zlib.compress(bytes(2**20)), rng.randbytes(30), bytes(4), b"MM\0*\0\0\0\x08\xff")
            )
            chunks.insert(1, (new, body))
        case 3:
            chunks[at] = kind, put_integer(body, rng)
        case _:
            chunks[at] = kind, rng.choice(BYTES)(body, rng)
    pieces = [
        len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big") for kind, body in chunks
    ]
    return data[:8] + b"".join(pieces)


def change_jpeg(data: bytes, rng: random.Random) -> bytes:
    """A segment changed, doubled many times, moved, or gone."""
    starts = [match.start() for match in re.finditer(rb"\xff[\x01-\xfe]", data)]
    if len(starts) < 2:
        return set_bytes(data, rng)
    number = rng.randrange(len(starts) - 1)
    begin, end = starts[number], starts[number + 1]
    match rng.randrange(5):
        case 0:
            return data[:end] + data[begin:end] * rng.choice((1, 2, 300)) + data[end:]
        case 1:
            return data[:begin] + data[end:]
        case 2:
            at = rng.choice(starts)
            return data[:at] + data[begin:end] + data[at:]
        case 3:
            return _put(
                data, begin + 1, bytes([rng.choice((0xC0, 0xC1, 0xC2, 0xC3, 0xC4, 0xC9, 0xD8, 0xD9, 0xDA, 0xE1))])
            )
    at = begin + rng.randrange(2, max(3, min(end - begin, 20)))
    return _put(data, at, bytes([rng.choice((0, 1, 3, 4, 127, 128, 255))]))


def change_tiff(data: bytes, rng: random.Random) -> bytes:
    """An entry of the first directory: its tag, type, count or value."""
    order = "little" if data[:2] == b"II" else "big"
    begin = int.from_bytes(data[4:8], order)  # type: ignore[arg-type]
    count = int.from_bytes(data[begin : begin + 2], order)  # type: ignore[arg-type]
    if not 0 < count < 100:
        return put_integer(data, rng)
    at = begin + 2 + 12 * rng.randrange(count) + rng.choice((0, 2, 4, 4, 8, 8, 8))
    size = 2 if at % 12 in ((begin + 2) % 12, (begin + 4) % 12) else 4
    number = rng.choice((*INTEGERS, 3, 4, 5, 8, 16, 64, 5000, 65000, 34712, 259, 322, 32773, 8)) % 2 ** (8 * size)
    return _put(data, at, number.to_bytes(size, order))  # type: ignore[arg-type]


def change_gguf(data: bytes, rng: random.Random) -> bytes:
    """A length, a count or a type: what follows a name in the file's head."""
    names = [match.end() for match in re.finditer(rb"[a-z_]+\.[a-z_.0-9]+", data[: 2**15])]
    at = rng.choice(names) + rng.choice((0, 4, 8, 12, 20)) if names and rng.random() < 0.7 else rng.choice((4, 8, 16))
    size = rng.choice((4, 8))
    number = rng.choice((*INTEGERS, 3, 8, 9, 30, 100)) % 2 ** (8 * size)
    return _put(data, at, number.to_bytes(size, "little"))


def change_csv(data: bytes, rng: random.Random) -> bytes:
    """Another value in a cell, or a line that is doubled, gone, or of another length."""
    lines = data.split(b"\n")
    at = rng.randrange(len(lines))
    cells = lines[at].split(b",")
    match rng.randrange(4):
        case 0:
            lines.insert(at, lines[rng.randrange(len(lines))])
        case 1:
            del lines[at]
        case 2:
            lines[at] = b",".join(cells[: rng.randrange(len(cells) + 1)] * rng.choice((1, 2, 300)))
        case _:
            value = rng.choice(VALUES)
            text = value if isinstance(value, str) else _dumps(value).decode("utf-8", "surrogatepass")
            cells[rng.randrange(len(cells))] = rng.choice((b"", b'"')) + text.encode("utf-8", "surrogatepass")
            lines[at] = b",".join(cells)
    return b"\n".join(lines)


def change_tar(data: bytes, rng: random.Random) -> bytes:
    """A field of a member's header; its checksum is made right."""
    starts = [match.start() - 257 for match in re.finditer(rb"ustar", data)]
    at = rng.choice(starts) if starts else -1
    if not 0 <= at <= len(data) - 512:
        return put_integer(data, rng)
    begin, length = rng.choice(((0, 100), (100, 8), (124, 12), (124, 12), (136, 12), (156, 1), (157, 100), (345, 155)))
    octal = f"{rng.choice(INTEGERS) % 2**33:011o}\0".encode()
    long = b"\x80" + (rng.choice(INTEGERS) % 2**64).to_bytes(11, "big")
    new = rng.choice((octal, octal, long, b"L", b"x", b"K", b"g", b"S", b"1", b"5", b"\0", b"../a.jpg", b"\xff", b"-1"))
    data = _put(data, at + begin, new[:length])
    header = data[at : at + 148] + b" " * 8 + data[at + 156 : at + 512]
    return _put(data, at + 148, f"{sum(header):06o}\0 ".encode())


STRUCTURED: dict[str, tuple[Change, ...]] = {
    "json": (change_json, change_json, change_json, change_value, put_snippet),
    "yaml": (put_yaml, put_yaml, change_value, put_snippet),
    "text": (change_value, put_snippet),
    "csv": (change_csv, change_csv, put_snippet),
    "tar": (change_tar,),
    "safetensors": (change_safetensors,),
    "zip": (change_zip,),
    "png": (change_png,),
    "jpeg": (change_jpeg,),
    "tiff": (change_tiff,),
    "gguf": (change_gguf,),
}
