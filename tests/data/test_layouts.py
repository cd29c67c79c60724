"""The layout of minimind-3v: think blocks, tags and user text as tokens, and the forms of training rows."""

from __future__ import annotations

import multiprocessing
import pickle
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from random import Random

import pytest

from minimind_v.core.data.layouts import CHAT_LAYOUTS, SYSTEM_PROMPTS
from minimind_v.core.data.prompt import PromptEncoder
from minimind_v.core.data.thinking import TAGS, split_answer
from minimind_v.core.data.tokenizer import Tokenizer
from minimind_v.core.errors import RowError, UsageError
from tests.tokenizers_made import IMAGE_PAD, thinking_tokenizer

PATCHES = 4
PLENTY = 10**6


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> PromptEncoder:
    return PromptEncoder(Tokenizer.load(thinking_tokenizer(tmp_path_factory.mktemp("tokenizer"))), PATCHES)


def row_of(question, answer, **fields):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer, **fields}]


def written(encoder, tokens) -> str:
    return encoder.tokenizer.backend.decode(tokens.input_ids, skip_special_tokens=False)


class Kept(Random):
    """Draws the form with empty think blocks and without a system prompt."""

    def random(self):
        return 0.99


def test_the_tokens_decide_the_layout_unless_one_is_named(tmp_path, demo_tokenizer):
    folder = thinking_tokenizer(tmp_path)
    assert Tokenizer.load(folder).layout == "chatml-think"
    assert Tokenizer.load(folder, "chatml").layout == "chatml"
    assert demo_tokenizer.layout == "chatml"


@pytest.mark.parametrize("tag", [*TAGS, IMAGE_PAD, "<|im_end|>"])
def test_a_users_tags_stay_text(encoder, tag):
    tokens = encoder.prompt([{"role": "user", "content": f"a {tag} b{tag}"}])
    plain = encoder.prompt([{"role": "user", "content": "a b"}])
    number = encoder.tokenizer.token_id(tag)
    assert tokens.input_ids.count(number) == plain.input_ids.count(number)
    assert f"a {tag} b{tag}" in written(encoder, tokens)
    assert not any(tokens.image_mask)


@pytest.mark.parametrize("copy", [lambda encoder: encoder, lambda encoder: pickle.loads(pickle.dumps(encoder))])
def test_tags_of_answers_system_messages_and_tools_are_tokens(encoder, copy):
    encoder = copy(encoder)
    call, think = (encoder.tokenizer.token_id(tag) for tag in ("<tool_call>", "<think>"))
    response = encoder.tokenizer.token_id("<tool_response>")
    talk = [
        {"role": "system", "content": "use <tool_call>"},
        *row_of("q", "<think>\nr\n</think>\n\n<tool_call>\n{}\n</tool_call>"),
        {"role": "tool", "content": "7"},
        {"role": "assistant", "content": "It is 7."},
    ]
    ids = encoder.row(talk, 0, PLENTY).input_ids
    assert (ids.count(call), ids.count(think), ids.count(response)) == (2, 1, 1)


def test_two_marks_that_touch_are_two_images(encoder):
    tokens = encoder.row(row_of("<image><image>which?", "both"), 2, PLENTY)
    assert tokens.images == 2
    assert sum(tokens.image_mask) == 2 * PATCHES
    run = [n for n, is_image in enumerate(tokens.image_mask) if is_image]
    assert run == list(range(run[0], run[0] + 2 * PATCHES))
    cut = tokens.cut(run[0] + PATCHES + 1, PATCHES)
    assert (cut.images, len(cut)) == (1, run[0] + PATCHES), "no cut goes through an image"


def test_everything_behind_the_header_of_an_answer_is_supervised(encoder):
    tokens = encoder.row(row_of("q", "<think>\nwhy\n</think>\n\nyes"), 0, PLENTY)
    supervised = [token for token, counts in zip(tokens.input_ids, tokens.loss_mask, strict=True) if counts]
    text = encoder.tokenizer.backend.decode(supervised, skip_special_tokens=False)
    assert text == "<think>\nwhy\n</think>\n\nyes<|im_end|>\n"


@pytest.mark.parametrize(
    "answer",
    [
        {"answer": "yes", "reasoning_content": "why"},
        {"answer": "\n\nyes", "reasoning_content": "\nwhy\n"},
        {"answer": "<think>\nwhy\n</think>\n\nyes"},
        {"answer": "<think>why</think>yes"},
    ],
)
def test_reasoning_is_kept_wherever_the_row_has_it(encoder, answer):
    text = written(encoder, encoder.row(row_of("q", **answer), 0, PLENTY))
    assert text.endswith("<|im_start|>assistant\n<think>\nwhy\n</think>\n\nyes<|im_end|>\n")


def test_the_plain_form_has_no_empty_block_and_no_system_prompt(encoder):
    text = written(encoder, encoder.row(row_of("q", "yes"), 0, PLENTY))
    assert text == "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"
    kept = written(encoder, encoder.row(row_of("q", "yes"), 0, PLENTY, Kept()))
    assert kept == text.replace("assistant\n", "assistant\n<think>\n\n</think>\n\n")


