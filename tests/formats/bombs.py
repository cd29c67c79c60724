"""Torch and safetensors files that ask for more than they say."""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile

import torch

from tests.formats.made import packed, state


def rezipped(data, change, compression=zipfile.ZIP_STORED):
    """A torch file with other records: `change` is given name → bytes, and changes it."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    change(records)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        for name, content in records.items():
            archive.writestr(name, content)
    return out.getvalue()


def with_pickle(content):
    """A torch file whose pickle is `content`, with one storage of 16 bytes."""
    return rezipped(packed({"a": torch.zeros(4)}), lambda records: records.update({"archive/data.pkl": content}))


def name(text):
    return b"X" + struct.pack("<I", len(text)) + text.encode()


def number(value):
    data = value.to_bytes(8, "little")
    return b"\x8a\x08" + data


def numbers(*values):
    return b"(" + b"".join(map(number, values)) + b"t"


def storage(count, key="0", kind="FloatStorage"):
    return (b"(" + name("storage") + b"ctorch\n" + kind.encode() + b"\n" + name(key) + name("cpu") + number(count)
            + b"tQ")  # fmt: skip


def tensor(stored, offset, size, strides):
    return (b"ctorch._utils\n_rebuild_tensor_v2\n(" + stored + number(offset) + numbers(*size) + numbers(*strides)
            + b"\x89ccollections\nOrderedDict\n)RtR")  # fmt: skip


def state_dict(value):
    return b"\x80\x02}" + name("model.embed_tokens.weight") + value + b"s."


def deflated_storage():
    """100 kB that are 100 MB; torch would take them all."""

    def grow(records):
        records["archive/data/0"] = bytes(100_000_000)

    return rezipped(packed({"a": torch.zeros(25_000_000)}), grow, zipfile.ZIP_DEFLATED)


def many_names_of_one_record():
    """A directory whose entries are all the same bytes of the file."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("archive/data.pkl", state_dict(tensor(storage(4), 0, (4,), (1,))))
        archive.writestr("archive/data/0", bytes(100_000))
        info = archive.getinfo("archive/data/0")
        for copy in range(1, 5000):
            again = zipfile.ZipInfo(f"archive/data/{copy}")
            again.file_size = again.compress_size = info.file_size
            again.header_offset, again.CRC = info.header_offset, info.CRC
            archive.filelist.append(again)
            archive.NameToInfo[again.filename] = again
    return out.getvalue()


def doubled_text():
    """Thirty calls, each of which makes its text twice as long."""
    encode = b"c_codecs\nencode\n"
    content = b"".join([encode] * 40) + name("ab") + name("latin1") + b"\x86R"
    return with_pickle(b"\x80\x02" + content + (name("hex") + b"\x86R") * 39 + b".")


def hashed_tuples():
    """A key of a dict that is a tuple in a tuple in a tuple: its hash ends the process."""
    return with_pickle(b"\x80\x02})" + b"\x85" * 500_000 + b"Ns.")


def itself():
    """A mapping whose `model` it is itself."""
    return with_pickle(b"\x80\x02}q\x00" + name("model") + b"h\x00s.")


def copied_again():
    """A dict of thousands of entries, copied thousands of times."""
    entries = b"".join(name(str(n)) + b"N" for n in range(20_000))
    return with_pickle(b"\x80\x02](" + b"}q\x00(" + entries + b"u" + b"ccollections\nCounter\nq\x01"
                       + b"h\x01h\x00\x85R" * 20_000 + b"e.")  # fmt: skip


def old(content, keys=("0",)):
    """The form before 2020."""
    data = packed({"a": torch.zeros(4)}, _use_new_zipfile_serialization=False)
    head = data[: data.index(b"\x80\x02", data.index(b"little_endian"))]
    return head + content + pickle.dumps(list(keys), 2) + struct.pack("<Q", 4) + bytes(16)


