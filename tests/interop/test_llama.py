"""The real llama.cpp opens both files: words, pictures, answers, and its server asked by the official client."""

import base64
import re
import sys

import numpy as np
import pytest
import torch

from minimind_v.core.export.prove.ask_llama import LlamaCpp
from minimind_v.core.formats.gguf.write import write
from minimind_v.core.formats.load import load
from minimind_v.core.formats.request import ExportRequest
from minimind_v.core.generate.sampling import GREEDY
from minimind_v.core.generate.session import Session
from tests.cli.harness import run_mmv
from tests.formats.gguf.made import SIZES, TEXTS, loaded_model, random_texts
from tests.formats.gguf.test_3v import PUBLISHED as PUBLISHED_3V
from tests.formats.gguf.test_3v import loud_model
from tests.formats.gguf.test_written import IDS, PUBLISHED
from tests.formats.made3v import DENSE, MOE, tiny_3v
from tests.interop.conftest import serving

pytest.importorskip("llama_cpp", reason="llama.cpp is not installed; `make interop` compiles it")
pytest.importorskip("openai", reason="the openai client is not installed; `make interop` brings it")

pytestmark = pytest.mark.long


def answers(seeing):
    loaded = load(seeing.weights, seeing.sight[1], seeing.sight[3], "cpu")
    for question, _, picture in seeing.rows:
        yield "".join(Session(loaded.model, loaded.tokenizer, GREEDY).ask(question, [picture], 16))


def test_conversion_asks_llama_cpp_itself(exported):
    verified = exported[1]
    assert verified["opened by"].startswith("llama.cpp")
    assert float(re.match(r"([\d.]+)%", verified["logits"])[1]) < 1
    assert float(re.match(r"([\d.]+)%", verified["image features"])[1]) < 1


@pytest.mark.parametrize("config", [DENSE, MOE], ids=["dense", "moe"])
def test_conversion_of_minimind_3v_asks_llama_cpp_itself(config, tmp_path):
    parts = zip(("--model", "--vision-model", "--tokenizer"), tiny_3v(tmp_path / "parts", config), strict=True)
    named = [word for pair in parts for word in pair]
    done = run_mmv("convert", "--to", "gguf", *named, "--out", tmp_path / "export", "--json")
    assert done.code == 0, done.err
    verified = done.json["verified"]
    assert verified["opened by"].startswith("llama.cpp")
    assert verified["prompts"] == "equal in 1 of 1"
    assert float(re.match(r"([\d.]+)%", verified["logits"])[1]) < 1


@pytest.mark.parametrize("quantize", ["f32", "bf16", "q8_0", "q4_0"])
def test_every_type_is_opened(quantize, seeing, tmp_path):
    out = tmp_path / "out"
    done = run_mmv(
        "convert", "--to", "gguf", "--quantize", quantize, "--model", seeing.weights, *seeing.sight, "--out", out
    )
    assert done.code == 0, done.err


@pytest.mark.parametrize("name", [*SIZES, "3v", "3v, moe"])
def test_logits_with_a_cache_in_full_precision(name, tmp_path):
    import llama_cpp

    of_3v = {"3v": DENSE, "3v, moe": MOE}.get(name)
    loaded = loud_model(tmp_path / "parts", of_3v) if of_3v else loaded_model(name, loud=3.0)
    write(loaded, tmp_path, ExportRequest(tmp_path, quantize="f32"))
    llama = llama_cpp.Llama(
        str(tmp_path / "model.gguf"), n_ctx=256, verbose=False, logits_all=True, type_k=0, type_v=0, flash_attn=False
    )
    llama.eval(IDS)
    with torch.inference_mode():
        ours = loaded.model(torch.tensor([IDS])).logits[0].numpy()
    assert np.abs(ours - llama.scores[: len(IDS)]).max() < 1e-4 * max(1, np.abs(ours).max())
    llama.close()


@pytest.mark.parametrize("published", [PUBLISHED, PUBLISHED_3V], ids=["2025", "3v"])
def test_token_ids(published, tmp_path):
    if not published.is_dir():
        pytest.skip(f"the published tokenizer is not at {published}")
    config = type(SIZES["dense"])(hidden_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=6400)
    loaded = loaded_model(tokenizer=published, config=config)
    write(loaded, tmp_path, ExportRequest(tmp_path))
    llama = LlamaCpp(tmp_path)
    for text in (*TEXTS, *random_texts(3000)):
        if "\0" not in text:  # ends a string of llama.cpp's
            assert llama.ids(text) == loaded.tokenizer.encode(text).ids, text


def test_answers_are_those_of_the_source(seeing, exported):
    llama = LlamaCpp(exported[0])
    tokenizer = load(exported[0]).tokenizer
    same = 0
    for ours, (question, _, picture) in zip(answers(seeing), seeing.rows, strict=True):
        content = [{"type": "image"}, {"type": "text", "text": question}]
        llama.read(llama.prompt([{"role": "user", "content": content}]), [picture])
        same += tokenizer.decode(llama.say(16)[0]) == ours
    assert same >= len(seeing.rows) - 1


@pytest.fixture(scope="module")
def server(exported, tmp_path_factory):
    """llama.cpp's server in Python on a free port: an OpenAI client that asks it."""
    folder, log = exported[0], tmp_path_factory.mktemp("server") / "log"
    with serving(
        log, "/v1/models", sys.executable, "-m", "llama_cpp.server", "--model", folder / "model.gguf",
        "--clip_model_path", folder / "mmproj.gguf", "--chat_format", "mtmd", "--n_ctx", "2048", "--n_threads", "1",
        "--n_threads_batch", "1",
    ) as client:  # fmt: skip
        yield client


def asked(server, question, picture=None, **more):
    content = [{"type": "text", "text": question}]
    if picture:
        url = "data:image/jpeg;base64," + base64.b64encode(picture.read_bytes()).decode()
        content.insert(0, {"type": "image_url", "image_url": {"url": url}})
    return server.chat.completions.create(
        model="minimind-v", messages=[{"role": "user", "content": content}], temperature=0, max_tokens=16,
        extra_body={"repeat_penalty": 1.0}, **more,
    )  # fmt: skip


def test_a_server_answers_picture_questions(server, seeing):
    for ours, (question, _, picture) in zip(answers(seeing), seeing.rows[:6], strict=False):
        answer = asked(server, question, picture).choices[0]
        assert answer.message.content == ours
        assert answer.finish_reason == "stop"
        pieces = [piece.choices[0].delta.content or "" for piece in asked(server, question, picture, stream=True)]
        assert "".join(pieces) == ours


def test_a_server_answers_without_a_picture(server):
    assert isinstance(asked(server, "Who are you?").choices[0].message.content, str)