def test_training_rows_have_each_form_as_often_as_they_should(encoder):
    rows = [encoder.row(row_of("q", "yes"), 0, PLENTY, Random(f"5 {n}")) for n in range(2000)]
    texts = [written(encoder, row) for row in rows]
    prompts = [text.partition("system\n")[2].partition("<|im_end|>")[0] for text in texts]
    assert {prompt for prompt in prompts if prompt} == set(SYSTEM_PROMPTS)
    assert 0.17 < sum(map(bool, prompts)) / 2000 < 0.23
    assert 0.17 < sum("<think>" in text for text in texts) / 2000 < 0.23


def test_a_row_with_a_system_message_keeps_it(encoder):
    talk = [{"role": "system", "content": "mine"}, *row_of("q", "yes")]
    for seed in range(50):
        text = written(encoder, encoder.row(talk, 0, PLENTY, Random(seed)))
        assert text.startswith("<|im_start|>system\nmine<|im_end|>\n<|im_start|>user\n")


def test_all_empty_blocks_of_a_row_are_dropped_together(encoder):
    talk = [*row_of("q", "yes"), *row_of("q", "no")]
    counts = {written(encoder, encoder.row(talk, 0, PLENTY, Random(seed))).count("<think>") for seed in range(100)}
    assert counts == {0, 2}


@pytest.mark.parametrize("spare", [0, 3, 12, 40])
@pytest.mark.parametrize("turns", [1, 2])
def test_a_draw_never_cuts_a_row(encoder, turns, spare):
    talk = row_of("q", "yes") * turns
    plain = encoder.row(talk, 0, PLENTY)
    drawn = [encoder.row(talk, 0, len(plain) + spare, Random(seed)) for seed in range(100)]
    assert not any(row.answers_cut for row in drawn)
    assert all(len(row) <= len(plain) + spare for row in drawn)
    assert (len({len(row) for row in drawn}) > 1) == (spare > 3), "additions that fit are made"


def test_a_row_that_is_cut_is_cut_as_in_the_plain_form(encoder):
    talk = [*row_of("q", "yes"), *row_of("why? " * 9, "so " * 9)]
    whole = encoder.row(talk, 0, PLENTY)
    for length in range(len(encoder.row(row_of("q", "y"), 0, PLENTY)), len(whole)):
        plain = encoder.row(talk, 0, length)
        assert all(encoder.row(talk, 0, length, Random(seed)) == plain for seed in range(20)), length
    with pytest.raises(RowError, match="the prompt alone is longer"):
        encoder.row(talk, 0, 5, Kept())


@pytest.mark.parametrize(
    ("answer", "think"), [("yes", False), (" yes", False), ("<think>\nwhy\n</think>\n\nyes", True)]
)
@pytest.mark.parametrize("before", [[], row_of("p", "no"), row_of("p", "no", reasoning_content="for")])
def test_an_evaluated_answer_follows_the_prompt_of_a_chat(encoder, before, answer, think):
    talk = [*before, *row_of("q", answer)]
    tokens, prompt = encoder.row(talk, 0, PLENTY, evaluated=True), encoder.prompt(talk[:-1], think)
    assert tokens.input_ids[: len(prompt)] == prompt.input_ids
    assert all(tokens.loss_mask[len(prompt) :])
    assert not any(tokens.loss_mask[len(prompt) - 5 : len(prompt)])
    ends = [token for token, counts in zip(tokens.input_ids, tokens.loss_mask, strict=True) if counts]
    text = encoder.tokenizer.backend.decode(ends, skip_special_tokens=False)
    answers = {"": "", "no": "no<|im_end|>\n", "for": "for\n</think>\n\nno<|im_end|>\n"}
    first = before[1].get("reasoning_content", "no") if before else ""
    assert text == answers[first] + answer.removeprefix("<think>\n") + "<|im_end|>\n"


def test_chatml_has_one_form(demo_tokenizer):
    encoder = PromptEncoder(demo_tokenizer, PATCHES)
    row = row_of("q", "yes", reasoning_content="unused")
    assert not encoder.layout.varies
    assert all(encoder.row(row, 0, PLENTY, Random(n)) == encoder.row(row, 0, PLENTY) for n in range(20))


def test_a_prompt_opens_an_empty_block_or_reasoning(encoder, demo_tokenizer):
    question = [{"role": "user", "content": "q"}]
    assert written(encoder, encoder.prompt(question)).endswith("assistant\n<think>\n\n</think>\n\n")
    assert written(encoder, encoder.prompt(question, think=True)).endswith("assistant\n<think>\n")
    with pytest.raises(UsageError, match="the chat layout chatml has no think block"):
        PromptEncoder(demo_tokenizer, PATCHES).prompt(question, think=True)


