"""A task from rows to its report: what is asked, once and in any order, after a kill, and with which images."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from minimind_v.core.data.tokenizer import Tokenizer
from minimind_v.core.errors import DataError, RunError, UsageError
from minimind_v.core.evaluate import work
from minimind_v.core.evaluate.answering import Answering, Features
from minimind_v.core.evaluate.ask import Ask, Reply
from minimind_v.core.evaluate.benchmarks import open_benchmark
from minimind_v.core.evaluate.by_task import choose_task, evaluate_task, measuring_digest
from minimind_v.core.evaluate.measure import (
    BLANK_IMAGE,
    Plan,
    Replies,
    all_asks,
    groups_of,
    other_images,
    plan_questions,
    variants_of,
)
from minimind_v.core.evaluate.questions import Question
from minimind_v.core.evaluate.run import evaluate, held_out_dataset
from minimind_v.core.formats.load import load
from minimind_v.core.generate.sampling import GREEDY
from minimind_v.core.generate.session import Session
from minimind_v.core.rows.stores import open_rows
from tests.cli.harness import ASSETS, EYE, sighted, tiny_data, write_rows
from tests.tokenizers_made import thinking_tokenizer

ASKED = ["What colour is the star?", "有几个物体？", "Is there a red star?", "Is the cross big or small?"]


@pytest.fixture(scope="module")
def loaded():
    return load(sighted(), EYE, ASSETS, "cpu")


def records(count=6, each=2):
    """Questions about `count` pictures."""
    return [
        {
            "question_id": f"q{number}.{turn}", "question": ASKED[(number + turn) % len(ASKED)],
            "answer": ["red", "两", "no", "big"][(number + turn) % len(ASKED)],
            "image": tiny_data().picture(number).name, "category": "ab"[number % 2],
        }
        for number in range(count)
        for turn in range(each)
    ]  # fmt: skip


@pytest.fixture
def run(loaded, tmp_path):
    """`run(task, rows)` is the report and the predictions by question and variant."""

    def measure(task="vqa", rows=None, out="out", **how):
        chosen = choose_task(str(task))
        data = write_rows(tmp_path / "rows.jsonl", records() if rows is None else rows)
        store = open_benchmark(data, tiny_data().folder, names=chosen.names)
        report = evaluate_task(loaded, chosen, store, tmp_path / out, **how).report
        with open(report["predictions"], encoding="utf-8") as file:
            lines = [json.loads(line) for line in file]
        return report, {(line["id"], line["variant"]): line for line in lines}

    return measure


def test_the_report_has_its_keys_and_every_question_a_line_in_each_variant(run):
    report, lines = run("vqa")
    assert [report[key] for key in ("task", "rows", "pictures", "skipped")] == ["vqa", 12, 6, 0]
    assert set(report["metrics"][0]) == {"name", "value", "ci_low", "ci_high", "n", "clusters"}
    assert [(metric["name"], metric["n"], metric["clusters"]) for metric in report["metrics"]] == [
        ("vqa", 12, 6), ("exact", 12, 6),
    ]  # fmt: skip
    assert set(report["visual_gain"]) == {"blank", "swapped", "none"}
    assert all(set(gain) == {"value", "ci_low", "ci_high", "p"} for gain in report["visual_gain"].values())
    assert set(report["kinds"]) == {"a", "b"}
    assert len(lines) == 12 * 4
    assert report["variants"] == pytest.approx({
        variant: sum(line["score"] for (_, own), line in lines.items() if own == variant) / 12
        for variant in ("seen", "blank", "swapped", "none")
    })  # fmt: skip
    line = lines["q0.0", "seen"]
    assert {"id", "picture", "question", "answer", "truth", "score", "variant"} <= set(line)
    assert line["picture"] == tiny_data().picture(0).name
    assert report["metrics"][0]["value"] == pytest.approx(
        sum(line["score"] for (_, variant), line in lines.items() if variant == "seen") / 12
    )


def test_answers_are_those_of_a_conversation(run, loaded):
    """Guessed or decoded, each variant's answer is what the model says when it is asked so."""
    _, lines = run("vqa")
    session = Session(loaded.model, loaded.tokenizer, GREEDY)
    for record in records():
        for variant, images in (("seen", [tiny_data().folder / record["image"]]), ("none", [])):
            session.restart()
            answer = "".join(session.ask(record["question"], [str(path) for path in images], 16))
            assert lines[record["question_id"], variant]["answer"] == answer.strip()


