"""The page on evaluation: its commands run in both languages as they stand there, and its tables name what there is."""

import json
import re
import shlex
import shutil

import pytest

from minimind_v.core.evaluate.tasks import TASKS
from minimind_v.core.hub.sources import BENCHMARKS
from tests.cli.harness import ROOT, run_mmv, tiny_data, write_rows
from tests.docs.conftest import commands

ENGLISH, CHINESE = ((ROOT / "docs" / f"evaluate{name}.md").read_text(encoding="utf-8") for name in ("", "_zh"))
BOTH = pytest.mark.parametrize("page", [ENGLISH, CHINESE], ids=["English", "Chinese"])


def test_both_languages_give_the_same_commands():
    assert commands(ENGLISH) == commands(CHINESE)
    assert re.findall(r"```yaml\n(.*?)```", ENGLISH, re.DOTALL) == re.findall(r"```yaml\n(.*?)```", CHINESE, re.DOTALL)


@BOTH
def test_the_table_names_every_task_and_its_metrics(page):
    rows = re.findall(r"^\| `(\w+)` \|(.*)\|$", page, re.MULTILINE)
    assert [name for name, _ in rows] == list(TASKS)
    for name, cells in rows:
        metrics = {metric.name.removesuffix("_zh").removesuffix("_en") for metric in TASKS[name].metrics}
        assert metrics == set(re.findall(r"`(\w+)`", cells))


@BOTH
def test_the_page_names_every_benchmark(page):
    [paragraph] = (text for text in page.split("\n\n") if text.startswith("`mmv download --task pope`"))
    assert set(re.findall(r"`([a-z0-9-]+)`", paragraph)) - {"--dry-run"} == set(BENCHMARKS)


@pytest.mark.long
def test_the_commands_run(workplace):
    (workplace / "pictures").mkdir()
    rows = []
    for number in range(4):
        shutil.copy(tiny_data().picture(number), workplace / "pictures")
        image = tiny_data().picture(number).name
        rows.append({"question": "What colour is the star?", "answer": "red", "image": image})
    write_rows(workplace / "heldout.jsonl", rows)
    own, theirs = re.findall(r"```yaml\n(.*?)```", ENGLISH, re.DOTALL)
    (workplace / "short.yaml").write_text(own)
    (workplace / "scenes.yaml").write_text(theirs)
    asked = [{"role": "user", "content": "<image>\nWhat colour is the star?"}, {"role": "assistant", "content": "red"}]
    write_rows(workplace / "train.jsonl", [{"image": row["image"], "conversations": asked} for row in rows])
    *lines, short, scenes = commands(ENGLISH)
    results = [run_mmv(*shlex.split(line)[1:]) for line in (*lines, scenes)]
    assert [ended.err for ended in results if ended.code] == []
    assert "gain over blank" in results[0].out
    assert "4 questions; B - A:" in results[2].out
    assert "between seeds" in results[3].out
    assert (workplace / "first" / "report.html").is_file()
    assert (workplace / "better.html").is_file()
    assert "best weights: run/sft_vlm_128_best.pth, of step" in results[4].err
    assert "gain" in results[5].out
    assert "Does it look?" in (workplace / "run" / "sft_vlm_128" / "report.html").read_text()
    assert re.search(r"task +scenes", results[-1].out)
    assert json.loads((workplace / "first" / "report.json").read_text())["task"] == "vqa"
    write_rows(workplace / "heldout.jsonl", [
        {"prompt_text": row["question"], "label": row["answer"], "image": row["image"]} for row in rows
    ])  # fmt: skip
    ended = run_mmv(*shlex.split(short)[1:])
    assert ended.code == 0, ended.err
    assert "short" in ended.out
