"""The page on conversion: its commands run as they are written, in a folder that holds what the stages leave."""

import re
import shlex
import shutil

import pytest

from tests.cli import harness
from tests.cli.harness import ASSETS, EYE, ROOT, here
from tests.export.made import jpeg
from tests.export.test_publish import Hub

PAGE = (ROOT / "docs" / "convert.md").read_text(encoding="utf-8")


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    shutil.copytree(EYE, tmp_path / "model/vision_model/clip-vit-base-patch16")
    shutil.copy(ASSETS / "tokenizer.json", tmp_path / "model")
    (tmp_path / "out").mkdir()
    for ending in (".pth", ".json"):
        shutil.copy(harness.sighted().with_suffix(ending), tmp_path / "out" / f"sft_vlm_128{ending}")
    (tmp_path / "dog.jpg").write_bytes(jpeg(0))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with Hub() as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint)
        yield hub


def names(table):
    return [line.split("  ")[0] for line in table]


def test_the_commands_and_the_program_run(workplace, capsys):
    commands = [line for block in re.findall(r"```bash\n(.*?)```", PAGE, re.S) for line in block.splitlines()]
    assert [command.split()[1] for command in commands] == ["convert", "info", "chat", "convert", "upload"]
    told = [here(*shlex.split(command)[1:]) for command in commands]
    assert [ended.err for ended in told if ended.code] == []
    shown = re.search(r"```\n(opened by.*?)```", PAGE, re.DOTALL)[1].splitlines()
    assert names(shown) == names(told[0].out.splitlines()[: len(shown)])
    assert "README.md" in workplace.repos["me/minimind-v"]
    (program,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    exec(program, {})
    assert capsys.readouterr().out


def test_the_server_is_started_as_the_interop_tests_start_it():
    tested = (ROOT / "tests" / "interop" / "test_transformers_serve.py").read_text(encoding="utf-8")
    (command,) = re.findall(r"transformers serve \./minimind-v (.*)", PAGE)
    assert all(f'"{option}"' in tested for option in re.findall(r"--\w+", command))
