"""Many questions at once get the answers that each would get alone."""

import pytest

from minimind_v.core.errors import MissingInput, RowError, UsageError
from minimind_v.core.generate.batch import Question, answer_each, generate_many
from minimind_v.core.generate.engine import Engine
from minimind_v.core.generate.sampling import GREEDY, Sampling
from minimind_v.core.generate.session import Session
from tests.cli.harness import sighted_model, tokenizer
from tests.generate.made import KINDS, make_model
from tests.generate.test_prompt_cache import picture

TEXT = "What colour is the star? 有几个物体？ Is the small circle left of the big one, or right of it?"


def questions(count=20):
    """Of one to three pictures, or none, and of all lengths."""
    return [
        Question(
            (TEXT[3 * number % 70 :] + " ") * (1 + number % 4),
            [picture(number + index) for index in range((number + 1) % 4)],
        )
        for number in range(count)
    ]


def alone(model, question, sampling=GREEDY, limit=10):
    return "".join(Session(model, tokenizer(), sampling).ask(question.text, question.images, limit))


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_greedy_answers_are_those_of_a_session(kind):
    model = make_model(seed=4, **kind)
    asked = questions()
    answers = generate_many(model, tokenizer(), asked, max_new_tokens=10, at_once=7)
    assert answers == [alone(model, question) for question in asked]
    assert len(set(answers)) > 10
    assert generate_many(model, tokenizer(), asked[::-1], max_new_tokens=10, at_once=20) == answers[::-1]


def test_answers_that_end_by_themselves():
    """A model that has learnt to speak: answers of many lengths."""
    model = sighted_model()
    asked = [
        Question(text) for text in ("What is big?", "有几个物体？", "星形是什么颜色的？", "Where is it?", "a", "red")
    ]
    answers = generate_many(model, tokenizer(), asked, max_new_tokens=60, at_once=4)
    assert answers == [alone(model, question, limit=60) for question in asked]
    assert len({len(answer) for answer in answers}) > 2


def test_a_seed_draws_for_each_question_as_for_a_session():
    model, asked = make_model(seed=4), questions(9)
    warm = Sampling(0.9, 0.9, seed=11)
    answers = generate_many(model, tokenizer(), asked, warm, 10, at_once=4)
    assert answers == [alone(model, question, Sampling(0.9, 0.9, seed=11 + k)) for k, question in enumerate(asked)]
    assert answers == generate_many(model, tokenizer(), asked, warm, 10, at_once=9)
    assert answers != generate_many(model, tokenizer(), asked, Sampling(0.9, 0.9), 10)


def test_nothing_asked_is_nothing_answered():
    assert generate_many(make_model(), tokenizer(), []) == []


def test_a_question_that_cannot_be_asked_is_reported(tmp_path):
    model, good = make_model(), questions(2)
    (tmp_path / "page.jpg").write_text("<!DOCTYPE html>")
    cases = {
        UsageError: (Question("Is <image> big?"), "1 <image> mark for 0 images"),
        MissingInput: (Question("?", [tmp_path / "none.jpg"]), "no image file at"),
        RowError: (Question("?", [tmp_path / "page.jpg"]), "an HTML page"),
    }
    for kind, (bad, message) in cases.items():
        with pytest.raises(kind, match=message):
            generate_many(model, tokenizer(), [*good, bad])
    with pytest.raises(UsageError, match=r"longer than 4096 tokens"):
        generate_many(model, tokenizer(), [*good, Question("star " * 5000)])


def test_prompts_are_opened_as_they_are_needed_and_answers_keep_their_order():
    """More prompts than could be open at once; some of them cannot be opened."""
    engine, opened, begun = Engine(make_model(seed=4), tokenizer(), most_rows=3), [], []

    def opener(number):
        def prompt():
            opened.append(number)
            if number % 7 == 2:
                raise RowError(f"page {number}")
            text = f"{TEXT[number % 40 :]}"
            return engine.prompt([{"role": "user", "content": text}], (), 1 + 20 * (number % 3 == 0))

        return prompt

    answers = []
    for answer in answer_each(engine, map(opener, range(60)), GREEDY, 12):
        answers.append(answer)
        begun.append(len(opened))
    assert opened == list(range(60))
    assert all(begun[k] - k <= 3 * 4 + 3 for k in range(60)), "few are open at a time"
    for number, answer in enumerate(answers):
        if number % 7 == 2:
            assert str(answer.error) == f"page {number}"
        else:
            assert answer.text == alone(engine.model, Question(TEXT[number % 40 :]), limit=12)
            assert 0 < answer.seconds_to_first_token <= answer.seconds
            assert 0 < answer.tokens <= 12
