"""`mmv download --task NAME`: a benchmark's files land where the command that it names reads them."""

import io
import shlex
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from minimind_v.core.errors import DataError, RowError
from minimind_v.core.evaluate.benchmarks import open_benchmark, read_picture
from minimind_v.core.evaluate.questions import questions_of
from minimind_v.core.evaluate.tasks import TASKS
from minimind_v.core.hub.sources import BENCHMARKS
from minimind_v.core.rows.pictures import open_pictures
from tests.cli.harness import run_mmv, tiny_data
from tests.hub.server import Hub

PICTURE = tiny_data().picture(0).read_bytes()


def parquet(*rows):
    target = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows)), target)
    return target.getvalue()


def row(number, answer):
    return {"question_id": str(number), "question": "Is it?", "answer": answer, "image": {"bytes": PICTURE}}


ROWS = [parquet(row(0, "yes")), parquet(row(1, "no"))]
REPOS = {
    "datasets/lmms-lab-encoder/POPE": {
        "README.md": b"#", "Full/random-00000-of-00001.parquet": parquet(row(9, "yes")),
        **{f"data/test-0000{n}-of-00002.parquet": ROWS[n] for n in range(2)},
    },
    "datasets/lmms-lab-encoder/GQA": {
        "testdev_balanced_instructions/testdev-00000-of-00001.parquet": parquet(
            {"id": "1", "imageId": "n7", "question": "Which?", "answer": "cat", "types": {"structural": "query"}}
        ),
        "testdev_balanced_images/testdev-00000-of-00001.parquet": parquet(
            {"id": "n1", "image": {"bytes": b"none"}}, {"id": "n7", "image": {"bytes": PICTURE}}
        ),
        "train_all_images/train-00000-of-00001.parquet": b"large",
    },
    "datasets/Lin-Chen/MMStar": {"README.md": b"#"},
}  # fmt: skip


@pytest.fixture
def get(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Hub(REPOS) as hub:
        yield lambda *options: run_mmv("download", *options, "--endpoint", hub.endpoint)


def command_of(ended):
    """The data and the images of the command that a download names."""
    terms = shlex.split(ended.err.partition("measure a model by it with `")[2].partition("`")[0])
    options = dict(zip(terms[2::2], terms[3::2], strict=True))
    paths = (Path(options[name]) if name in options else None for name in ("--data", "--images"))
    return options["--task"], open_benchmark(*paths)


def test_all_files_of_its_split_come_and_the_command_reads_them(get, tmp_path):
    done = get("--task", "pope")
    assert done.code == 0, done.err
    folder = tmp_path / "dataset/benchmarks/pope"
    assert sorted(file.name for file in folder.glob("*.parquet")) == [
        f"test-0000{n}-of-00002.parquet" for n in range(2)
    ]
    task, rows = command_of(done)
    assert (task, len(rows)) == ("yesno", 2)
    assert {file["action"] for file in get("--task", "pope", "--json").json["files"]} == {"kept"}


def test_images_in_files_of_their_own_are_found_by_id(get):
    done = get("--task", "gqa", "--json")
    assert len(done.json["files"]) == 2
    task, rows = command_of(done)
    [question] = questions_of(rows.row(0), 0, 1, "gqa:1")
    assert (task, question.truths, question.images) == ("vqa", ("cat",), ("n7",))
    assert read_picture(rows, rows.row(0), 0, 0, "n7") == PICTURE


def test_parquet_files_of_images_need_an_id_and_bytes(tmp_path):
    file = tmp_path / "images/a.parquet"
    file.parent.mkdir()
    file.write_bytes(parquet({"name": "n1", "image": {"bytes": PICTURE}}))
    with pytest.raises(DataError, match=r"a.parquet: no column `id` — images need `id`, `image`"):
        open_pictures(file.parent)
    file.write_bytes(parquet({"id": 1, "image": {"bytes": PICTURE}}, {"id": 2, "image": None}))
    pictures = open_pictures(file.parent)
    assert pictures.read("1") == PICTURE
    for name, problem in (("2", "no bytes of this image"), ("3", "no image with this id")):
        with pytest.raises(RowError, match=problem):
            pictures.read(name)
    file.write_bytes(b"damaged")
    with pytest.raises(DataError, match="not a parquet file that can be read"):
        open_pictures(file.parent)


def test_nothing_is_written_by_a_dry_run_and_what_is_missing_is_named(get, tmp_path):
    listed = get("--task", "pope", "--dry-run")
    assert "test-00001-of-00002.parquet" in listed.out
    assert not (tmp_path / "dataset").exists()
    assert "Lin-Chen/MMStar at" in get("--task", "mmstar").error
    assert "lacks mmstar.parquet — it has: README.md" in get("--task", "mmstar").error


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("--task", "popo"), "no such benchmark (did you mean 'pope'?)"),
        (("clip", "--task", "pope"), "leave out WHAT"),
        (("--task", "pope", "--sample", "4"), "leave out WHAT, --sample and --split"),
        (("--task", "pope", "--hub", "modelscope"), "--hub modelscope has no benchmarks"),
    ],
)
def test_what_does_not_go_together_is_a_usage_error(get, options, problem):
    ended = get(*options)
    assert (ended.code, problem in ended.error) == (2, True), ended.err


def test_every_benchmark_has_a_task_and_a_folder_of_its_own():
    assert {benchmark.task for benchmark in BENCHMARKS.values()} <= set(TASKS)
    folders = [folder for entry in BENCHMARKS.values() for folder in (entry.source.folder, entry.images_folder)]
    assert len(set(folders)) == 2 * len(BENCHMARKS)
