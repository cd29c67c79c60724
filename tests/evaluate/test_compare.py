"""Two evaluations on the same questions: the difference and what it is worth, and what cannot be compared."""

from __future__ import annotations

import base64
import json
import math
import os
import re
import socket
from pathlib import Path

import pytest
from scipy import stats as reference

from minimind_v.core.errors import DataError, MissingInput, UsageError
from minimind_v.core.evaluate.compare import compare, read_predictions
from minimind_v.core.evaluate.sheets import read_thumbnails
from minimind_v.core.pages.compare_report import compare_page
from tests.cli.harness import run_mmv


@pytest.fixture
def predictions(tmp_path):
    """`predictions(name, scores)` is a file with a question for each score, two for each picture."""

    def make(name, scores, **changes):
        lines = [
            {"id": f"q{n}", "picture": f"p{n // 2}", "question": f"What is {n}?", "answer": f"a {score}",
             "truth": "cat", "score": score, "variant": variant, **changes}
            for n, score in enumerate(scores)
            for variant in ("seen", "blank")
        ]  # fmt: skip
        path = tmp_path / name / "predictions.jsonl"
        path.parent.mkdir()
        path.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
        return path

    return make


def test_the_difference_is_b_less_a_on_the_questions_with_their_images(predictions):
    first, second = predictions("a", [0, 0, 1, 1, 0, 1]), predictions("b", [1, 0, 1, 1, 1, 0])
    report = compare([read_predictions(first)], [read_predictions(second.parent)])
    (metric,) = report["metrics"]
    assert {"name", "difference", "ci_low", "ci_high", "p", "n", "clusters"} <= set(metric)
    assert metric["difference"] == pytest.approx(1 / 6)
    assert (metric["name"], metric["n"], metric["clusters"]) == ("score", 6, 3)
    assert metric["ci_low"] < 0 < metric["ci_high"]
    assert [(entry["id"], entry["score_first"], entry["score_second"]) for entry in report["changed"]] == [
        ("q0", 0, 1), ("q4", 0, 1), ("q5", 1, 0),
    ]  # fmt: skip
    assert report["changed"][0]["second"] == "a 1"


def test_an_evaluation_that_is_compared_with_itself_is_named(predictions):
    path, other = predictions("a", [0, 1]), predictions("b", [1, 0])
    warning = f"the same evaluation is on both sides: {path}"
    assert warning in run_mmv("compare", path, path.parent).err
    assert warning in run_mmv("compare", path, other, "--", path, other).err
    assert run_mmv("compare", path, other).err == ""


def test_an_empty_answer_is_shown_as_such(predictions):
    first, second = predictions("a", [0, 1], answer=""), predictions("b", [1, 1], answer="a cat")
    ended = run_mmv("compare", first, second)
    assert "→ cat: (empty) / a cat" in ended.out
    assert "1 question changed the score" in ended.out
    page = compare_page(compare([read_predictions(first)], [read_predictions(second)]), {})
    assert "(empty)" in page


def test_a_report_leads_to_its_predictions(predictions):
    path = predictions("a", [0, 1])
    for name, indent in (("report.json", 1), ("shown.json", None)):
        report = path.parent / name
        report.write_text(json.dumps({"predictions": "elsewhere/predictions.jsonl", "rows": 2}, indent=indent))
        assert read_predictions(report).path == path


def test_an_evaluation_and_its_copy_differ_in_nothing_and_prove_nothing(predictions):
    scores = [0, 1, 1, 0, 1, 1, 0, 1]
    report = compare(*([read_predictions(predictions(name, scores))] for name in "ab"))
    (metric,) = report["metrics"]
    assert (metric["difference"], metric["rows_to_see_half"], report["changed"]) == (0, None, [])
    assert metric["p"] == pytest.approx(1)
    assert metric["ci_low"] == pytest.approx(-metric["ci_high"])
    assert metric["ci_high"] > 0.1


def test_scores_that_are_no_shares_are_compared_by_students_t(predictions):
    first, second = [1.5, 2.5, 3.0, 2.0], [1.0, 2.25, 2.0, 1.5]
    report = compare(*([read_predictions(predictions(name, s))] for name, s in (("a", first), ("b", second))))
    differences = [(second[n] + second[n + 1] - first[n] - first[n + 1]) / 2 for n in (0, 2)]
    (metric,) = report["metrics"]
    assert metric["difference"] == pytest.approx(sum(differences) / 2)
    error = reference.sem(differences)
    half = reference.t.ppf(0.975, 1) * error
    assert (metric["ci_low"], metric["ci_high"]) == pytest.approx(
        (metric["difference"] - half, metric["difference"] + half)
    )
    assert metric["rows_to_see_half"] == math.ceil(
        4 * ((1.959964 + 0.841621) * error / (metric["difference"] / 2)) ** 2
    )


