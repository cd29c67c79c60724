"""`transformers serve` on an exported folder, asked about pictures by the official client."""

import base64
import sys
from pathlib import Path

import pytest

from tests.export.made import exported, jpeg, opened, picture
from tests.interop.conftest import serving

pytest.importorskip("openai", reason="the openai client is not installed; `make interop` brings it")
pytest.importorskip("fastapi", reason="transformers cannot serve here; `make interop` brings what it takes")

pytestmark = pytest.mark.long

QUESTION = "What colour is the star?"


@pytest.fixture(scope="module", params=["dense", "moe"])
def served(request, tmp_path_factory):
    """The kind of model, its folder, and a client of the server that serves it."""
    folder, log = exported(request.param), tmp_path_factory.mktemp("serve") / "log"
    program = Path(sys.executable).with_name("transformers")
    with serving(log, "/health", program, "serve", folder, "--host", "127.0.0.1", "--device", "cpu") as client:
        yield request.param, str(folder), client


def asked(served, content, **more):
    _, folder, client = served
    return client.chat.completions.create(
        model=folder, messages=[{"role": "user", "content": content}], max_tokens=12, temperature=0, **more
    )


def shown(*numbers):
    urls = [f"data:image/jpeg;base64,{base64.b64encode(jpeg(number)).decode()}" for number in numbers]
    return [*({"type": "image_url", "image_url": {"url": url}} for url in urls), {"type": "text", "text": QUESTION}]


def expected_answer(kind, *numbers):
    """What the folder says when it is opened in Python."""
    processor, model = opened(kind)
    content = [*({"type": "image", "image": picture(number)} for number in numbers), {"type": "text", "text": QUESTION}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True,
        return_tensors="pt",
    )  # fmt: skip
    answer = model.generate(**inputs, do_sample=False, max_new_tokens=12)[0, inputs["input_ids"].shape[1] :]
    return processor.decode(answer, skip_special_tokens=True)


@pytest.mark.parametrize("numbers", [(0,), (1, 2, 3), ()])
def test_a_picture_question_is_answered_as_in_python(served, numbers):
    assert asked(served, shown(*numbers)).choices[0].message.content == expected_answer(served[0], *numbers)


@pytest.mark.parametrize("numbers", [(0,), (1, 2, 3)])
def test_streamed(served, numbers):
    chunks = asked(served, shown(*numbers), stream=True)
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    expected = expected_answer(served[0], *numbers).rstrip(
        "\ufffd"
    )  # what is not whole when the answer ends is never streamed
    assert "".join(pieces).rstrip("\ufffd") == expected
    assert len([piece for piece in pieces if piece]) > 1 or len(expected) < 2


def test_plain_text(served):
    assert asked(served, QUESTION).choices[0].message.content == expected_answer(served[0])
