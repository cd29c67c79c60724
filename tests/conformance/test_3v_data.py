"""The rows, prompts and pixels of minimind-3v as the published code writes them, made again by this one.

The set is read from a folder (MMV_CONFORMANCE_3V, else `../shared/conformance-3v`), its tokenizer from `tokenizer-3v`
beside it. Nothing here knows a case: another set of the same form runs unchanged.
"""

from __future__ import annotations

import random
import sys
from itertools import groupby
from operator import itemgetter

import numpy as np
import pytest

from minimind_v.core.data.processor import Processor
from minimind_v.core.data.prompt import IMAGE_MARK, PromptEncoder, Tokens
from minimind_v.core.data.tokenizer import Tokenizer
from minimind_v.core.model.vision.spec import read_vision_spec
from tests.conformance.published import open_set

PUBLISHED = open_set("MMV_CONFORMANCE_3V", "conformance-3v", "tokenizer-3v")
FOLDER, TOKENIZER, SET, TENSORS = PUBLISHED.folder, PUBLISHED.tokenizer, PUBLISHED.record, PUBLISHED.tensors
CASES = SET["cases"]
GREY_LEVEL = 1 / 255 / 0.5  # in normalised pixels
CONTENTS = ("plain", "think")  # without empty think blocks, and with them


class Fixed(random.Random):
    """Draws the form that keeps empty think blocks and adds no system prompt."""

    def random(self) -> float:
        return 0.99


@pytest.fixture(scope="module")
def encoder() -> PromptEncoder:
    return PromptEncoder(Tokenizer.load(TOKENIZER), SET["tokens_per_image"])


def encoded(encoder: PromptEncoder, case: str, content: str) -> Tokens:
    record = CASES[case]
    draw = Fixed() if content == "think" else None
    return encoder.row(record["conversations"], len(record["images"]), sys.maxsize, draw)