def test_answers_in_the_layout_of_minimind_3v_are_those_of_a_conversation(loaded, tmp_path):
    """Its prompt ends with an empty think block. Guesses that are right, wrong and none give the same answers."""
    words = Tokenizer.load(thinking_tokenizer(tmp_path / "words"))
    session, expected = Session(loaded.model, words, GREEDY), []
    for question in ASKED:
        session.restart()
        expected.append("".join(session.ask(question, (), 16)).strip())
    asks = [Ask((("user", question),)) for question in ASKED]
    for guesses in ([], expected, ["red", expected[0][:1], *expected[1:]]):
        answering = Answering(loaded.model, words, Features(lambda digest: torch.zeros(0)), guesses, "auto")
        assert [reply.text for reply in answering.reply(asks)] == expected


def test_likelihoods_are_those_of_one_row_alone(loaded):
    """The log-probability of each token of a choice and its end, in a plain pass over prompt and choice."""
    answering = Answering(loaded.model, loaded.tokenizer, Features(lambda digest: torch.zeros(0)), [], "float32")
    choices = ("red", "a blue circle", "两")
    whole, letters = answering.reply([
        Ask((("user", ASKED[0]),), "likelihood", choices), Ask((("user", ASKED[0]),), "first", ("A", "B")),
    ])  # fmt: skip
    prompt = answering.prompts.prompt([{"role": "user", "content": ASKED[0]}]).input_ids
    for choice, logprob, count in zip(choices, whole.logprobs, whole.tokens, strict=True):
        ids = [*loaded.tokenizer.encode(choice).ids, loaded.tokenizer.eos_id]
        with torch.inference_mode():
            table = loaded.model(torch.tensor([[*prompt, *ids]])).logits[0].log_softmax(dim=-1)
        expected = sum(float(table[len(prompt) - 1 + n, id]) for n, id in enumerate(ids))
        assert (logprob, count) == (pytest.approx(expected, rel=1e-4), len(ids))
    first = [float(table[len(prompt) - 1, loaded.tokenizer.encode(letter).ids[0]]) for letter in "AB"]
    assert letters.logprobs == pytest.approx(first, rel=1e-4)


def test_the_order_of_the_rows_changes_no_digit(run):
    rows = records()
    first, lines = run("loss", rows)
    random.Random(3).shuffle(rows)
    second, shuffled = run("loss", rows, out="other")
    assert second["metrics"] == first["metrics"]
    assert second["visual_gain"] == first["visual_gain"]
    assert {key: line["score"] for key, line in shuffled.items()} == {key: line["score"] for key, line in lines.items()}


def test_an_interrupted_evaluation_is_resumed_and_ends_the_same(run, tmp_path, monkeypatch):
    monkeypatch.setattr("minimind_v.core.evaluate.measure.GROUP", 8)
    computed, reply = [], Answering.reply

    def counted(self, asks):
        computed.append(len(asks))
        return reply(self, asks)

    monkeypatch.setattr(Answering, "reply", counted)
    whole, _ = run("loss", out="whole")
    groups = len(computed)
    text = Path(whole["predictions"]).read_text(encoding="utf-8")
    computed.clear()

    def killed(self, asks):
        if len(computed) == 2:
            raise KeyboardInterrupt
        return counted(self, asks)

    with monkeypatch.context() as patch:
        patch.setattr(Answering, "reply", killed)
        with pytest.raises(KeyboardInterrupt):
            run("loss")
    left = tmp_path / "out" / ".replies.jsonl"
    with left.open("a") as file:
        file.write('{"group": "cut')  # by the kill
    resumed, _ = run("loss")
    assert Path(resumed["predictions"]).read_text(encoding="utf-8") == text
    assert resumed["metrics"] == whole["metrics"]
    assert len(computed) == groups, "none is computed twice"
    assert groups > 3
    assert not left.exists()


def test_each_image_is_encoded_once_for_all_questions_and_variants(run, monkeypatch):
    encoded = []
    features = work.Features

    def counted(encode):
        return features(lambda digest: encoded.append(digest) or encode(digest))

    monkeypatch.setattr(work, "Features", counted)
    run("vqa")
    assert len(encoded) == len(set(encoded)) == 6 + 1, "six pictures and the blank one"


