"""`mmv eval`: one report, for people or for programs."""

import json
import math
import signal
import time

import pytest

from tests.cli.harness import ASSETS, EYE, PATIENCE, SIGHT, Running, installed, read_rows, run_mmv, write_rows


@pytest.fixture
def score(sighted, tiny_data):
    def run(*more, data=None, code=0):
        ended = run_mmv("eval", "--model", sighted, "--data", data or tiny_data.data("sft"), *SIGHT, *more)
        assert ended.code == code, ended.err
        return ended

    return run


def test_the_installed_command_prints_one_json_object_and_nothing_else(sighted, tiny_data):
    data = tiny_data.data("sft")
    ended = installed("eval", "--model", sighted, "--data", data, *SIGHT, "--limit", 6, "--blind", "--json")
    report = ended.json
    assert report["rows"] == 6
    assert report["model"] == str(sighted)
    assert "41 tensors loaded" in ended.err


def test_the_report_holds_loss_and_accuracy(score):
    report = score("--limit", 10, "--json").json
    assert report["perplexity"] == pytest.approx(math.exp(report["loss"]))
    assert 0 <= report["accuracy"] <= 1
    assert report["short_answers"] > report["rows"] == 10
    assert report["supervised_tokens"] > 2 * report["short_answers"]
    assert "loss_blind" not in report


def test_without_json_it_is_a_table(score):
    lines = dict(line.split(maxsplit=1) for line in score("--limit", 2).out.splitlines())
    assert lines["rows"] == "2"
    assert float(lines["loss"]) > 0


def test_blind_scores_the_same_rows_without_their_pictures(score):
    report = score("--limit", 10, "--blind", "--json").json
    assert report["loss"] != report["loss_blind"]
    assert score("--limit", 10, "--json").json["loss"] == report["loss"]


@pytest.mark.long
def test_a_blind_score_does_not_depend_on_the_pictures(score, tiny_data):
    """A set whose pictures have been swapped around scores differently seeing, and just the same blind."""
    unswapped = score("--images", tiny_data.images("sft"), "--limit", 4, "--blind", "--json").json
    swapped = score("--images", tiny_data.images("pretrain"), "--limit", 4, "--blind", "--json").json
    assert unswapped["loss"] != swapped["loss"]
    assert unswapped["loss_blind"] == swapped["loss_blind"]


def test_the_batch_size_does_not_change_the_score(score):
    single, many = (score("--limit", 9, "--batch-size", size, "--json").json for size in (1, 9))
    assert single["loss"] == pytest.approx(many["loss"], rel=1e-5)
    assert single["supervised_tokens"] == many["supervised_tokens"]
    assert single["accuracy"] == many["accuracy"]


def test_rows_with_long_answers_give_a_loss_only(score, tiny_data):
    report = score("--limit", 3, "--json", data=tiny_data.data("pretrain")).json
    assert report["loss"] > 0
    assert report["short_answers"] == 0
    assert report["accuracy"] is None


def test_broken_rows_are_left_out_and_counted(score, tiny_data, tmp_path):
    data = write_rows(tmp_path / "mine.jsonl", ["{", *read_rows(tiny_data.data("sft"))[:3], {"conversations": []}])
    ended = score("--images", tiny_data.images("sft"), "--json", data=data)
    assert (ended.json["rows"], ended.json["broken_rows"]) == (3, 2)
    assert f"row skipped: {data}:1: not JSON" in ended.err
    assert f"row skipped: {data}:5:" in ended.err


def test_pictures_are_found_beside_the_data_or_asked_for(score, tiny_data, tmp_path):
    assert score("--limit", 2, "--json").json["broken_rows"] == 0
    alone = write_rows(tmp_path / "alone.jsonl", read_rows(tiny_data.data("sft"))[:2])
    assert "no row could be evaluated; the first problem:" in score(data=alone, code=1).error


def test_rows_without_pictures_need_none(score, tmp_path):
    talk = [{"role": "user", "content": "Is it red?"}, {"role": "assistant", "content": "no"}]
    report = score("--json", data=write_rows(tmp_path / "talk.jsonl", [{"conversations": talk}])).json
    assert (report["rows"], report["short_answers"]) == (1, 1)


