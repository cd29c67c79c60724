"""A model that sees, made once, and its two files for llama.cpp."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from minimind_v.core.data.stores import open_rows
from tests.cli.harness import here


@dataclass
class Seeing:
    """The demo's trained model, and pictures with questions that it has not met."""

    weights: Path
    sight: tuple
    rows: list  # (question without its mark, true answer, file of the picture)


@pytest.fixture(scope="session")
def seeing(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "demo"
    assert here("demo", "--short", "--out", out).code == 0
    store = open_rows(out / "dataset/heldout_scenes_data.jsonl", out / "dataset/heldout_scenes_images.zip")
    rows = []
    for number in range(20):
        row = store.row(number)
        picture = out / f"{number}.jpg"
        picture.write_bytes(store.picture(number, 0, row.images[0]))
        asked, answered = (said["content"] for said in row.conversations[:2])
        rows.append((asked.removeprefix("<image>\n"), answered, picture))
    sight = ("--vision-model", out / "model/vision_model", "--tokenizer", out / "model")
    return Seeing(out / "out/sft_vlm_128.pth", sight, rows)


@pytest.fixture(scope="session")
def exported(seeing, tmp_path_factory):
    """The folder, and what its verification found."""
    folder = tmp_path_factory.mktemp("gguf") / "seeing"
    done = here("convert", "--to", "gguf", "--model", seeing.weights, *seeing.sight, "--out", folder, "--json")
    assert done.code == 0, done.err
    return folder, json.loads(done.out)["verified"]