def test_features_that_are_dropped_are_encoded_again():
    encoded = []
    features = Features(lambda digest: encoded.append(digest) or torch.zeros(10), limit=100)
    for digest in "ababcab":
        features(digest)
    assert encoded == ["a", "b", "c", "a", "b"]


def test_a_swapped_image_is_that_of_another_row_and_blank_and_none_are_asked_once(loaded, tmp_path):
    chosen = choose_task("vqa")
    rows = [{**record, "question": ASKED[0]} for record in records(5)]
    data = write_rows(tmp_path / "rows.jsonl", [*rows, {"question": "Text?", "answer": "no"}])
    plan = plan_questions(
        open_benchmark(data, tiny_data().folder), chosen.task, None, lambda question: None, lambda *_: None
    )
    asked = all_asks(plan, chosen.task)
    images = {(entry.question.id, entry.variant): entry.asks[0].images for entry in asked}
    for record in rows:
        own, other = images[record["question_id"], "seen"], images[record["question_id"], "swapped"]
        assert own != other
        assert other[0] in plan.sources
        assert images[record["question_id"], "blank"] == (BLANK_IMAGE,)
        assert images[record["question_id"], "none"] == ()
    assert [variant for (name, variant) in images if name == "6" or name == "11"] == ["seen"]
    unique = {ask for group in groups_of(asked) for ask in group}
    assert len(unique) == 5 + 1 + 1 + 1, "five pictures, blank, none, and the text alone"


def test_equal_ids_get_a_number_that_no_other_question_has(tmp_path):
    rows = [{"question_id": name, "question": "Q?", "answer": "no"} for name in ("q", "q", "q#2", "q")]
    store = open_benchmark(write_rows(tmp_path / "rows.jsonl", rows), tiny_data().folder)
    plan = plan_questions(store, choose_task("vqa").task, None, lambda question: None, lambda *_: None)
    assert [question.id for question in plan.questions] == ["q", "q#3", "q#2", "q#4"]


def test_a_limit_takes_a_share_of_each_kind_whatever_the_order(run):
    rows = records(8, 3)
    report, lines = run("loss", rows, limit=6)
    assert report["rows"] == 6
    assert {kind["n"] for kind in report["kinds"].values()} == {3}
    _, again = run("loss", rows[::-1], limit=6, out="other")
    assert set(again) == set(lines)
    assert run("loss", rows, limit=99, out="all")[0]["rows"] == 24


def test_images_are_told_apart_by_their_content_and_named_by_their_file(run):
    """A copy under another name is the same image; two images in folders of their own may have one name."""
    folder = tiny_data().folder
    rows = []
    for number in (0, 1):
        (folder / f"test/{number}").mkdir(parents=True, exist_ok=True)
        (folder / f"test/{number}/image.png").write_bytes(tiny_data().picture(number).read_bytes())
        rows.append({"pid": str(number), "split": "test", "question": ASKED[0], "answer": "red", "image": "image.png"})
    (folder / "copy.jpg").write_bytes(tiny_data().picture(2).read_bytes())
    rows += [
        {"question": ASKED[0], "answer": "red", "image": name} for name in ("copy.jpg", tiny_data().picture(2).name)
    ]
    report, lines = run("loss", rows)
    assert (report["pictures"], report["metrics"][0]["clusters"]) == (3, 3)
    names = [line["picture"] for (_, variant), line in lines.items() if variant == "seen"]
    assert len(set(names[:2])) == 2
    assert all(name.startswith("image.png ") for name in names[:2])
    assert names[2:] == ["copy.jpg"] * 2


def test_what_cannot_be_measured_is_skipped_with_its_reason(run):
    (tiny_data().folder / "broken.jpg").write_bytes(tiny_data().picture(0).read_bytes()[:300])
    rows = [*records(2), {"question": "Which?", "image": tiny_data().picture(0).name}]
    rows += [records(1)[0] | {"image": name} for name in ("no.jpg", "broken.jpg")]
    report, _ = run("vqa", rows)
    assert (report["rows"], report["skipped"]) == (4, 3)
    assert report["skipped_reasons"] == {"missing field": 1, "image missing": 1, "image broken": 1}
    with pytest.raises(DataError, match=r"no question for the task choice; the first problem: .*no choices"):
        run("choice")


