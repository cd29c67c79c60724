"""GGUF files of strangers: refused before anything is taken, or read right."""

import contextlib
import random
from pathlib import Path

import pytest

from minimind_v.core.errors import MmvError
from minimind_v.core.formats.gguf.file import LANGUAGE_ONLY, MADE_BY, Reader
from minimind_v.core.formats.gguf.read import describe_gguf, read_gguf, read_tokenizer, read_vision_tower
from tests.formats.gguf.bombs import STRING, bombs, file, key, text
from tests.formats.gguf.made import loaded_model
from tests.formats.gguf.test_written import MMPROJ, MODEL, written
from tests.hostile import check_refused

CASE = Path(__file__).parents[3] / ".." / "shared" / "cases" / "hostile" / "array_u8_2e40.gguf"


@pytest.mark.long
def test_files_that_ask_for_more_than_they_say(tmp_path):
    files = {}
    for name, (data, message) in bombs().items():
        (tmp_path / f"{name}.gguf").write_bytes(data)
        files[tmp_path / f"{name}.gguf"] = message
    if CASE.is_file():
        files[CASE] = "an array of 1,099,511,627,776 entries"
    check_refused("minimind_v.core.formats.gguf.read:describe_gguf", files)


def test_a_large_vocabulary_is_described_at_once(tmp_path):
    """That of a large model has half a million entries; they are not looked at one by one."""
    tokens = [key("tokens", 9, b"\x08\0\0\0" + (500_000).to_bytes(8, "little") + text("ab") * 500_000)]
    (tmp_path / "w.gguf").write_bytes(file(tokens))
    assert describe_gguf(tmp_path / "w.gguf")["architecture"] == "llama"
    assert Reader(tmp_path / "w.gguf").keys["tokens"][-1] == "ab"


def test_values_of_other_kinds_are_refused(tmp_path):
    for kind, value in ((STRING, text("64")), (9, b"\x04\0\0\0" + bytes(8)), (6, b"\0\0\x80\x3f")):
        (tmp_path / "w.gguf").write_bytes(file([key("llama.embedding_length", kind, value)]))
        (tmp_path / MMPROJ).write_bytes(file([key(MADE_BY, STRING, text("us"))]))
        with pytest.raises(MmvError, match=r"llama\.embedding_length is .*, not a number"):
            read_gguf(tmp_path / "w.gguf")


def test_scaled_positions_are_refused(tmp_path):
    keys = [key("llama.rope.scaling.type", STRING, text("yarn")), key(LANGUAGE_ONLY, 7, b"\1")]
    (tmp_path / "w.gguf").write_bytes(file(keys))
    with pytest.raises(MmvError, match=r"w.gguf: scales its rotary positions \(yarn\), which mmv does not compute"):
        read_gguf(tmp_path / "w.gguf")


@pytest.mark.long
def test_any_changed_byte_ends_in_words_or_in_a_model(tmp_path):
    """Of the heads of both files: numbers behind them cannot be told from others."""
    written(loaded_model(), tmp_path)
    draw, whole = random.Random(3), {name: (tmp_path / name).read_bytes() for name in (MODEL, MMPROJ)}
    for _ in range(150):
        for name, data in whole.items():
            damaged = bytearray(data)
            for _ in range(draw.choice((1, 1, 2, 8))):
                at = draw.randrange(min(len(data), 30_000))
                damaged[at] = draw.choice((0, 255, damaged[at] ^ 1 << draw.randrange(8)))
            (tmp_path / name).write_bytes(damaged)
        for read in (read_gguf, read_vision_tower, read_tokenizer):
            with contextlib.suppress(MmvError):
                assert read(tmp_path)
