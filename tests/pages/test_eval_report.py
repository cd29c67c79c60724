"""The page of an evaluation: what it says about models of known behaviour, and that no text of theirs breaks it."""

from __future__ import annotations

import json
import math
import random
import re

import pytest

from minimind_v.cli.evaluate import _show_report
from minimind_v.cli.terminal import Terminal
from minimind_v.core.errors import UsageError
from minimind_v.core.evaluate.answering import Answering
from minimind_v.core.evaluate.ask import Reply
from minimind_v.core.evaluate.benchmarks import open_benchmark
from minimind_v.core.evaluate.by_task import choose_task, evaluate_task
from minimind_v.core.evaluate.measure import BLANK_IMAGE
from minimind_v.core.formats.load import load
from minimind_v.core.pages.eval_report import eval_report_page, write_eval_report
from minimind_v.core.pages.frame import POLICY
from tests.cli.harness import ASSETS, EYE, run_mmv, sighted, tiny_data, write_rows
from tests.pages.browser import open_browser

HOSTILE = '</p><script>alert("1")</script><img src=x onerror=alert(2)> \x1b[31m \u202e" onload="'


@pytest.fixture(scope="module")
def loaded():
    return load(sighted(), EYE, ASSETS, "cpu")


@pytest.fixture
def evaluate(loaded, tmp_path, monkeypatch):
    """`evaluate(answer, rows)` measures a model that replies to an ask by this function."""

    def measure(answer, rows, task="yesno", out="out"):
        monkeypatch.setattr(Answering, "reply", lambda self, asks: [answer(ask) for ask in asks])
        store = open_benchmark(write_rows(tmp_path / "rows.jsonl", rows), tiny_data().folder)
        return evaluate_task(loaded, choose_task(task), store, tmp_path / out)

    return measure


def saying(text, probability=0.9):
    return Reply(text, (math.log(probability),), (1,))


def sees(ask):
    return bool(ask.images) and ask.images[0] != BLANK_IMAGE


def yes_no_rows(images=40, each=2, **more):
    """Questions about images, of each image as many with the answer yes as with no, or one more."""
    return [
        {"question_id": f"{image}.{turn}", "question": f"Is there a thing {image} {turn}?",
         "answer": ["yes", "no"][turn % 2], "image": tiny_data().picture(image).name, **more}
        for image in range(images)
        for turn in range(each)
    ]  # fmt: skip


def text_of(html):
    """What a reader of the page reads."""
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", "", re.sub(r"<(style|title)>.*?</\1>", "", html, flags=re.DOTALL)))


def truths_of(rows):
    return {row["question"]: row["answer"] for row in rows}


def question_of(ask):
    return ask.messages[-1][1].rpartition("\n")[2]


# --- models of known behaviour ----------------------------------------------------------------------------------------


def test_of_a_model_that_always_says_yes_the_page_says_so(evaluate):
    evaluation = evaluate(lambda ask: saying("Yes."), yes_no_rows())
    text = text_of(eval_report_page(evaluation))
    assert evaluation.report["confusion"] == {"labels": ["no", "yes"], "counts": [[0, 40, 0], [0, 40, 0], [0, 0, 0]]}
    assert "80 of 80 answers are the same: yes. It is the true answer to 40 questions." in text
    assert "Always answering no would agree in 50% of 80 questions" in text
    assert text.count("do not show that the image improves the answers") == 3
    assert "better with the image" not in text
    assert evaluation.report["calibration"]["ece"] == pytest.approx(0.4)
    assert "Helped by the image" not in text


def test_a_model_that_reads_the_question_only_gains_nothing_with_right_answers(evaluate):
    rows = yes_no_rows()
    text = text_of(eval_report_page(evaluate(lambda ask: saying(truths_of(rows)[question_of(ask)]), rows)))
    assert text.count("do not show that the image improves the answers") == 3
    assert "accuracy (n 80)1.000" in text
    assert "answers are the same" not in text
    assert "Best answers" not in text, "none is better than another"


