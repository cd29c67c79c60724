"""The page on rows: its files are written as they stand there, its commands run, and its rows are read."""

from __future__ import annotations

import json
import re
import shlex
import subprocess

import pytest

from minimind_v.core.rows.stores import STORES, open_rows
from tests.cli.harness import ROOT, run_mmv
from tests.docs.conftest import commands
from tests.export.made import jpeg

PAGE = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
FORMS = dict(re.findall(r"^\| ([^|`]+) \| `(\{.*\})` \|$", PAGE, re.MULTILINE))


@pytest.fixture
def files(workplace):
    for name, text in re.findall(r"```\w+ (\S+)\n(.*?)```", PAGE, re.DOTALL):
        (workplace / name).parent.mkdir(parents=True, exist_ok=True)
        (workplace / name).write_text(text, encoding="utf-8")
    for folder in ("pictures", "flowers/train", "flowers/test"):
        (workplace / folder).mkdir(exist_ok=True)
        for number, name in enumerate(("a.jpg", "b.jpg")):
            (workplace / folder / name).write_bytes(jpeg(number))
    return workplace


@pytest.mark.long
def test_the_commands_run(files):
    lines = [shlex.split(line) for line in commands(PAGE)]
    assert len(lines) == 10
    for program, *options in lines:
        if program == "mmv":
            ended = run_mmv(*options)
            assert ended.code == 0, (options, ended.err)
        else:
            subprocess.run([program, *options], check=True)
    assert "WebDataset" in run_mmv("info", "shard-000.tar").out
    assert run_mmv("data", "check", "captions.json", "--images", "pictures", "--json").json["problems"] == []
    assert len(open_rows(files / "circles.parquet")) == 2


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_the_table_is_read_with_its_pictures(form, files):
    row = json.loads(FORMS[form])
    (files / "rows.jsonl").write_text(json.dumps(row))
    rows = open_rows(files / "rows.jsonl", files / "pictures")
    first = rows.row(0)
    names = [name for name in ("a.jpg", "b.jpg") if name in FORMS[form]]
    assert first.shown == names
    assert rows.picture(0, 0, "a.jpg") == jpeg(0)
    assert first.conversations[-1]["role"] == "assistant"


@pytest.mark.parametrize("store", STORES, ids=lambda store: store.name)
def test_every_store_is_in_the_table_of_files(store):
    assert f"| {store.files} |" in PAGE


def test_the_table_of_forms_is_there():
    assert len(FORMS) == 7