def test_a_users_task_is_a_yaml_file(run, tmp_path):
    file = tmp_path / "short.yaml"
    file.write_text("task: vqa\ninstruction: One word.\nmost_tokens: 3\nfields:\n  question: frage\n")
    rows = [{"frage": "What colour is the star?", "answer": "red", "image": tiny_data().picture(0).name}]
    report, lines = run(file, rows)
    assert report["task"] == "short"
    assert lines["1", "seen"]["question"] == "What colour is the star?"
    file.write_text("task: vqa\nmost_token: 3\n")
    with pytest.raises(UsageError, match="no setting 'most_token' \\(did you mean 'most_tokens'\\?\\)"):
        run(file, rows)
    file.write_text("most_tokens: 3\n")
    with pytest.raises(UsageError, match="no `task` — name one of loss, vqa"):
        run(file, rows)
    with pytest.raises(UsageError, match="no task 'vqua' \\(did you mean 'vqa'\\?\\)"):
        run("vqua")
    with pytest.raises(UsageError, match="`mmv download --task pope`, and measure with --task yesno"):
        run("pope")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("tusk: vqa\nmost_tokens: 3\n", "no `task`"),
        ("task: vqa\nfields:\n  quesion: frage\n", r"fields.quesion is no field that a task reads .*'question'"),
        ("task: vqa\nfields:\n  question: 3\n", "fields.question must name a field of the rows, not 3"),
        ("task: vqa\nfields: question\n", "no setting 'fields'"),
        ("task: vqa\nfields:\n  question: 'Q: {{q|upper}}'\n", "more than a field — write fields in braces only"),
        ("task: vqa\nletters: true\nmost_token: 3\n", "no setting 'letters'.*no setting 'most_token' .did you mean"),
        ("task: choice\nletters: 1\n", "letters must be of the type bool, not 1"),
    ],
)
def test_what_is_wrong_in_a_tasks_file_is_named_with_the_file(tmp_path, text, problem):
    file = tmp_path / "own.yaml"
    file.write_text(text)
    with pytest.raises(UsageError, match=problem) as error:
        choose_task(str(file))
    assert str(error.value).startswith(f"{file}: ")


