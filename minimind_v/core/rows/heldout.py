"""Hold out rows by image: training uses none of their images, whatever the file name."""

from __future__ import annotations

import hashlib
import json
import random
from array import array
from collections.abc import Callable
from pathlib import Path

import numpy as np

from minimind_v.core.errors import RowError, UsageError
from minimind_v.core.files import read_notes, write_text
from minimind_v.core.rows.digests import Digests, picture_digest, text_digest
from minimind_v.core.rows.row import RowStore
from minimind_v.core.wording import plural


def hold_out(rows: RowStore, count: int, seed: int, path: Path, origin: str, say: Callable[[str], None]) -> np.ndarray:
    """Choose the held-out rows, bool [rows]: about `count` of them, at most a tenth.

    Grouping rows by picture reads every picture once. So the file `path` keeps the choice for all runs over the same
    data, which `origin` identifies. A digest protects the file: after any change the rows are chosen again. Raises
    UsageError where no row can be held out.
    """
    count = min(count, len(rows) // 10)
    key = hashlib.blake2b(json.dumps([origin, len(rows), count, seed]).encode(), digest_size=8).hexdigest()
    chosen = _read(path, key)
    if chosen is None:
        say(f"choosing held-out rows: reading the images of all {len(rows):,} rows once")
        held = choose(group_by_picture(rows, lambda index, error: None), count, seed)
        chosen = np.flatnonzero(held).tolist()
        write_text(path, json.dumps({"of": key, "rows": chosen, "digest": _digest(key, chosen)}) + "\n")
    if not chosen:
        raise UsageError(
            f"{rows.path}: none of its {plural(len(rows), 'row')} can be held out by image, so validation is not "
            "possible — leave out --val-every"
        )
    mask = np.zeros(len(rows), bool)
    mask[chosen] = True
    return mask


def choose(groups: np.ndarray, limit: int, seed: int) -> np.ndarray:
    """Choose the held-out rows, bool [rows]: whole groups in the seed's order, at most `limit` rows together."""
    usable = groups >= 0
    _, which, sizes = np.unique(groups[usable], return_inverse=True, return_counts=True)
    order = list(range(len(sizes)))
    random.Random(seed).shuffle(order)
    chosen, count = np.zeros(len(sizes), bool), 0
    for group in order:
        if count + sizes[group] <= limit:
            chosen[group] = True
            count += int(sizes[group])
    held = np.zeros(len(groups), bool)
    held[usable] = chosen[which]
    return held


def group_by_picture(
    rows: RowStore, broken: Callable[[int, RowError], None], progress: Callable[[int], None] = lambda done: None
) -> np.ndarray:
    """For each row the first row of its group, int64 [rows]: rows with equal pictures or, without any, equal texts.

    An unreadable row gets -1, and `broken` receives its error.
    """
    digests, unread = Digests(), []
    for index in range(len(rows)):
        try:
            for digest in digests_of(rows, index):
                digests.add(index, digest)
        except RowError as error:
            unread.append(index)
            broken(index, error)
        if index % 100 == 99 or index + 1 == len(rows):
            progress(index + 1)
    parent = array("q", range(len(rows)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = index = parent[parent[index]]
        return index

    owners, firsts = digests.owners, digests.firsts()
    repeated = owners != firsts
    for index, first in zip(owners[repeated].tolist(), firsts[repeated].tolist(), strict=True):
        smaller, larger = sorted((root(index), root(first)))
        parent[larger] = smaller
    groups = np.array([root(index) for index in range(len(rows))], np.int64)
    groups[unread] = -1
    return groups


def digests_of(rows: RowStore, index: int) -> list[int]:
    """The digest of each picture that a row shows, or of the text of a row without any. Raises RowError."""
    row = rows.row(index)
    pictures = [rows.picture(index, position, name) for position, name in enumerate(row.shown)]
    return [picture_digest(data) for data in pictures] or [text_digest(row)]


def _read(path: Path, key: str) -> list[int] | None:
    noted = read_notes(path)
    chosen = noted.get("rows")
    if not isinstance(chosen, list) or not all(isinstance(row, int) for row in chosen):
        return None
    return chosen if noted.get("of") == key and noted.get("digest") == _digest(key, chosen) else None


def _digest(key: str, chosen: list[int]) -> str:
    return hashlib.blake2b(json.dumps([key, chosen]).encode(), digest_size=8).hexdigest()
