"""A model that sees, made once, and its two files for llama.cpp."""

import contextlib
import json
import socket
import subprocess
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import pytest

from minimind_v.core.rows.stores import open_rows
from tests.cli.harness import run_mmv


@dataclass
class Seeing:
    """The demo's trained model, and pictures with questions that it has not met."""

    weights: Path
    sight: tuple
    rows: list  # (question without its mark, true answer, file of the picture)


@pytest.fixture(scope="session")
def seeing(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "demo"
    assert run_mmv("demo", "--short", "--out", out).code == 0
    store = open_rows(out / "dataset/heldout_scenes_data.jsonl", out / "dataset/heldout_scenes_images.zip")
    rows = []
    for number in range(20):
        row = store.row(number)
        picture = out / f"{number}.jpg"
        picture.write_bytes(store.picture(number, 0, row.images[0]))
        asked, answered = (turn["content"] for turn in row.conversations[:2])
        rows.append((asked.removeprefix("<image>\n"), answered, picture))
    paths = ("--vision-model", out / "model/vision_model/clip-vit-base-patch16", "--tokenizer", out / "model")
    return Seeing(out / "out/sft_vlm_128.pth", paths, rows)


@pytest.fixture(scope="session")
def exported(seeing, tmp_path_factory):
    """The folder, and what its verification found."""
    folder = tmp_path_factory.mktemp("gguf") / "seeing"
    done = run_mmv("convert", "--to", "gguf", "--model", seeing.weights, *seeing.sight, "--out", folder, "--json")
    assert done.code == 0, done.err
    return folder, json.loads(done.out)["verified"]


@contextlib.contextmanager
def serving(log, answers_at, *command):
    """An OpenAI client of a server that is started with `command` and a free `--port`, and answers there when ready."""
    import openai

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with log.open("w") as file:
        process = subprocess.Popen([*map(str, command), "--port", str(port)], stdout=file, stderr=file)
    try:
        for _ in range(480):
            assert process.poll() is None, log.read_text()
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}{answers_at}", timeout=1).read()
                break
            except OSError:
                time.sleep(0.25)
        yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=120)
    finally:
        process.terminate()
        process.wait(20)