def test_a_named_field_that_no_row_has_is_reported(run, tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text("task: vqa\nfields:\n  question: quest1on\n  hint: context\n")
    rows = [record | {"context": "Look."} if number else record for number, record in enumerate(records(2))]
    with pytest.raises(DataError, match=r"no row has the field `quest1on` .for question. .did you mean 'question'"):
        run(file, rows)
    file.write_text("task: vqa\nfields:\n  question: '{{category}}: {{question}}'\n  hint: context\n")
    _, lines = run(file, rows)
    assert lines["q0.0", "seen"]["question"] == f"a: {ASKED[0]}"
    assert lines["q0.1", "seen"]["question"] == f"Look.\na: {ASKED[1]}"


def test_what_has_no_number_is_null(run):
    """One picture can be swapped with no other; and where no answer is yes, there is no precision."""
    report, _ = run("yesno", [records(1)[0] | {"answer": "no"}])
    assert report["visual_gain"]["swapped"] == {"value": None, "ci_low": None, "ci_high": None, "p": None}
    text = (Path(report["predictions"]).parent / "report.json").read_text(encoding="utf-8")
    assert "NaN" not in text
    assert next(metric for metric in report["metrics"] if metric["name"] == "recall")["value"] is None


@pytest.mark.parametrize("task", ["choice", "caption", "yesno"])
def test_each_task_measures(run, task):
    rows = [
        {"caption": "a red star", "image": record["image"]}
        if task == "caption"
        else record | {"answer": "no", "choices": ["no", "yes"]}
        for record in records(3, 1)
    ]  # fmt: skip
    report, lines = run(task, rows)
    assert len(lines) == 12
    assert all(metric["n"] in (0, 3) for metric in report["metrics"])


# --- models of known behaviour ----------------------------------------------------------------------------------------


@pytest.fixture
def behave(run, monkeypatch):
    """`behave(answer)` is the report on a model that answers an ask by this function."""

    def measure(answer, rows, task="yesno"):
        monkeypatch.setattr(Answering, "reply", lambda self, asks: [Reply(answer(ask)) for ask in asks])
        return run(task, rows)[0]

    return measure


def yes_no_rows(count=40):
    """Of each picture a question whose answer is yes, and one whose answer is no."""
    rng = random.Random(1)
    return [
        {"question_id": f"{number}{truth}", "question": f"Is there a thing {rng.random()}?", "answer": truth,
         "image": tiny_data().picture(number).name}
        for number in range(count)
        for truth in ("yes", "no")
    ]  # fmt: skip


def figures(report):
    return {metric["name"]: metric["value"] for metric in report["metrics"]}


def test_a_model_that_always_says_yes_gains_nothing_and_shows_it(behave):
    report = behave(lambda ask: "Yes.", yes_no_rows())
    assert figures(report) == pytest.approx(
        {"accuracy": 0.5, "precision": 0.5, "recall": 1, "f1": 2 / 3, "yes_share": 1}
    )
    for gain in report["visual_gain"].values():
        assert gain["value"] == 0
        assert gain["p"] == pytest.approx(1)
        assert gain["ci_low"] < 0 < gain["ci_high"]


def test_a_model_that_sees_gains_and_one_that_reads_the_question_only_does_not(behave):
    rows = yes_no_rows()
    truths = {row["question"]: row["answer"] for row in rows}
    seeing = behave(lambda ask: truths[_text(ask)] if ask.images and ask.images[0] != BLANK_IMAGE else "no", rows)
    assert seeing["visual_gain"]["blank"]["value"] == 0.5
    assert seeing["visual_gain"]["blank"]["ci_low"] > 0.3
    assert seeing["visual_gain"]["swapped"]["value"] == 0, "it does not care whose image it is"
    blind = behave(lambda ask: truths[_text(ask)], rows)
    assert figures(blind)["accuracy"] == 1
    assert all(abs(gain["value"]) < 1e-9 and gain["p"] > 0.9 for gain in blind["visual_gain"].values())


@pytest.mark.long
def test_coins_are_within_their_intervals_of_a_half(behave):
    """Each of ten coins has its own; 95 of 100 hold the truth."""
    held, gains = 0, 0
    for coin in range(10):
        coin_rng = random.Random(coin)
        report = behave(lambda ask, draw=coin_rng: draw.choice(["yes", "no"]), yes_no_rows())
        accuracy = report["metrics"][0]
        held += accuracy["ci_low"] < 0.5 < accuracy["ci_high"]
        gains += report["visual_gain"]["blank"]["p"] < 0.05
    assert held >= 8
    assert gains <= 2


def _text(ask: Ask) -> str:
    return ask.messages[-1][1].rpartition("\n")[2]


def test_questions_that_cannot_be_read_are_skipped_and_the_others_measured(run):
    good = records(1, 1)[0]
    odd = [
        good | {"question_id": "\ud800", "question": "half \ud800"},
        good | {"question_id": "half an answer", "answer": "\ud800"},
        good | {"question_id": "long", "answer": "red " * 20000},
    ]
    for task, rows in (("loss", 1), ("vqa", 2)):  # a true answer that nobody can give scores nothing
        report, _ = run(task, [*odd, good | {"question_id": "\ud801", "category": "\ud802"}], out=task)
        assert (report["rows"], report["skipped"]) == (rows, 4 - rows)


def test_the_truth_of_predictions_is_the_most_frequent_one_after_normalisation(run):
    _, lines = run("vqa", [records(1, 1)[0] | {"answer": ["blue", "blue", "Red", "red", "red."]}])
    assert lines["q0.0", "seen"]["truth"] == "Red"


def test_a_question_may_have_very_many_annotators(run):
    report, _ = run("vqa", [records(1, 1)[0] | {"answer": [f"answer {number}" for number in range(20000)] + ["red"]}])
    assert report["rows"] == 1


def test_a_folder_that_cannot_be_made_is_named(run, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"file/out: .*file is a file, not a folder"):
        run("vqa", records(1, 1), out="file/out")


@pytest.mark.parametrize("other", [{"task": "loss"}, {"limit": 1}, {"rows": records(3, 1), "limit": 2}])
def test_a_finished_evaluation_is_replaced_by_its_own_kind_only(run, tmp_path, other):
    report, lines = run("vqa", records(2, 1))
    assert run("vqa", records(2, 1)) == (report, lines)
    text = (tmp_path / "out" / "predictions.jsonl").read_bytes()
    with pytest.raises(UsageError, match=r"out holds another finished evaluation, of .* by vqa on 2 .* — name another"):
        run(**{"task": "vqa", "rows": records(2, 1)} | other)
    assert (tmp_path / "out" / "predictions.jsonl").read_bytes() == text


def test_data_of_the_same_name_in_another_folder_is_measured_under_another_name(tmp_path):
    task = choose_task("vqa").task
    digest = measuring_digest(task, tmp_path / "da" / "t.jsonl", None, None)
    others = [(tmp_path / "db" / "t.jsonl", None, None), (tmp_path / "da" / "t.jsonl", "val", None)]
    others.append((tmp_path / "da" / "t.jsonl", None, 5))
    assert digest not in {measuring_digest(task, *other) for other in others}


@pytest.mark.parametrize("damage", ["[]", '{"group": 1}', '{"group": "c", "replies": [1]}', '{"group": "cut', "\udcff"])
def test_replies_are_kept_up_to_a_damaged_line_and_never_rewritten(tmp_path, damage):
    path, groups = tmp_path / "replies", [[Ask((("user", text),))] for text in "ab"]
    replies = Replies(path, {"version": 1})
    assert len(list(replies.of(groups, lambda asked: ([Reply(ask.key)] for own in asked for ask in own)))) == 2
    replies.close()
    odd = tmp_path / "odd"
    odd.write_text(re.sub(r'"replies": .*', '"replies": []}', path.read_text()))
    again = Replies(odd, {"version": 1})
    assert [len(own) for own in again.of(groups[:1], lambda asked: iter([[Reply("computed")]]))] == [1]
    again.close()
    whole, node = path.read_bytes(), path.stat().st_ino
    path.write_bytes(whole + damage.encode(errors="surrogateescape") + b"\n")
    again = Replies(path, {"version": 1})
    again.close()
    assert (path.read_bytes(), path.stat().st_ino) == (whole, node)
    assert [own[0].text for own in again.of(groups, lambda asked: iter(()))] == [ask.key for [ask] in groups]


def test_a_reply_that_cannot_be_saved_is_an_error_with_its_place(tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("no full device")
    replies = Replies(tmp_path / "replies", {})
    replies._file = open("/dev/full", "wb")  # noqa: SIM115
    with pytest.raises(
        RunError, match=r"replies: a reply cannot be saved there .No space left on device. — free space"
    ):
        list(replies.of([[Ask((("user", "a"),))]], lambda asked: iter([[Reply("b")]])))
    replies.close()


def test_a_swapped_image_is_none_of_the_questions_own():
    plan = Plan(sources={name: (0, 0, name) for name in "abcde"})
    others = other_images(plan)
    for first in "abcde":
        question = Question("q", 0, "?", (), (), ("yes",))
        plan.images["q"] = (first, others[first])
        assert not set(variants_of(question, plan, others)["swapped"]) & set(plan.images["q"])
    plan.images["q"] = tuple("abcde")
    assert "swapped" not in variants_of(question, plan, others)


@pytest.mark.parametrize("words", ["chatml", "chatml-think"])
def test_the_task_and_the_evaluation_without_a_task_give_the_same_loss(loaded, tmp_path, words):
    """Both count the tokens that training supervises: the answer, its end and what follows the end."""
    if words == "chatml-think":
        loaded = replace(loaded, tokenizer=Tokenizer.load(thinking_tokenizer(tmp_path / "words")))
    rows = [
        {"image": record["image"], "conversations": [
            {"role": "user", "content": f"<image>\n{record['question']}"},
            {"role": "assistant", "content": record["answer"]},
        ]}
        for record in records()
    ]  # fmt: skip
    data = write_rows(tmp_path / "rows.jsonl", rows)
    store = open_benchmark(data, tiny_data().folder)
    by_task = evaluate_task(loaded, choose_task("loss"), store, tmp_path / "out", dtype="float32").report
    tokenizer = loaded.tokenizer
    dataset = held_out_dataset(loaded.model, tokenizer, open_rows(data, tiny_data().folder), 512)
    scores = evaluate(loaded.model, dataset, tokenizer.pad_id, tokenizer.eos_id, dtype="float32")
    assert by_task["metrics"][0]["value"] == pytest.approx(scores.loss, rel=1e-6)