def test_the_tokenizer_decides_the_layout(encoder):
    assert encoder.tokenizer.layout == "chatml-think"
    assert encoder.tokenizer.placeholder_id == SET["image_placeholder_id"]


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("case", CASES)
def test_ids_and_labels_are_identical(case, content, encoder):
    row = encoded(encoder, case, content)
    labels = [token if supervised else -100 for token, supervised in zip(row.input_ids, row.loss_mask, strict=True)]
    assert row.input_ids == TENSORS[f"{case}.{content}.input_ids"].tolist()
    assert labels == TENSORS[f"{case}.{content}.labels"].tolist()
    assert len(row) == CASES[case][f"length.{content}"]
    assert row.images == len(CASES[case]["images"])


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("case", CASES)
def test_the_text_of_a_row_is_the_published_rendering(case, content, encoder):
    row, text = encoded(encoder, case, content), ""
    for is_image, group in groupby(zip(row.image_mask, row.input_ids, strict=True), key=itemgetter(0)):
        ids = [token for _, token in group]
        if is_image:
            text += IMAGE_MARK * (len(ids) // SET["tokens_per_image"])
        else:
            text += encoder.tokenizer.backend.decode(ids, skip_special_tokens=False)
    assert text == CASES[case][f"prompt.{content}"]


@pytest.mark.parametrize("think", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_prompts_of_an_answer_are_identical(case, think, encoder):
    messages = CASES[case]["conversations"]
    *before, last = messages
    prompt = encoder.prompt(before if last["role"] == "assistant" else messages, think)
    assert prompt.input_ids == TENSORS[f"{case}.generation_ids{'_thinking' if think else ''}"].tolist()


def test_pixels_are_equal_within_a_grey_level(encoder):
    spec = read_vision_spec(FOLDER / "tower")
    processor = Processor(encoder.tokenizer, spec)
    mean, std = (np.array(values)[:, None, None] for values in (spec.mean, spec.std))
    for number, published in enumerate(TENSORS["pixel_values"].numpy()):
        pixels = processor.pixels(TENSORS[f"picture.{number}"].numpy())
        assert np.abs((pixels / 255 - mean) / std - published).max() <= GREY_LEVEL


# --- the published template -------------------------------------------------------------------------------------------

WORDS = (
    *(
        "Hello",
        "the image",
        "请看图",
        "谢谢。",
        "\n",
        "\n\n",
        "  two  spaces ",
        "\t",
        "1 + 1 = 2",
        "?",
        "def f():\n  x",
    ),
    *("naïve", "👍🏽", "@", "{'a': 1}", "<tools>", "a < b", "\n line", " "),
)
TAGGED = ("<think>", "</think>", "<tool_call>\n{}\n</tool_call>", "<think>\n\n</think>\n\n")
TOOL = {"type": "function", "function": {"name": "查", "parameters": {"q": "string"}}}


def text_of(rng: random.Random, vocabulary: tuple[str, ...] = WORDS) -> str:
    return "".join(rng.choice(vocabulary) for _ in range(rng.randint(0, 8)))


def answer(rng: random.Random) -> dict:
    """A message of the assistant, with tags and with every field that the template reads."""
    message = {"role": "assistant", "content": text_of(rng, WORDS + TAGGED)}
    if rng.random() < 0.3:
        message["content"] = f"<think>\n{text_of(rng)}\n</think>\n\n{text_of(rng)}"
    elif rng.random() < 0.3:
        message["reasoning_content"] = text_of(rng)
    if rng.random() < 0.3:
        calls = [{"name": "f", "arguments": rng.choice(('{"a": 1}', {"b": "值", "c": [1, 2]}))} for _ in range(2)]
        message["tool_calls"] = [calls[0], {"type": "function", "function": calls[1]}][: rng.randint(1, 2)]
    return message


def conversation(rng: random.Random) -> list[dict]:
    messages = [{"role": "system", "content": text_of(rng)}] if rng.random() < 0.4 else []
    if messages and rng.random() < 0.5:
        messages[0]["tools"] = [TOOL] * rng.randint(1, 2)
    for _ in range(rng.randint(1, 3)):
        messages += [{"role": "user", "content": text_of(rng)}, answer(rng)]
        if rng.random() < 0.3:
            messages += [{"role": "tool", "content": text_of(rng)} for _ in range(rng.randint(1, 2))] + [answer(rng)]
    return messages


def rendered(template, messages: list[dict], **options) -> str:
    tools = messages[0].get("tools") if messages[0]["role"] == "system" else None
    return template(messages, tools=tools, tokenize=False, **options)


@pytest.fixture(scope="module")
def template():
    transformers = pytest.importorskip("transformers")
    return transformers.PreTrainedTokenizerFast.from_pretrained(TOKENIZER).apply_chat_template


@pytest.mark.parametrize("seed", range(60))
def test_rows_and_prompts_are_those_of_the_published_template(seed, encoder, template):
    """The independent implementation: the template, rendered by jinja and encoded as a whole by `tokenizers`."""
    from tokenizers import Tokenizer as FastTokenizer

    whole = FastTokenizer.from_file(str(TOKENIZER / "tokenizer.json"))
    rng = random.Random(seed)
    messages = conversation(rng)
    text = rendered(template, messages)
    ids = whole.encode(text, add_special_tokens=False).ids
    assert encoder.row(messages, 0, sys.maxsize, Fixed()).input_ids == ids
    dropped = text.replace("<think>\n\n</think>\n\n", "")
    assert encoder.row(messages, 0, sys.maxsize).input_ids == whole.encode(dropped, add_special_tokens=False).ids
    for think in (False, True):
        text = rendered(template, messages[:-1], add_generation_prompt=True, open_thinking=think)
        assert encoder.prompt(messages[:-1], think).input_ids == whole.encode(text, add_special_tokens=False).ids


def test_the_published_form_chats_with_and_without_reasoning():
    from tests.cli.harness import run_mmv

    options = ("--model", FOLDER / "dense.pth", "--vision-model", FOLDER / "tower", "--tokenizer", TOKENIZER)
    rest = ("--greedy", "--max-new-tokens", 5, "--json")
    thinking = run_mmv("chat", *options, "--think", *rest, "Hello")
    assert thinking.code == 0, thinking.err
    assert set(thinking.json) - set(run_mmv("chat", *options, *rest, "Hello").json) == {"reasoning"}
