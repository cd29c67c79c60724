"""Every command takes every kind of file of captions: the same rows, the same pictures."""

from __future__ import annotations

import csv
import json
import tarfile
from pathlib import Path

import pytest

from minimind_v.core.rows.stores import open_rows
from tests.cli.harness import SIGHT, run_mmv, tiny_data

COUNT = 12


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of pictures, and name → caption."""
    folder = tmp_path_factory.mktemp("pictures")
    captions = {}
    rows = open_rows(tiny_data().data("pretrain"), tiny_data().images("pretrain"))
    for number in range(COUNT):
        row = rows.row(number)
        (folder / row.images[0]).write_bytes(rows.picture(number, 0, row.images[0]))
        captions[row.images[0]] = row.conversations[-1]["content"]
    return folder, captions


def write_csv(path, captions, column="image"):
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
        table.writerows([(column, "caption"), *captions.items()])
    return path


def as_csv(folder, pictures, captions):
    return write_csv(folder / "rows.csv", captions), pictures


def as_tsv(folder, pictures, captions):
    return write_csv(folder / "rows.tsv", captions), pictures


def as_imagefolder(folder, pictures, captions):
    for name in captions:
        (folder / "set" / "train").mkdir(parents=True, exist_ok=True)
        (folder / "set" / "train" / name).write_bytes((pictures / name).read_bytes())
    write_csv(folder / "set" / "train" / "metadata.csv", captions, "file_name")
    return folder / "set", None


def as_coco(folder, pictures, captions):
    images = [{"id": number, "file_name": name} for number, name in enumerate(captions)]
    annotations = [{"image_id": number, "caption": text} for number, text in enumerate(captions.values())]
    (folder / "rows.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    return folder / "rows.json", pictures


def as_tar(folder, pictures, captions):
    (folder / "shards").mkdir()
    with tarfile.open(folder / "shards" / "train-000.tar", "w") as archive:
        for name, text in captions.items():
            (folder / "text").write_text(text, encoding="utf-8")
            archive.add(pictures / name, name)
            archive.add(folder / "text", name.rpartition(".")[0] + ".txt")
    return folder / "shards", None


KINDS = {
    "CSV": as_csv, "TSV": as_tsv, "imagefolder": as_imagefolder, "COCO captions": as_coco, "WebDataset": as_tar,
}  # fmt: skip


@pytest.fixture(params=KINDS)
def data(request, tmp_path, pictures):
    """A kind's name, data of it, and where its pictures are."""
    return request.param, *KINDS[request.param](tmp_path, *pictures)


def ended_well(*line, images):
    ended = run_mmv(*line, *(("--images", images) if images else ()))
    assert ended.code == 0, (line, ended.err)
    return ended


def test_rows_are_shown_checked_and_written_in_another_form(data, tmp_path, pictures, guessed_time):
    kind, file, images = data
    folder, captions = pictures
    shown = run_mmv("info", file, "--json").json
    assert (shown["kind"], shown["rows"], shown["files"]) == ("dataset", COUNT, kind)
    checked = ended_well("data", "check", file, *SIGHT, "--json", images=images).json
    assert (checked["usable"], checked["problems"]) == (COUNT, [])
    assert ended_well("data", "stats", file, *SIGHT, "--json", images=images).json["rows"] == COUNT
    ended_well("data", "preview", file, *SIGHT, "--rows", 2, "--html", tmp_path / "page.html", images=images)
    for name in ("copy.parquet", "copy.jsonl"):
        ended_well("data", "convert", file, tmp_path / name, images=images)
        pictures_beside = tmp_path / "copy_images.zip" if name.endswith("jsonl") else None
        copy = open_rows(tmp_path / name, pictures_beside)
        rows = [copy.row(n) for n in range(len(copy))]
        assert [row.conversations[-1]["content"] for row in rows] == list(captions.values())
        assert [copy.picture(n, 0, row.images[0]) for n, row in enumerate(rows)] == [
            (folder / name).read_bytes() for name in captions
        ]
    split = ended_well("data", "split", file, "--out", tmp_path / "parts", "--held-out", 4, "--json", images=images)
    train = open_rows(Path(split.json["train"]), open_rows(file, images).pictures)
    row = train.row(0)
    assert train.picture(0, 0, row.images[0]) in [(folder / name).read_bytes() for name in captions]


@pytest.mark.long
def test_a_model_trains_and_is_scored(data, tmp_path):
    _, file, images = data
    line = tiny_data().train(tmp_path / "out", data=file, images=images, max_steps=2, workers=1)
    trained = run_mmv(*line)
    assert trained.code == 0, trained.err
    assert run_mmv(*line, "--resume").code == 0
    weights = tmp_path / "out" / "pretrain_vlm_128.pth"
    assert ended_well("eval", "--model", weights, "--data", file, *SIGHT, "--json", images=images).json["rows"] == COUNT


def test_pictures_beside_a_table_are_found(tmp_path, pictures):
    folder, captions = pictures
    data = write_csv(tmp_path / "mine_data.csv", captions)
    (tmp_path / "mine_images").symlink_to(folder)
    assert run_mmv("data", "check", data, *SIGHT, "--json").json["problems"] == []


def test_what_is_not_read_is_named_with_what_would_be(tmp_path, pictures):
    folder, captions = pictures
    assert "add a metadata.csv" in run_mmv("data", "check", folder, *SIGHT).error
    assert "add a metadata.csv" in run_mmv("info", folder).error
    (tmp_path / "bare.csv").write_text("\n".join(f"{name},{text}" for name, text in captions.items()))
    assert "add a line of column names above it" in run_mmv("info", tmp_path / "bare.csv").error
    (tmp_path / "set.tar.gz").write_bytes(b"\x1f\x8b" + bytes(600))
    assert "decompress it first" in run_mmv("data", "check", tmp_path / "set.tar.gz", *SIGHT).error