def test_a_model_that_sees_is_helped_by_the_image_and_one_that_sees_badly_is_misled(evaluate):
    rows = yes_no_rows()
    truths = truths_of(rows)
    seeing = text_of(
        eval_report_page(evaluate(lambda ask: saying(truths[question_of(ask)] if sees(ask) else "no"), rows))
    )
    assert "Against a grey image: the answers are better with the image (p below 0.001)" in seeing
    assert "Against the image of another row: the interval contains 0" in seeing
    assert "Helped by the image" in seeing
    misled = text_of(
        eval_report_page(evaluate(lambda ask: saying("no" if sees(ask) else truths[question_of(ask)]), rows))
    )
    assert "Against a grey image: the answers are worse with the image" in misled
    assert "Misled by the image" in misled


@pytest.mark.parametrize(
    ("interval", "ece", "said"),
    [
        ((0.01, 0.1), 0.1, "surer than it is right"),
        ((-0.1, -0.01), 0.1, "less sure than it is right"),
        ((-0.1, -0.01), 0.03, "not shown to be more than that of chance"),
        ((-0.1, -0.01), None, "not shown to be more than that of chance"),
        ((-0.1, 0.01), 0.1, "neither that the model is too sure nor that it is not"),
        ((None, None), 0.1, "so nothing is shown"),
    ],
)
def test_an_error_of_calibration_is_said_where_it_is_more_than_chance(evaluate, interval, ece, said):
    evaluation = evaluate(lambda ask: saying("yes"), yes_no_rows(1))
    own = evaluation.report["calibration"]
    own |= {"score": 0.9999, "ece": ece, "ece_by_chance": None if ece is None else 0.05}
    own["overconfidence"] |= dict(zip(("ci_low", "ci_high"), interval, strict=True))
    text = text_of(eval_report_page(evaluation))
    sayings = ["surer than", "less sure than", "not shown to be", "neither that the model", "so nothing is shown. The"]
    assert said in text
    assert sum(saying in text for saying in sayings) == 1
    assert "over 99%" in text


def test_the_values_behind_the_gains_are_on_the_page_and_the_terminal(evaluate, capsys):
    rows = [row | {"category": f"\x1b[31m {n % 25}"} for n, row in enumerate(yes_no_rows(25))]
    truths = truths_of(rows)
    evaluation = evaluate(lambda ask: saying(truths[question_of(ask)] if sees(ask) else "no"), rows)
    text = text_of(eval_report_page(evaluation))
    assert "with the image1.000with a grey image0.500" in text
    _show_report(Terminal(), evaluation.report | {"page": "report.html"})
    shown = capsys.readouterr().out
    assert "(blank 0.5000)" in shown
    assert shown.count("\\u001b[31m") == 20
    assert "\x1b" not in shown
    assert "5 more in report.json" in shown


def test_a_coin_shows_nothing(evaluate):
    coin = random.Random(5)
    evaluation = evaluate(lambda ask: saying(coin.choice(["yes", "no"]), 0.5), yes_no_rows())
    text = text_of(eval_report_page(evaluation))
    assert text.count("do not show that the image improves the answers") == 3
    assert "neither that the model is too sure nor that it is not" in text


def test_a_copy_with_ten_other_answers_differs_in_these(evaluate, tmp_path):
    rows = yes_no_rows()
    other = {row["question"] for row in rows[::8]}
    truths = truths_of(rows)
    evaluate(lambda ask: saying("no"), rows, out="a")
    evaluate(lambda ask: saying(truths[question_of(ask)] if question_of(ask) in other else "no"), rows, out="b")
    page = tmp_path / "compare.html"
    ended = run_mmv("compare", tmp_path / "a", tmp_path / "b", "--html", page, "--json")
    assert ended.code == 0, ended.err
    assert ended.json["page"] == str(page)
    html = page.read_text(encoding="utf-8")
    text = text_of(html)
    assert "10 questions changed the score" in text
    assert "accuracy: higher in B" in text
    assert "Higher score in B" in text
    assert "Lower score in B" not in text
    assert html.count("data:image/jpeg") == 10
    assert all(question in text for question in other)