@pytest.mark.parametrize(
    ("option", "wrong", "code", "message"),
    [
        ("--data", "nowhere.jsonl", 1, "no data file nowhere.jsonl"),
        ("--images", "nowhere.zip", 1, "no file nowhere.zip"),
        ("--model", "nowhere.pth", 1, "no weights at nowhere.pth"),
        ("--vision-model", "nowhere", 1, "no vision model in nowhere"),
        ("--tokenizer", "nowhere", 1, "no tokenizer in nowhere"),
        ("--device", "gpu", 2, "--device gpu"),
    ],
)
def test_a_missing_input_is_one_line(sighted, tiny_data, option, wrong, code, message):
    given = {"--model": sighted, "--data": tiny_data.data("sft"), "--vision-model": EYE, "--tokenizer": ASSETS}
    ended = run_mmv("eval", *(word for pair in (given | {option: wrong}).items() for word in pair))
    assert (ended.code, message in ended.error) == (code, True)


def test_with_nothing_there_the_command_that_makes_the_data_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ended = run_mmv("eval")
    assert ended.code == 1
    assert "mmv download dataset" in ended.error
    assert "may be training data" not in ended.err  # nothing is scored


def test_a_report_of_standard_rows_says_that_they_may_be_training_data(sighted, tiny_data, tmp_path, monkeypatch):
    monkeypatch.setenv("MMV_DATA", str(tiny_data.data("sft")))
    note = f"scoring rows of {tiny_data.data('sft')}, which may be training data: name held-out rows with --data"
    asked = ("eval", "--model", sighted, *SIGHT, "--limit", 2, "--json")
    assert run_mmv(*asked).json["note"] == note
    assert run_mmv(*asked, "--task", "loss", "--out", tmp_path / "out").json["note"] == note
    assert json.loads((tmp_path / "out" / "report.json").read_text())["note"] == note
    assert note in (tmp_path / "out" / "report.html").read_text()
    assert "note" not in run_mmv(*asked, "--data", tiny_data.data("sft")).json


@pytest.mark.parametrize("option", ["--limit", "--batch-size", "--max-length"])
def test_numbers_are_at_least_one(score, option):
    assert option in score(option, 0, code=2).err


def test_an_unknown_precision_is_refused_before_anything_is_read(tiny_data):
    ended = run_mmv("eval", "--model", "nothing.pth", "--data", "nothing.jsonl", "--dtype", "bfloat")
    assert ended.code == 2
    assert "--dtype 'bfloat' must be one of auto, float32, bfloat16" in ended.err


# --- tasks and comparison ---------------------------------------------------------------------------------------------


@pytest.mark.long
def test_a_task_prints_one_object_and_compare_reads_its_folder(score, tmp_path):
    reports = [score("--task", "vqa", "--limit", 6, "--out", tmp_path / name, "--json").json for name in "ab"]
    assert reports[0]["rows"] == 6
    assert reports[0]["visual_gain"].keys() == {"blank", "swapped", "none"}
    assert reports[0]["predictions"] == str(tmp_path / "a" / "predictions.jsonl")
    files = {"predictions": "", "page": ""}
    assert reports[0] | files == reports[1] | files
    ended = run_mmv("compare", tmp_path / "a", tmp_path / "b", "--json")
    assert [metric["difference"] for metric in ended.json["metrics"]] == [0, 0]
    assert ended.json["changed"] == []
    seeds = run_mmv("compare", tmp_path / "a", tmp_path / "b", "--", tmp_path / "b", tmp_path / "a").out
    assert "between seeds: A ±0.0000, B ±0.0000" in seeds


def resumable(sighted, tiny_data, out):
    data = tiny_data.data("sft")
    return ["eval", "--model", sighted, "--data", data, *SIGHT, "--task", "loss", "--limit", 24, "--json", "--out", out]


@pytest.fixture(scope="module")
def whole(sighted, tiny_data, tmp_path_factory):
    """The report and the predictions of an evaluation that nobody killed."""
    out = tmp_path_factory.mktemp("whole")
    return installed(*resumable(sighted, tiny_data, out)).json, (out / "predictions.jsonl").read_bytes()


def waits_before_its_end():
    """However late the kill comes on a busy machine, it comes before the predictions are written."""
    from minimind_v.core.evaluate import by_task

    by_task.lines_of = lambda *_: time.sleep(PATIENCE)


