"""The splits of a data set (train, validation, test), recognised by file and folder names.

The words are those of Hugging Face's `datasets`, and `held_out`, which `mmv data split` writes. A file without such a
word in its name or folders belongs to train.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

from minimind_v.core.errors import DataError, UsageError, nearest
from minimind_v.core.wording import plural

WORDS = {
    "train": "train|training|trainset|trainval|.*训练.*",
    "validation": "validation|validate|valid|val|dev|valset|devset|minival|.*验证.*",
    "test": "test|testing|testset|eval|evaluation|.*测试.*",
    "held_out": "heldout|holdout",
}
ALL = "all"  # every file, whatever its name
LEARN = ("train",)  # the default of commands: the first of these splits that exists
SCORE = ("test", "validation", "held_out", "train")  # the default of commands that measure


@dataclass(frozen=True)
class Choice:
    """The selected split, and the message about it; `name` is empty where no file name has a split."""

    name: str
    notice: str = ""


def split_of(path: PurePath) -> str | None:
    """The split in the names of a path, the last name first; None without one."""
    for name in reversed([*path.parts[:-1], path.name.partition(".parquet")[0]]):
        for word in _terms(name):
            for split, pattern in WORDS.items():
                if re.fullmatch(pattern, word):
                    return split
    return None


def _terms(name: str) -> list[str]:
    """The words of `coco_val2017`, `myTrainSet` or `训练集-00001`, in small letters."""
    parted = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    joined = re.sub(r"(?i)(?<![a-z])(held|hold)[\W_]?out(?![a-z])", "heldout", parted)
    return [word.lower() for word in re.findall(r"[A-Za-z]+|[^\W\d_A-Za-z]+", joined)]


def shards_of(folder: Path, ending: str, requested: str | None, order: Sequence[str]) -> tuple[list[Path], Choice]:
    """The files of one split below a folder, with this ending, and the split; of a path that is a file, this file.

    Raises DataError without files, UsageError for an unknown split.
    """
    if not folder.is_dir():
        return [folder], Choice("")
    files = [
        file
        for file in sorted(filter(Path.is_file, folder.rglob(f"*{ending}")))
        if not any(name.startswith(".") for name in file.relative_to(folder).parts)  # left over, or another program's
    ]
    if not files:
        raise DataError(f"{folder}: a folder without {ending} files of rows")
    return of_one_split(folder, {file: file.relative_to(folder) for file in files}, requested, order)


def of_one_split(
    folder: Path, names: Mapping[Path, PurePath], requested: str | None, order: Sequence[str]
) -> tuple[list[Path], Choice]:
    """The files of one split, and the split; `names` are the paths that name the split of each file of a folder."""
    splits = {file: split_of(name) for file, name in names.items()}
    if not any(splits.values()):
        if requested not in (None, ALL, LEARN[0]):
            raise UsageError(f"--split {requested}: no file name in {folder} names a split, so all rows are train")
        return list(splits), Choice("")
    sizes = Counter(split or LEARN[0] for split in splits.values())
    choice = choose(folder, sizes, requested, order, "file")
    return [file for file, split in splits.items() if choice.name in (ALL, split or LEARN[0])], choice


def choose(where: object, sizes: Mapping[str, int], requested: str | None, order: Sequence[str], unit: str) -> Choice:
    """Select a split of a data set; `sizes` are the sizes of its splits, in some unit (`file`, `row`).

    Without a request, take the first of `order` that exists, or the only split. Raises UsageError for an unknown
    split, and where there are several and none of `order`.
    """
    listed = _listed(sizes, unit)
    if requested is not None:
        name = ALL if requested == ALL else _find(requested, sizes)
        if name is None:
            raise UsageError(f"--split {requested}: {where} has only the splits {listed}{nearest(requested, sizes)}")
    else:
        name = next(filter(None, (_find(name, sizes) for name in order)), None)
        name = name or (next(iter(sizes)) if len(sizes) == 1 else None)
        if name is None:
            raise UsageError(f"{where} has the splits {listed} but no train — choose one with --split")
    if len(sizes) == 1:
        only = next(iter(sizes))
        return Choice(only, "" if only == order[0] else f"{where}: its only split is {only}")
    if name == ALL:
        return Choice(ALL, f"{where}: all splits together, {listed}")
    others = _listed({other: size for other, size in sizes.items() if other != name}, unit)
    taken = f"{where}: reading the split {name} ({plural(sizes[name], unit)}), not {others}"
    return Choice(name, f"{taken} — choose another with --split NAME")


def _find(requested: str, names: Iterable[str]) -> str | None:
    """The split of this name or, if unique, of this meaning (`val` for `validation`)."""
    if requested in names:
        return requested
    meant = split_of(PurePath(requested))
    same = [name for name in names if meant and split_of(PurePath(name)) == meant]
    return same[0] if len(same) == 1 else None


def _listed(sizes: Mapping[str, int], unit: str) -> str:
    return ", ".join(f"{name} ({plural(size, unit)})" for name, size in sizes.items())
