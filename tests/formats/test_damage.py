"""Damaged and hostile files: refused in one line, and never run."""

import os
import pickle
import random
import zipfile

import pytest
import torch
from safetensors.torch import save

from minimind_v.core.errors import WeightsError
from minimind_v.core.formats.checkpoint import read_checkpoint
from tests.formats.made import packed, state

RNG = random.Random(0)


def some_cuts(length):
    """Where a download may have broken off: near the beginning, near the end, and anywhere."""
    return [*range(1, 20), *(RNG.randrange(length) for _ in range(60)), *range(length - 20, length)]


def refused(path, data):
    path.write_bytes(data)
    with pytest.raises(WeightsError) as caught:
        read_checkpoint(path)
    line = str(caught.value)
    assert line.startswith(f"{path}: ")
    assert "\n" not in line
    assert len(line) < len(str(path)) + 250
    return line


def assert_opened_or_refused_in_one_line(path):
    try:
        outcome = ", ".join(read_checkpoint(path).tensors)
    except WeightsError as error:
        outcome = str(error)
    assert outcome
    assert "\n" not in outcome


FORMATS = {
    "pth": lambda: packed(state()),
    "old pth": lambda: packed(state(), _use_new_zipfile_serialization=False),
    "safetensors": lambda: save({name: tensor.clone() for name, tensor in state().items()}),
}


@pytest.mark.parametrize("kind", FORMATS)
def test_a_file_cut_anywhere_is_refused(tmp_path, kind):
    whole = FORMATS[kind]()
    for cut in some_cuts(len(whole)):
        line = refused(tmp_path / "w", whole[:cut])
        if kind != "old pth":  # whose names may be cut into those of something else
            assert "truncated or damaged" in line or "neither a torch nor" in line
            assert "download it again" in line


@pytest.mark.parametrize("kind", FORMATS)
def test_flipped_bits_are_refused_or_harmless(tmp_path, kind):
    """A flipped bit of a number cannot be told from a number; everything else must end in words."""
    whole = FORMATS[kind]()
    for _ in range(150):
        damaged = bytearray(whole)
        damaged[RNG.choice((RNG.randrange(3000), -1 - RNG.randrange(3000)))] ^= 1 << RNG.randrange(8)
        (tmp_path / "w").write_bytes(damaged)
        assert_opened_or_refused_in_one_line(tmp_path / "w")


def test_a_flipped_bit_of_any_tensor_in_a_zip_is_noticed(tmp_path):
    whole = FORMATS["pth"]()
    for name, tensor in state().items():
        damaged = bytearray(whole)
        damaged[whole.index(tensor.numpy().tobytes()) + tensor.nbytes // 2] ^= 64
        assert "has other bytes than were written) — download it again" in refused(tmp_path / "w", damaged), name


def test_a_zip_whose_writer_left_check_sums_out_is_opened(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.serialization, "get_crc32_options", lambda: False)
    (tmp_path / "w").write_bytes(packed(state()))
    with zipfile.ZipFile(tmp_path / "w") as records:
        assert not any(record.CRC for record in records.infolist())
    assert read_checkpoint(tmp_path / "w").tensors


@pytest.mark.parametrize("kind", FORMATS)
def test_numbers_put_anywhere_are_refused_or_harmless(tmp_path, kind):
    """Lengths, counts and sizes are what takes memory."""
    whole = FORMATS[kind]()
    for _ in range(150):
        at, length = RNG.choice((RNG.randrange(3000), len(whole) - 8 - RNG.randrange(3000))), RNG.choice((1, 2, 4, 8))
        number = RNG.choice((0, 1, 2**31, 2**40, 2**63, 2**64 - 1, RNG.randrange(2**16)))
        put = (number % 2 ** (8 * length)).to_bytes(length, "little")
        (tmp_path / "w").write_bytes(whole[:at] + put + whole[at + length :])
        assert_opened_or_refused_in_one_line(tmp_path / "w")


class Hostile:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(
    "pack",
    [
        lambda content: packed(content),
        lambda content: packed({"model": {"a": torch.ones(1), "b": content}}),
        lambda content: packed(content, _use_new_zipfile_serialization=False),
        lambda content: pickle.dumps(content, protocol=2),
        lambda content: pickle.dumps(content, protocol=4),
        lambda content: pickle.dumps(content, protocol=5),
    ],
    ids=["zip", "inside a zip", "old torch", "pickle 2", "pickle 4", "pickle 5"],
)
def test_a_file_that_runs_code_is_not_opened(tmp_path, pack):
    line = refused(tmp_path / "w.pth", pack(Hostile(tmp_path / "owned")))
    assert not (tmp_path / "owned").exists()
    assert "so it was not opened" in line
    assert "source that you trust" in line
    pickle.loads(pickle.dumps(Hostile(tmp_path / "owned")))  # it would have
    assert (tmp_path / "owned").exists()


def test_what_would_be_run_is_named(tmp_path):
    assert "opening the file would run code (posix.mkdir)" in refused(tmp_path / "w", packed(Hostile("x")))
    module = torch.nn.Linear(2, 2)
    assert "(torch.nn.modules.linear.Linear)" in refused(tmp_path / "w", packed(module))


def test_a_zip_that_is_no_torch_file_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "pictures.zip", "w") as archive:
        archive.writestr("a.jpg", b"picture")
    assert "damaged" in refused(tmp_path / "w", (tmp_path / "pictures.zip").read_bytes())


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_a_torchscript_file_is_refused(tmp_path):
    path = tmp_path / "script.pt"
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), path)
    refused(tmp_path / "w", path.read_bytes())
