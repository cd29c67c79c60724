"""A conversation whose answers begin with reasoning."""

from __future__ import annotations

import pytest

from minimind_v.core.data.tokenizer import Tokenizer
from minimind_v.core.errors import UsageError
from minimind_v.core.generate.sampling import GREEDY, Sampler
from minimind_v.core.generate.session import Session
from tests.cli.harness import sighted_model, tokenizer
from tests.tokenizers_made import thinking_tokenizer


class Scripted:
    """A sampler that draws the tokens of a text."""

    def __init__(self, loaded_tokenizer: Tokenizer, text: str) -> None:
        self.ids = [*loaded_tokenizer.backend.encode(text, add_special_tokens=False).ids, loaded_tokenizer.eos_id]

    def __call__(self, logits, text_ids):
        return self.ids.pop(0)


@pytest.fixture(scope="module")
def loaded_tokenizer(tmp_path_factory) -> Tokenizer:
    return Tokenizer.load(thinking_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture
def session(loaded_tokenizer) -> Session:
    return Session(sighted_model(), loaded_tokenizer, GREEDY, think=True)


def test_later_turns_have_the_answer_without_its_reasoning(session, loaded_tokenizer):
    session.sampler = Scripted(loaded_tokenizer, "of red\n</think>\n\nA star")
    assert "".join(session.ask("What is it?")) == "of red\n</think>\n\nA star"
    talk = [
        {"role": "user", "content": "What is it?"},
        {"role": "assistant", "content": "A star"},
        {"role": "user", "content": "Is it big?"},
    ]
    prompt = session.prompts.prompt(talk, think=True).input_ids
    assert [id for turn in session._encode("Is it big?", session.turns) for id in turn.input_ids] == prompt


def test_a_second_question_is_answered_as_in_a_fresh_conversation(session, loaded_tokenizer):
    session.sampler = Scripted(loaded_tokenizer, "of red\n</think>\n\nA star")
    "".join(session.ask("What is it?"))
    fresh = Session(session.engine.model, loaded_tokenizer, GREEDY, think=True)
    talk = [
        {"role": "user", "content": "What is it?"},
        {"role": "assistant", "content": "A star"},
        {"role": "user", "content": "Is it big?"},
    ]
    fresh._encode = lambda question, before: fresh.prompts.turns(talk, think=True)
    session.sampler = Sampler(GREEDY)
    assert "".join(session.ask("Is it big?", max_new_tokens=8)) == "".join(fresh.ask("Is it big?", max_new_tokens=8))


def test_an_answer_that_ends_within_its_reasoning_leaves_an_empty_turn(session, loaded_tokenizer):
    session.sampler = Scripted(loaded_tokenizer, "of red and blue")
    answer = session.ask("What is it?")
    next(answer)
    answer.close()
    text = loaded_tokenizer.backend.decode(session.turns[-1].input_ids, skip_special_tokens=False)
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n<|im_end|>\n")


def test_a_mark_that_a_model_writes_stays_text(session, loaded_tokenizer):
    session.sampler = Scripted(loaded_tokenizer, "an <image>\n</think>\n\nA <image> tag, <|image_pad|>")
    "".join(session.ask("What is it?"))
    ids = session.turns[-1].input_ids
    text = loaded_tokenizer.backend.decode(ids, skip_special_tokens=False)
    assert text.endswith("assistant\n<think>\n\n</think>\n\nA <image> tag, <|image_pad|><|im_end|>\n")
    assert loaded_tokenizer.placeholder_id not in ids
    session.sampler = Sampler(GREEDY)
    "".join(session.ask("Is it big?", max_new_tokens=2))


def test_a_layout_without_reasoning_is_refused():
    with pytest.raises(UsageError, match="chatml has no think block: its model cannot think"):
        Session(sighted_model(), tokenizer(), GREEDY, think=True)
