"""Parquet that asks for more than it has: refused before memory is taken, and no other file is."""

import json
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from minimind_v.core.errors import DataError, RowError
from minimind_v.core.rows import parquet_bounds, parquet_pieces
from minimind_v.core.rows.parquet import ParquetRows
from minimind_v.core.rows.parquet_bounds import _pages, dictionary_size
from minimind_v.core.rows.pictures import open_pictures
from tests.hostile import MOST_BYTES, MOST_SECONDS, opened

TALK = json.dumps([{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "A circle."}])


def read_all(path):
    """Every row and picture, or the first error as one that a user meets."""
    rows = ParquetRows(path)
    for index in range(min(len(rows), 100)):
        try:
            row = rows.row(index)
            for position, name in enumerate(row.images):
                rows.picture(index, position, name)
        except RowError as error:
            raise DataError(str(error)) from None


def zigzag(number):
    data, number = b"", number << 1
    while number > 127:
        data, number = data + bytes([number & 127 | 128]), number >> 7
    return data + bytes([number])


def write_false_page(path, size, field, names=("conversations", "image_bytes")):
    """An honest file but for one page header: its size unpacked (field 2) or packed (field 3) is replaced."""
    pictures = [random.Random(n).randbytes(30_000) for n in range(4)]
    table = pa.table(dict(zip(names, ([TALK] * 4, pictures), strict=True)))
    pq.write_table(table, path, compression="zstd", use_dictionary=False)
    data, at = path.read_bytes(), pq.read_metadata(path).row_group(0).column(1).data_page_offset
    assert data[at : at + 3] == b"\x15\x00\x15"  # the page's type, 0, and the header of the next field
    at += 3
    if field == 3:
        at = next(end for end in range(at, at + 5) if data[end] < 128) + 2
    length = next(n for n in range(1, 6) if data[at + n - 1] < 128)
    path.write_bytes(data[:at] + zigzag(size) + data[at + length :])
    return path


def write_dictionary_bomb(path):
    """A million rows of one long text, which the file holds once."""
    text = json.dumps([{"role": "user", "content": "a" * 300_000}, {"role": "assistant", "content": "b"}])
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 1_000_000, pa.int32()), [text])
    pq.write_table(pa.table({"conversations": column}), path, compression="zstd")
    return path


def test_files_that_ask_for_more_than_they_have_end_in_one_line(tmp_path):
    bomb = write_dictionary_bomb(tmp_path / "dictionary.parquet")
    assert bomb.stat().st_size < 100_000
    results = opened("tests.rows.test_parquet_bounds:read_all", [bomb])
    assert results[bomb].seconds < MOST_SECONDS
    assert results[bomb].bytes < MOST_BYTES
    assert results[bomb].line is None or "bytes in" in results[bomb].line


@pytest.mark.parametrize(
    ("field", "size", "message"),
    [
        (2, 2**31 - 5, "a page of image_bytes unpacks to 2,147,483,643 bytes; the maximum is 536,870,912"),
        (3, 2**31 - 5, "a page of image_bytes continues after the end of the file"),
        (3, 88 * 2**32 - 5, "a page of image_bytes continues after the end of the file"),  # of which 32 bits count
    ],
)
def test_a_page_that_asks_for_too_much_is_refused_by_its_header(tmp_path, field, size, message):
    path = write_false_page(tmp_path / "page.parquet", size, field)
    with pytest.raises(DataError, match=message):
        read_all(path)


def test_pages_of_pictures_beside_the_rows_are_bounded_as_those_of_rows(tmp_path):
    write_false_page(tmp_path / "pictures.parquet", 2**31 - 5, 2, ("id", "image"))
    pictures = open_pictures(tmp_path)
    with pytest.raises(RowError, match="a page of image unpacks to 2,147,483,643 bytes; the maximum is 536,870,912"):
        pictures.read(TALK)


def test_more_rows_than_a_file_can_hold_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"conversations": [TALK] * 500}), path)
    monkeypatch.setattr(parquet_bounds, "MANY_ROWS", 100)
    assert len(ParquetRows(path)) == 500  # 64 for each byte
    monkeypatch.setattr(parquet_bounds, "ROWS_PER_BYTE", 0.1)
    with pytest.raises(DataError, match=r"500 rows in [\d,]+ bytes"):
        ParquetRows(path)


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_all_pages_of_a_file_are_walked(tmp_path, version, compression):
    path = tmp_path / "rows.parquet"
    draw = random.Random(3)
    texts = [f"{draw.random()}" * draw.randint(1, 400) for _ in range(500)]
    table = pa.table({"conversations": texts * 2, "few": ["abc", "defg"] * 500})
    pq.write_table(
        table, path, compression=compression, data_page_version=version, data_page_size=4096, write_batch_size=16,
        use_dictionary=["few"], row_group_size=700,
    )  # fmt: skip
    footer, pages = pq.read_metadata(path), 0
    with path.open("rb") as file:
        for group in (footer.row_group(number) for number in range(2)):
            for chunk in (group.column(leaf) for leaf in range(2)):
                begin = chunk.dictionary_page_offset or chunk.data_page_offset
                walked = list(_pages(file, begin, begin + chunk.total_compressed_size))
                assert walked[-1].begin + walked[-1].packed == begin + chunk.total_compressed_size
                headers = chunk.total_compressed_size - sum(page.packed for page in walked)
                assert sum(page.unpacked for page in walked) + headers == chunk.total_uncompressed_size
                pages += len(walked)
            assert dictionary_size(path, group, [0, 1]) == 2 * 4 + 3 + 4  # lengths and letters
    assert pages > 40


def test_rows_of_a_large_dictionary_are_put_together_of_fewer(tmp_path, monkeypatch):
    path = tmp_path / "rows.parquet"
    talks = [TALK.replace("circle", f"circle {n % 7}") for n in range(300)]
    pq.write_table(pa.table({"conversations": talks}), path, row_group_size=128)
    plain = [ParquetRows(path).row(index) for index in range(300)]
    size = dictionary_size(path, pq.read_metadata(path).row_group(0), [0])
    monkeypatch.setattr(parquet_pieces, "BATCH_LIMIT", 10 * size)  # two rows at a time
    with pytest.raises(RowError, match=r"more than [\d,]+ bytes in \d+ rows"):
        ParquetRows(path).row(0)
    monkeypatch.setattr(parquet_pieces, "BATCH_LIMIT", 127 * size)
    assert [ParquetRows(path).row(index) for index in range(300)] == plain