# --- no more than the data allow --------------------------------------------------------------------------------------


def test_five_questions_about_one_image_show_nothing_and_the_page_says_so(evaluate):
    evaluation = evaluate(lambda ask: saying("yes" if sees(ask) else "no"), yes_no_rows(1, 5))
    text = text_of(eval_report_page(evaluation))
    assert "5 questions about 1 image, 0 skipped" in text
    assert "Against a grey image: no interval (a single image, or nothing varies), so nothing is shown" in text
    assert "No figure has an interval: the questions are about a single image" in text
    assert "5 answers: too few for groups by probability" in text
    assert "better with the image" not in text
    assert "expected calibration error" not in text
    assert evaluation.report["visual_gain"]["swapped"]["value"] is None
    assert "with the image than with a grey image or no image" in text


def test_rows_without_images_have_no_gain(evaluate):
    rows = [{"question": f"Is {n} even?", "answer": ["yes", "no"][n % 2]} for n in range(6)]
    evaluation = evaluate(lambda ask: saying("yes"), rows)
    html = eval_report_page(evaluation)
    assert "No question has an image that could be replaced" in text_of(html)
    assert "<img" not in html
    assert evaluation.thumbnails == {}


@pytest.mark.parametrize("task", ["loss", "caption", "choice"])
def test_each_task_has_the_figures_that_it_gives(evaluate, task):
    rows = [
        row | {"choices": ["yes", "no"], **({"caption": "a star"} if task == "caption" else {})}
        for row in yes_no_rows(6)
    ]

    def answer(ask):
        if ask.method == "answer":
            return saying("a red star")
        count = len(ask.candidates)
        return Reply("", tuple(-1.0 - number for number in range(count)), (1,) * count)

    evaluation = evaluate(answer, rows, task)
    text = text_of(eval_report_page(evaluation))
    assert (evaluation.report["calibration"] is None) == (task != "choice")
    assert ("have no probability of their own" in text) == (task != "choice")
    assert ("Length of the answers" in text) == (task != "loss")
    assert ("of the model." in text) == (task != "loss")
    assert "None" not in text
    assert "nan" not in text


def test_kinds_are_drawn_the_most_frequent_first_and_not_all_of_very_many(evaluate):
    rows = [
        row | {"category": f"kind {number % 25 if number > 9 else 3}"} for number, row in enumerate(yes_no_rows(30))
    ]
    text = text_of(eval_report_page(evaluate(lambda ask: saying("yes"), rows)))
    head, rest = text.index("By kind of question"), text.index("Which answers are taken for which")
    section = text[head:rest]
    assert section.index("kind 3") < section.index("kind 4")
    assert "5 kinds with fewer questions are in report.json" in section
    assert "by chance, one interval of 20" in section.lower()


# --- the file ---------------------------------------------------------------------------------------------------------


def test_no_text_of_rows_or_answers_becomes_part_of_the_page(evaluate, tmp_path):
    rows = [row | {"question": f"{row['question']} {HOSTILE}", "category": HOSTILE} for row in yes_no_rows(4)]
    rows += [{"question": f"Which {HOSTILE}"}]
    evaluation = evaluate(lambda ask: saying(f"yes {HOSTILE}"), rows)
    evaluate(lambda ask: saying(f"no {HOSTILE}"), rows, out="other")
    page = tmp_path / "compare.html"
    assert run_mmv("compare", tmp_path / "out", tmp_path / "other", "--html", page).code == 0
    for html in (eval_report_page(evaluation), page.read_text(encoding="utf-8")):
        assert html.startswith(f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta http-equiv='
                               f'"Content-Security-Policy" content="{POLICY}">')  # fmt: skip
        assert "<script" not in html
        assert "onerror" not in re.sub(r"&lt;img src=x onerror", "", html)
        assert "\x1b" not in html
        assert "\u202e" not in html
        assert set(re.findall(r'(?:src|href)="(\w+:)', html)) <= {"data:"}
        assert "http" not in html.replace("http-equiv", "")