def bombs():
    """Name → bytes, and words of the line that refuses them."""
    whole = tensor(storage(4), 0, (4,), (1,))
    return {
        "deflated": (deflated_storage(), "compressed"),
        "one_record": (many_names_of_one_record(), "larger than the file"),
        "records": (rezipped(packed(state()), lambda r: r.update({f"archive/x/{n}": b"" for n in range(20_000)})),
                    "records; the maximum is"),
        "stride_0": (with_pickle(state_dict(tensor(storage(1), 0, (100_000, 100_000), (0, 0)))), "larger than what is"),
        "far": (with_pickle(state_dict(tensor(storage(4), 10**12, (1,), (1,)))), "larger than what is stored"),
        "wide": (with_pickle(state_dict(tensor(storage(4), 0, (2,), (10**12,)))), "larger than what is stored"),
        "large": (with_pickle(state_dict(tensor(storage(4), 0, (10**10,), (1,)))), "larger than what is stored"),
        "negative": (with_pickle(state_dict(tensor(storage(4), 0, (4,), (2**63 + 5,)))), "unknown kind"),
        "dimensions": (with_pickle(state_dict(tensor(storage(4), 0, (2**60,) * 50_000, (0,) * 50_000))), "damaged"),
        "storage": (with_pickle(state_dict(tensor(storage(10**10), 0, (4,), (1,)))), "larger than what is stored"),
        "no_record": (with_pickle(state_dict(tensor(storage(4, "../0"), 0, (4,), (1,)))), "larger than what is stored"),
        "two_sizes": (with_pickle(state_dict(tensor(storage(4), 0, (4,), (1,)) + b"0" * 0
                      + b"s" + name("b") + tensor(storage(10**9), 0, (4,), (1,)))), "has two sizes"),
        "views": (with_pickle(b"\x80\x02}" + b"".join(name(str(n)) + whole + b"s" for n in range(5000)) + b"."),
                  "far more than the file"),
        "tensors": (with_pickle(b"\x80\x02}" + b"".join(
                    name(str(n)) + tensor(storage(4), 0, (0,), (1,)) + b"s" for n in range(12_000)) + b"."), "damaged"),
        "doubled": (doubled_text(), "so it was not opened"),
        "tuples": (hashed_tuples(), "so it was not opened"),
        "copies": (copied_again(), "so it was not opened"),
        "bytes": (with_pickle(b"\x80\x02cbuiltins\nbytearray\n" + number(10**11) + b"\x85R."), "would run code"),
        "new": (with_pickle(b"\x80\x02ctorch\nTensor\n" + numbers(10**6, 10**6) + b"\x81."), "so it was not opened"),
        "long": (with_pickle(b"\x80\x02\x8b\xff\xff\xff\x7f123."), "so it was not opened"),
        "memo": (with_pickle(b"\x80\x02Nr\xff\xff\xff\xff."), "contains no state_dict"),
        "lists": (with_pickle(b"\x80\x02" + b"]" * 3_000_000 + b"."), "the maximum is"),
        "itself": (itself(), "contains no state_dict"),
        "old_stride_0": (old(state_dict(tensor(storage(1), 0, (10**5, 10**5), (0, 0)))), "larger than what is stored"),
        "old_storage": (old(state_dict(tensor(storage(10**10), 0, (4,), (1,)))), "shorter than its tensors"),
        "old_keys": (old(state_dict(whole), ()), "storages do not match"),
        "old_lists": (old(b"\x80\x02" + b"]" * 30_000_000 + b"."), "truncated or damaged"),
        **headers(),
    }  # fmt: skip


def safetensors(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def headers():
    """Safetensors files."""

    def entry(shape, begin, end, dtype="F32"):
        return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}

    return {
        "s_length": (struct.pack("<Q", 2**62) + b"{" + bytes(90), "header has"),
        "s_long": (safetensors(b"{" + b" " * (9 << 20) + b"}"), "header has"),
        "s_shape": (safetensors({"a": entry([10**6, 10**6], 0, 16)}, bytes(16)), "damaged"),
        "s_overflow": (safetensors({"a": entry([2**40, 2**40], 0, 16)}, bytes(16)), "damaged"),
        "s_overlap": (safetensors({"a": entry([4], 0, 16), "b": entry([4], 0, 16)}, bytes(16)), "damaged"),
        "s_outside": (safetensors({"a": entry([4], 10**12, 10**12 + 16)}, bytes(16)), "damaged"),
        "s_negative": (safetensors({"a": entry([-4], 0, 16)}, bytes(16)), "damaged"),
        "s_deep": (safetensors(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "damaged"),
        "s_number": (safetensors(b'{"a":' + b"9" * 6000 + b"}"), "damaged"),
        "s_tensors": (safetensors({f"model.layers.{n}.x": entry([0], 0, 0) for n in range(20_000)}),
                      "20,000 tensors; the maximum is"),
        "s_empty": (safetensors({**{f"model.layers.{n}.self_attn.k_proj.weight": entry([10**9, 0], 0, 0)
                                    for n in range(900)},
                                 "model.layers.0.mlp.gate_proj.weight": entry([10**6, 0], 0, 0),
                                 "model.embed_tokens.weight": entry([10**6, 0], 0, 0)}), "not the weights"),
        "s_unknown": (safetensors({"a": entry([4], 0, 16, "F4")}, bytes(16)), "damaged"),
        "s_nul": (safetensors({"\0a": entry([4], 0, 16)}, bytes(16)), "not the weights"),
    }  # fmt: skip
