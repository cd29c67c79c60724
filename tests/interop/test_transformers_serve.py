"""`transformers serve` on an exported folder, asked by the official client: about a picture, at once and streamed."""

import base64
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from minimind_v.core.generate.load import load_model
from minimind_v.core.generate.sampling import GREEDY
from minimind_v.core.generate.session import Session
from tests.cli.harness import ASSETS, EYE, here, place, sighted

openai = pytest.importorskip("openai", reason="needs the interop extra: make interop")
pytest.importorskip("fastapi", reason="needs the interop extra: make interop")

QUESTION = "What colour is the star?"
TOKENS = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("served") / "folder"
    done = here(
        "convert", "--to", "hf", "--model", sighted(), "--vision-model", EYE, "--tokenizer", ASSETS,
        "--dtype", "float32", "--out", out, "--no-verify",
    )  # fmt: skip
    assert done.code == 0, done.err
    return out


@pytest.fixture(scope="module")
def client(folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    command = [Path(sys.executable).with_name("transformers"), "serve", str(folder), "--host", "127.0.0.1"]
    with subprocess.Popen([*command, "--port", str(port)], env=os.environ | {"HF_HUB_OFFLINE": "1"}) as server:
        try:
            end = time.monotonic() + 120
            while not answers(f"{address}/health"):
                assert server.poll() is None, "the server has ended"
                assert time.monotonic() < end, "the server does not answer"
                time.sleep(0.3)
            yield openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=120)
        finally:
            server.terminate()


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:
            return reply.status == 200
    except OSError:
        return False


def ask(client, folder, picture: Path, **changes):
    data = base64.b64encode(picture.read_bytes()).decode()
    content = [
        {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{data}"}},
        {"type": "text", "text": QUESTION},
    ]
    return client.chat.completions.create(
        model=str(folder), messages=[{"role": "user", "content": content}], temperature=0, max_tokens=TOKENS, **changes
    )


def ours(picture: Path) -> str:
    loaded = load_model(sighted(), EYE, ASSETS, "cpu")
    session = Session(loaded.model.float(), loaded.tokenizer, GREEDY)
    return "".join(session.ask(QUESTION, [picture], TOKENS))


def test_a_question_about_a_picture(client, folder):
    picture = place().picture(1)
    expected = ours(picture).strip()
    assert expected
    assert ask(client, folder, picture).choices[0].message.content.strip() == expected
    pieces = [part.choices[0].delta.content or "" for part in ask(client, folder, picture, stream=True) if part.choices]
    assert "".join(pieces).strip() == expected
    assert len(pieces) > 1, "it comes piece by piece"
