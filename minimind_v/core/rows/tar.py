"""Tar archives, read in place: WebDataset shards as rows, and picture files by name.

Members with one key, their path up to the first dot of the file name, form one sample: `000.jpg`, `000.txt` and
`000.json`. The index keeps the start of each sample; each access to a row reads its headers again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minimind_v.core.errors import DataError, RowError
from minimind_v.core.hub.sources import PICTURE_ENDINGS
from minimind_v.core.rows.field_names import TALKS
from minimind_v.core.rows.file_rows import ShardedRows
from minimind_v.core.rows.index import Index
from minimind_v.core.rows.pictures import open_pictures
from minimind_v.core.rows.row import NO_NAME, Reopened, Row, check_size, image_names, parse_json
from minimind_v.core.rows.splits import LEARN, shards_of
from minimind_v.core.rows.strangers import stand_in
from minimind_v.core.rows.tar_members import BLOCK, DamagedTar, Member, read_exactly, read_members
from minimind_v.core.wording import plural

MOST = 1000  # members of a sample
TEXT_LIMIT = 2**24  # bytes of a sample's text
OFFSET_BITS = 40  # of a sample's offset: a terabyte; the bits above are the number of its shard
KIND = "tar samples: shard and offset, length"  # of the index
NAMES = {"image", "images"}  # keys of a sample's JSON that may name its pictures


class TarRows(ShardedRows):
    """The samples of one WebDataset shard, or of the shards of one split in a folder."""

    file_kind = "WebDataset"

    def __init__(
        self, path: Path, images: Path | None = None, split: str | None = None, order: Sequence[str] = LEARN
    ) -> None:
        """`images` holds pictures that samples only name; `split` and `order` select the shards of a folder.

        Raises DataError, MissingInput or UsageError.
        """
        self.path = path
        self.files, self.choice = shards_of(path, ".tar", split, order)
        stamps = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in self.files]
        kind = KIND if path.is_file() else f"{KIND} {stamps}"
        self._index = Index(path.resolve(), kind, self._find_samples, self.choice.name)
        self._images = open_pictures(images)
        self._opened = [Reopened(file) for file in self.files]
        shards = np.arange(1, len(self.files) + 1, dtype=np.uint64) << np.uint64(OFFSET_BITS)
        self._ends = np.searchsorted(self._index.array[0], shards)  # of each file, in rows

    def _find_samples(self) -> np.ndarray:
        """Shard and offset, and length, of every sample that may be a row."""
        starts: list[int] = []
        lengths: list[int] = []
        texts = False
        for number, file in enumerate(self.files):
            if trouble := stand_in(file):
                raise DataError(f"{file}: {trouble}")
            with file.open("rb") as opened:
                for start, end, has_text in _samples(file, opened):
                    starts.append(number << OFFSET_BITS | start)
                    lengths.append(end - start)
                    texts = texts or has_text
        if not texts:
            raise DataError(
                f"{self.path}: a tar without a .txt or .json beside its images has no rows — give the rows in its "
                "place, and the tar with --images"
            )
        return np.array([starts, lengths], np.uint64)

    def row(self, index: int) -> Row:
        fields, pictures = self._sample(index)
        if pictures:
            fields = {key: value for key, value in fields.items() if key not in NAMES}
            fields["image"] = [name for name, _ in pictures]
        return self.read(fields)

    def picture(self, index: int, position: int, name: str) -> bytes:
        member = dict(self._sample(index)[1]).get(name)
        if member is None:
            return super().picture(index, position, name)
        check_size(name, member.size)
        return self._read(index, member)

    def _read(self, index: int, member: Member) -> bytes:
        if member.trouble:
            raise RowError(f"{member.name}: {member.trouble}", "tar")
        return read_exactly(self._opened[self._at(index)[0]].handle, member)

    def _members(self, index: int) -> dict[str, Member]:
        """The members of a sample by their ending. Raises RowError."""
        start, length = (int(number) for number in self._index.array[:, index])
        start &= (1 << OFFSET_BITS) - 1
        members: dict[str, Member] = {}
        sample = ""
        try:
            for member in read_members(self._opened[self._at(index)[0]].handle, start, start + length):
                key, kind = member.key
                sample = sample or key
                if key and key == sample:
                    members[kind] = member
                if len(members) > MOST:
                    raise RowError(f"more than {MOST} members of one sample", "tar")
        except (DamagedTar, OSError) as error:
            raise RowError(f"damaged ({error})", "tar") from None
        return members

    def _sample(self, index: int) -> tuple[dict[str, Any], list[tuple[str, Member]]]:
        """The fields of a sample, and its pictures with their names. Raises RowError."""
        members = self._members(index)
        for member in members.values():
            if member.trouble:
                raise RowError(f"{member.name}: {member.trouble}", "tar")
        fields = self._parse(index, members["json"]) if "json" in members else {}
        texts = [kind for kind in members if kind == "txt"] or [kind for kind in members if kind.endswith(".txt")]
        if len(texts) > 1:
            raise RowError(f"several texts ({', '.join(members[kind].name for kind in texts)})", "tar")
        if texts and not any(fields.get(key) for key in (*TALKS, "texts")):
            fields["caption"] = self._text(index, members[texts[0]])
        pictures = [member for kind, member in members.items() if f".{kind.rpartition('.')[2]}" in PICTURE_ENDINGS]
        unread = [member.name for kind, member in members.items() if kind not in ("json", *texts)]
        if unread and not pictures:
            raise RowError(
                f"{unread[0]} is not supported: a sample has images ({', '.join(PICTURE_ENDINGS)}), a caption in .txt "
                "and fields in .json",
                "images not read",
            )
        return fields, _in_order(pictures, fields)

    def _text(self, index: int, member: Member) -> str:
        if member.size > TEXT_LIMIT:
            raise RowError(f"{member.name}: {member.size:,} bytes are too long for a text", "tar")
        try:
            return self._read(index, member).decode("utf-8-sig").strip()
        except UnicodeDecodeError as error:
            raise RowError(f"{member.name}: not UTF-8 ({error})", "tar") from None

    def _parse(self, index: int, member: Member) -> dict[str, Any]:
        fields = parse_json(self._text(index, member), f"{member.name}: ")
        if isinstance(fields, list):
            return {"conversations": fields}
        if not isinstance(fields, dict):
            raise RowError(f"{member.name}: not a JSON object", "json")
        return fields


def _samples(path: Path, file: Any) -> Iterator[tuple[int, int, bool]]:
    """Start and end of each sample of an archive, and whether it has a text. Raises DataError for a damaged archive."""
    sample, start, end, useful, has_text = "", 0, 0, False, False
    try:
        for member in read_members(file):
            key, kind = member.key
            if not key:
                continue
            if key != sample:
                if useful:
                    yield start, end, has_text
                sample, start, useful, has_text = key, member.start, False, False
            ending = f".{kind.rpartition('.')[2]}"
            text = ending in (".txt", ".json")
            end, useful, has_text = member.end, useful or text or ending in PICTURE_ENDINGS, has_text or text
    except DamagedTar as error:
        if not error.cut:
            raise DataError(f"{path}: damaged ({error}) — download it again") from None
        if useful:
            yield start, end, has_text
        start, end, useful = error.at, error.at + BLOCK, True  # a broken row of its own
    if useful:
        yield start, end, has_text


def _in_order(pictures: list[Member], fields: dict[str, Any]) -> list[tuple[str, Member]]:
    """The pictures of a sample with their names, in the order of its fields, else in the order of the archive."""
    named = next((value for key in sorted(NAMES) if (value := fields.get(key))), None)
    texts = isinstance(named, str) or (isinstance(named, list) and all(isinstance(name, str) for name in named))
    names = image_names(named) if texts else []
    if names and pictures:
        by_name = {member.name.rpartition("/")[2]: member for member in pictures}
        if all(name.rpartition("/")[2] in by_name for name in names):
            pictures = [by_name[name.rpartition("/")[2]] for name in names]
        elif len(names) != len(pictures):
            raise RowError(f"its fields name {plural(len(names), 'image')}, the sample has {len(pictures)}", "tar")
    return [
        (f"image {number}" if NO_NAME.search(member.name) else member.name, member)
        for number, member in enumerate(pictures, 1)
    ]