def test_earlier_answers_of_a_prompt_have_their_blocks(encoder):
    text = written(encoder, encoder.prompt([*row_of("q", "yes"), {"role": "user", "content": "why?"}]))
    assert "assistant\n<think>\n\n</think>\n\nyes<|im_end|>" in text


@pytest.mark.parametrize(
    ("talk", "message"),
    [
        ([{"role": "tool", "content": "7"}], "the question has no answer"),
        ([{"role": "user", "content": "q"}, {"role": "tool", "content": "7"}], "do not alternate"),
        ([*row_of("q", None)], "message 2 has no text"),
        ([*row_of("q", 7, tool_calls=[{"name": "f"}])], "message 2 has no text"),
        (["text"], "message 1 has no text"),
        ([*row_of("q", "a"), {"role": "system", "content": "s"}], "do not alternate"),
        ([{"role": "system", "content": None, "tools": '[{"name": "f"}]'}, *row_of("q", "a")], None),
        ([*row_of("q", None, tool_calls='[{"name": "f", "arguments": {}}]')], None),
        ([*row_of("q", "a", tool_calls=["text", None])], "message 2: `tool_calls` is not a list of objects"),
        ([*row_of("q", "a", tool_calls="{")], "message 2: `tool_calls` is "),
        ([{"role": "system", "content": "s", "tools": '{"a": 1}'}, *row_of("q", "a")], "message 1: `tools` is not"),
        ([*row_of("q", "a", tool_calls=[{"function": 7}], reasoning_content=7)], None),
        ([*row_of("q", "a", tool_calls="null", tools=None)], None),
        (
            [*row_of("q", "a"), {"role": "tool"}, {"role": "tool", "content": "7"}, *row_of("q", "b")[1:]],
            "message 3 has no",
        ),
        ([*row_of("q", "a", tool_calls=[{"arguments": b"7"}])], "a tool is not JSON"),
        ([{"role": "system", "content": "s", "tools": [{"since": date(2026, 4, 20)}]}, *row_of("q", "a")], "not JSON"),
        ([*row_of("q", "a"), *[{"role": "tool", "content": "7" * 40}] * 20_000], "20,002 messages"),
    ],
)
def test_odd_messages_are_read_or_refused_by_their_number(encoder, talk, message):
    if message is None:
        assert encoder.row(talk, 0, PLENTY).answers == 1
        return
    with pytest.raises(RowError, match=message):
        encoder.row(talk, 0, PLENTY)


def test_responses_of_several_tools_are_one_message(encoder):
    responses = [{"role": "tool", "content": str(number)} for number in range(9_000)]
    text = written(encoder, encoder.prompt([*row_of("q", "a"), *responses]))
    assert text.count("<tool_response>") == 9_000
    assert text.count("<|im_start|>user") == 2


def test_the_layout_of_2025_has_no_tools(demo_tokenizer):
    talk = [*row_of("q", "a"), {"role": "tool", "content": "7"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(RowError, match="has the role 'tool', not one of system, user, assistant"):
        PromptEncoder(demo_tokenizer, PATCHES).row(talk, 0, PLENTY)


@pytest.mark.parametrize(
    ("talk", "place"),
    [
        (row_of("q", "", tool_calls=[{"name": "f", "arguments": {}}]), "message 2 has `tool_calls`"),
        (row_of("q", None, tool_calls='[{"name": "f"}]'), "message 2 has `tool_calls`"),
        ([{"role": "system", "content": None, "tools": [{"name": "f"}]}, *row_of("q", "a")], "message 1 has `tools`"),
    ],
)
def test_the_layout_of_2025_refuses_tools(demo_tokenizer, talk, place):
    encoder = PromptEncoder(demo_tokenizer, PATCHES)
    with pytest.raises(RowError, match=f"{place}, but this chat layout has no tools — use the tokenizer of"):
        encoder.row(talk, 0, PLENTY)
    empty = [{name: value and ("[]" if name.startswith("tool") else value) for name, value in m.items()} for m in talk]
    texts = [message | {"content": message["content"] or "x"} for message in empty]
    assert encoder.row(texts, 0, PLENTY).answers == 1


def test_other_processes_encode_the_same(encoder):
    talk = row_of("a <think> b", "<think>\nr\n</think>\n\nyes")
    expected = encoder.row(talk, 0, PLENTY)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(encoder.row, talk, 0, PLENTY).result() == expected


@pytest.mark.parametrize(
    ("text", "reasoning", "answer"),
    [
        ("why\n</think>\n\nyes", "why", "yes"),
        ("\nwhy</think>yes</think>", "why", "yes</think>"),
        ("why", "why", ""),
        ("", "", ""),
    ],
)
def test_a_generated_text_is_split_at_the_end_of_its_reasoning(text, reasoning, answer):
    assert split_answer(text) == (reasoning, answer)


def test_the_ten_system_prompts_are_half_chinese():
    assert len(set(SYSTEM_PROMPTS)) == 10
    assert sum(prompt.isascii() for prompt in SYSTEM_PROMPTS) == 5
    assert CHAT_LAYOUTS["chatml-think"].system_prompt is None