def test_only_questions_of_both_are_paired(predictions):
    report = compare(
        [read_predictions(predictions("a", [0, 1, 0, 1]))], [read_predictions(predictions("b", [1, 1, 0, 1, 1, 1]))]
    )
    assert (report["rows"], report["unpaired"]) == (4, 2)


def test_seeds_of_a_side_show_their_spread(predictions):
    runs = {"a1": [0, 1, 0, 1, 0, 0], "a2": [0, 1, 0, 1, 1, 1], "b1": [1, 1, 1, 1, 0, 1], "b2": [1, 1, 0, 1, 1, 1]}
    read = {name: read_predictions(predictions(name, scores)) for name, scores in runs.items()}
    report = compare([read["a1"], read["a2"]], [read["b1"], read["b2"]])
    (seeds,), (metric,) = report["seeds"], report["metrics"]
    assert seeds["first"] == pytest.approx([2 / 6, 4 / 6])
    assert seeds["second"] == pytest.approx([5 / 6, 5 / 6])
    assert seeds["deviations"] == pytest.approx([math.sqrt(2) / 6, 0])
    assert metric["difference"] == pytest.approx(2 / 6)


def test_what_cannot_be_compared_is_refused(predictions, tmp_path):
    first = read_predictions(predictions("a", [0, 1]))
    with pytest.raises(DataError, match=r"the question q0 differs: truth 'cat' in .*, 'dog' in "):
        compare([first], [read_predictions(predictions("other", [0, 1], truth="dog"))])
    with pytest.raises(UsageError, match="different tasks: "):
        compare([first], [read_predictions(predictions("task", [0, 1], task="vqa"))])
    with pytest.raises(DataError, match="no question in common"):
        compare([first], [read_predictions(predictions("ids", [1], id="x"))])
    with pytest.raises(DataError, match="a second prediction for the question x"):
        read_predictions(predictions("twice", [1, 1], id="x"))
    with_sums = read_predictions(predictions("sums", [0, 1], task="vqa", statistics={"vqa": [0, 1]}))
    with pytest.raises(DataError, match="no metric in common — evaluate both by the same task"):
        compare([with_sums], [read_predictions(predictions("plain", [0, 1], task="vqa"))])
    with pytest.raises(MissingInput, match=r"no predictions at .*none"):
        read_predictions(tmp_path / "none")
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"id": 1}\n')
    with pytest.raises(DataError, match=r"broken\.jsonl:1: no score — not a prediction"):
        read_predictions(broken)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"score": "high"}, r":2: the score 'high' is no number"),
        ({"score": None}, r":2: the score None is no number"),
        ({"score": float("nan")}, r":2: the score nan is no number"),
        ({"score": 1e308}, r":2: the score 1e\+308 is no number"),
        ({"score": 1, "statistics": 5}, r":2: the statistics are not lists of numbers by metric"),
        ({"score": 1, "statistics": {"vqa": [1, None]}}, r":2: the statistics are not lists of numbers by metric"),
        ({"score": 1, "statistics": {"vqa": 1}}, r":2: the statistics are not lists of numbers by metric"),
        (b"\xff", r":2: the text is not UTF-8"),
        (b"[1]", r":2: not a JSON object"),
    ],
)
def test_a_line_with_odd_values_is_named(tmp_path, line, message):
    file = tmp_path / "damaged.jsonl"
    text = line if isinstance(line, bytes) else json.dumps({"id": 1, **line}).encode()
    file.write_bytes(b"\n" + text + b"\n")
    with pytest.raises(DataError, match=message):
        read_predictions(file)


def test_a_report_that_names_no_predictions_is_refused(tmp_path):
    for name in ("report.json", "report.jsonl"):
        report = tmp_path / name
        report.write_text(json.dumps({"predictions": str(report)}))
        with pytest.raises(DataError, match="no id and no score"):
            read_predictions(report)
    report.write_text(json.dumps({"predictions": "gone.jsonl"}))
    with pytest.raises(MissingInput, match=r"gone\.jsonl, which .* names"):
        read_predictions(report)