@pytest.mark.long
@pytest.mark.parametrize("gpus", [1, 2])
def test_a_killed_evaluation_is_resumed_to_the_same_predictions(sighted, tiny_data, tmp_path, whole, gpus):
    out = tmp_path / "killed"
    words, replies = [*resumable(sighted, tiny_data, out), "--gpus", gpus], out / ".replies.jsonl"
    running = Running(tmp_path / "log", *words, prepare=waits_before_its_end)
    running.until(lambda: replies.exists() and replies.read_bytes().count(b"\n") >= 3).send(signal.SIGKILL).wait()
    kept = replies.read_text().splitlines(keepends=True)
    assert not (out / "predictions.jsonl").exists()
    resumed = installed(*words).json
    assert len(kept) >= 3
    assert resumed["metrics"] == whole[0]["metrics"]
    assert (out / "predictions.jsonl").read_bytes() == whole[1]
    assert sorted(path.name for path in replies.parent.iterdir()) == [
        "predictions.jsonl", "report.html", "report.json", "thumbnails.jsonl",
    ]  # fmt: skip


def test_a_task_is_shown_as_a_table_that_begins_with_what_the_images_add(score, tmp_path):
    lines = score("--task", "loss", "--limit", 3, "--out", tmp_path / "a").out.splitlines()
    names = [line.split("  ")[0] for line in lines]
    assert names[6:10] == ["gain over blank", "gain over swapped", "gain over none", "loss"]
    assert names[-2:] == ["predictions", "page"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--task", "vqa", "--blind"], "--blind is for an evaluation without --task"),
        (["--task", "vqa", "--batch-size", 2], "--batch-size is for an evaluation without --task"),
        (["--task", "vqa", "--max-length", 9, "--blind"], "--blind, --max-length are for an evaluation without --task"),
        (["--out", "a"], "--out is for an evaluation with --task"),
        (["--gpus", 2], "--gpus is for an evaluation with --task"),
        (["--task", "vqu"], "no task 'vqu' (did you mean 'vqa'?) — there are loss, vqa, yesno, choice, caption"),
        (["--task", "none.yaml"], "none.yaml"),
    ],
)
def test_a_wrong_task_is_refused_before_the_model_is_loaded(score, words, message):
    ended = score(*words, code=1 if "none.yaml" in words else 2)
    assert message in ended.error
    assert "tensors loaded" not in ended.err


def test_a_folder_with_other_files_is_not_written_to(score, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    ended = score("--task", "vqa", "--limit", 1, "--out", tmp_path, code=2)
    assert "holds notes.txt, and no evaluation" in ended.error
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a"], "two sides are compared"),
        (["a", "b", "c"], "give -- once, between the two sides"),
        (["a", "--", "b", "--", "c"], "give -- once, between the two sides"),
        (["a", "--"], "two sides are compared"),
    ],
)
def test_a_comparison_needs_two_sides(words, message):
    ended = run_mmv("compare", *words)
    assert ended.code == 2
    assert message in ended.error


def test_all_missing_evaluations_are_named_at_once(tmp_path):
    ended = run_mmv("compare", tmp_path / "x", tmp_path / "y")
    assert ended.code == 1
    assert "2 inputs are missing" in ended.error


def test_compare_shows_a_question_with_lines_and_control_characters_on_one_line(tmp_path):
    for name, score in (("a", 0), ("b", 1)):
        line = {"id": 1, "score": score, "question": "first\nsecond\x1b[31m", "truth": "cat", "answer": name}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(line), encoding="utf-8")
    out = run_mmv("compare", tmp_path / "a.jsonl", tmp_path / "b.jsonl").out
    assert out.splitlines()[-1] == r"  1: first second\x1b[31m → cat: a / b"


def test_a_comparison_is_written_as_a_page_from_scores_alone(tmp_path):
    for name, score in (("a", 0), ("b", 1)):
        lines = (json.dumps({"id": number, "score": score}) for number in range(3))
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    first, second, page = tmp_path / "a.jsonl", tmp_path / "b.jsonl", tmp_path / "page.html"
    for arguments in (["--html", page, first, "--", second], [first, second, f"--html={page}"]):
        ended = run_mmv("compare", *arguments)
        assert ended.code == 0, ended.err
        assert f"page: {page}" in ended.err
        html = page.read_text(encoding="utf-8")
        assert "Higher score in B" in html
        assert "None" not in html
        page.unlink()
    first.with_suffix(".html").write_text("mine")
    assert "is not a page by mmv" in run_mmv("compare", first, second, "--html", first.with_suffix(".html")).error
    assert "requires an argument" in run_mmv("compare", first, second, "--html").error
    assert run_mmv("compare", first, second, "--html", first).code == 2