def test_the_page_lies_beside_the_report_and_replaces_only_its_own_kind(evaluate, tmp_path):
    evaluation = evaluate(lambda ask: saying("yes"), yes_no_rows(4))
    assert write_eval_report(evaluation) == tmp_path / "out" / "report.html"
    assert write_eval_report(evaluation).stat().st_size < 200_000
    (tmp_path / "out" / "report.html").write_text("mine")
    with pytest.raises(UsageError, match="is not a page by mmv"):
        write_eval_report(evaluation)
    ended = run_mmv(
        "eval", "--model", sighted(), "--vision-model", EYE, "--tokenizer", ASSETS, "--task", "vqa",
        "--data", tmp_path / "rows.jsonl", "--images", tiny_data().folder, "--out", tmp_path / "out",
    )  # fmt: skip
    assert (ended.code, "is not a page by mmv" in ended.error) == (2, True)
    assert "eval vqa" not in ended.err, "refused before anything is measured"


def test_the_page_is_the_same_in_any_order_of_the_rows(evaluate):
    rows = yes_no_rows(9, 5, category="a")
    draws = {row["question"]: random.Random(row["question"]).random() for row in rows}
    answers = {question: saying("yes" if draw > 0.5 else "no", draw) for question, draw in draws.items()}

    def measured(order, out):
        evaluation = evaluate(lambda ask: answers[question_of(ask)], order, out=out)
        names = ("predictions", "data")
        return {key: value for key, value in evaluation.report.items() if key not in names}, eval_report_page(
            evaluation
        ).replace(evaluation.report["predictions"], "")

    first, second = measured(rows, "a"), measured(random.Random(1).sample(rows, len(rows)), "b")
    assert json.dumps(first[0]) == json.dumps(second[0])
    assert first[1] == second[1]


@pytest.mark.long
@pytest.mark.parametrize("width", [360, 1400])
def test_the_page_fits_a_phone_and_a_desk(evaluate, width):
    rows = [row | {"category": "a very long kind of question " * 3} for row in yes_no_rows(60)]
    answers = {
        row["question"]: saying("W" * 200 if number % 9 == 0 else row["answer"]) for number, row in enumerate(rows)
    }
    path = write_eval_report(evaluate(lambda ask: answers[question_of(ask)], rows))
    for scheme in ("light", "dark"):
        with open_browser(viewport={"width": width, "height": 800}, color_scheme=scheme) as page:
            page.goto(path.as_uri())
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
            assert page.locator("article img").first.evaluate("image => image.naturalWidth") > 0
            assert page.errors == []


@pytest.mark.long
@pytest.mark.parametrize("width", [390, 1280])
def test_the_names_of_a_large_confusion_stay_in_sight(evaluate, width):
    names = ["red", "a very small green triangle near the upper edge", "Donaudampfschifffahrtsgesellschaftskapitän",
             "قطة صغيرة جدا تحت الطاولة", *(f"label number {number}" for number in range(56))]  # fmt: skip
    rows = [
        {"question": f"What is it? {number}", "answer": names[number % 60], "image": tiny_data().picture(number).name}
        for number in range(180)
    ]
    path = write_eval_report(evaluate(lambda ask: saying(truths_of(rows)[question_of(ask)]), rows, "vqa"))
    with open_browser(viewport={"width": width, "height": 800}) as page:
        page.goto(path.as_uri())
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        scrolled, *heads = page.evaluate(
            """() => {
              const table = document.querySelector(".confusion"), frame = table.parentElement;
              frame.scrollLeft = 1e6;
              const inside = e => { const a = e.getBoundingClientRect(), b = frame.getBoundingClientRect();
                return a.left >= b.left - 1 && a.right <= b.right + 1 && e.scrollWidth <= e.clientWidth + 1 };
              return [frame.scrollWidth > frame.clientWidth, ...table.querySelectorAll("tr > :first-child")]
                .map((e, number) => number ? inside(e) : e);
            }"""
        )
        assert scrolled == (width == 390)
        assert heads == [True] * 12  # of the answers, ten truths and the others