SPECIAL = {
    "pipe": os.mkfifo,
    "socket": lambda path: socket.socket(socket.AF_UNIX).bind(str(path)),
    "device": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("make", SPECIAL.values(), ids=SPECIAL)
def test_what_is_no_regular_file_is_refused_at_once(tmp_path, monkeypatch, make):
    monkeypatch.chdir(tmp_path)  # the name of a socket is short
    for name in ("predictions.jsonl", "report.json"):
        make(Path(name))
        with pytest.raises(MissingInput, match=rf"a pipe, a socket or a device is at {name} — "):
            read_predictions(Path(name))
    Path("named.json").write_text(json.dumps({"predictions": "predictions.jsonl"}))
    with pytest.raises(MissingInput, match=r"is at predictions\.jsonl, which named\.json names"):
        read_predictions(Path("named.json"))


@pytest.mark.parametrize("make", SPECIAL.values(), ids=SPECIAL)
def test_a_page_has_no_thumbnails_where_their_file_is_no_regular_one(predictions, tmp_path, monkeypatch, make):
    sides = [predictions(name, [0, 1]).parent for name in "ab"]
    monkeypatch.chdir(sides[0])
    make(Path("thumbnails.jsonl"))
    assert run_mmv("compare", *sides, "--html", tmp_path / "page.html").code == 0


def test_giant_files_are_refused_without_being_read(tmp_path):
    for name in ("report.json", "predictions.jsonl", "huge.jsonl"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(1 << (40 if name.startswith("huge") else 25))  # holes
        with pytest.raises(DataError, match=r"1: longer than|larger than"):
            read_predictions(tmp_path / name)


def test_giant_thumbnails_are_left_out(tmp_path):
    small = {"picture": "a", "jpeg": [base64.b64encode(b"small").decode()]}
    giant = {"picture": "b", "jpeg": [base64.b64encode(bytes(1 << 20)).decode()]}
    many = ({"picture": f"c{number}", "jpeg": []} for number in range(5000))
    (tmp_path / "thumbnails.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in (giant, small, *many)))
    thumbnails = read_thumbnails(tmp_path)
    assert thumbnails["a"] == [b"small"]
    assert "b" not in thumbnails
    assert len(thumbnails) <= 1000
    with (tmp_path / "thumbnails.jsonl").open("r+b") as file:
        file.truncate(1 << 40)  # holes
    assert read_thumbnails(tmp_path) == {}


@pytest.mark.parametrize("name", ["a" * 5000, "a\0b", "\ud800"])
def test_a_report_may_name_what_no_file_can_be_called(tmp_path, name):
    (tmp_path / "report.json").write_text(json.dumps({"predictions": name}))
    with pytest.raises(MissingInput, match=r"no predictions at .*, which .*report\.json names"):
        read_predictions(tmp_path / "report.json")


def test_an_answer_may_have_every_line_separator_of_unicode(tmp_path):
    file = tmp_path / "predictions.jsonl"
    answer = "a\u2028b\u2029c\x85d"
    file.write_text(json.dumps({"id": answer, "answer": answer, "score": 1}, ensure_ascii=False) + "\n", "utf-8")
    assert read_predictions(file).lines[answer]["answer"] == answer


def test_statistics_of_unequal_length_are_refused(predictions):
    first = read_predictions(predictions("a", [0, 1], task="vqa", statistics={"vqa": [0, 1]}))
    second = read_predictions(predictions("b", [0, 1], task="vqa", statistics={"vqa": [0, 1]}))
    second.lines["q1"]["statistics"] = {"vqa": [0, 0, 1]}
    with pytest.raises(
        DataError, match=r"b.predictions.jsonl: the statistics of vqa of the question q1 are not as many"
    ):
        compare([first], [second])


@pytest.mark.parametrize(("shift", "word"), [(1.0, "worse"), (-1.0, "better")])
def test_of_a_loss_it_is_said_whether_b_is_worse_and_the_losses_are_shown(predictions, shift, word):
    losses = [3 + n / 8 for n in range(12)]
    paths = []
    for name, own in (("a", losses), ("b", [loss + shift + n % 5 / 10 for n, loss in enumerate(losses)])):
        paths.append(predictions(name, own, task="loss", answer=""))
        lines = [json.loads(line) for line in paths[-1].read_text().splitlines()]
        sums = [{**line, "statistics": {"loss": [line["score"], 1.0]}} for line in lines]
        paths[-1].write_text("".join(f"{json.dumps(line)}\n" for line in sums), encoding="utf-8")
    ended = run_mmv("compare", *paths)
    assert ended.out.count(f"{word} in B (lower is better)") == 1
    assert "p below 0.001" in ended.out
    assert len(re.findall(r"→ cat: \d\.\d{4} / \d\.\d{4}", ended.out)) == 10
    assert "2 more" in ended.out
    report = compare(*([read_predictions(path)] for path in paths))
    html = compare_page(report, {})
    assert f"<b>{word} in B (lower is better)</b>" in html
    assert f"<h2>{word.capitalize()} in B</h2>" in html
    assert "igher" not in html
