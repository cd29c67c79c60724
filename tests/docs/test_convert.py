"""The page on conversion: its commands run as they are written, in a folder that holds what the stages leave."""

import re
import shlex

import pytest

from tests.cli.harness import ROOT, run_mmv
from tests.docs.conftest import check_outputs, commands
from tests.export.made import jpeg
from tests.export.test_publish import Hub

PAGE = (ROOT / "docs" / "convert.md").read_text(encoding="utf-8")


@pytest.fixture
def hub(workplace, monkeypatch):
    (workplace / "dog.jpg").write_bytes(jpeg(0))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with Hub() as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint)
        yield hub


@pytest.mark.long
def test_the_commands_and_the_program_run(hub, capsys):
    lines = commands(PAGE)
    assert [line.split()[1] for line in lines] == ["convert", "info", "chat", "convert", "upload"]
    results = [run_mmv(*shlex.split(line)[1:]) for line in lines]
    assert [ended.err for ended in results if ended.code] == []
    check_outputs(PAGE, results[0].out + results[0].err)
    assert "README.md" in hub.repos["me/minimind-v"]
    (program,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    exec(program, {})
    assert capsys.readouterr().out


def test_the_server_is_started_as_the_interop_tests_start_it():
    files = ("test_transformers_serve.py", "conftest.py")
    tested = "".join((ROOT / "tests" / "interop" / name).read_text(encoding="utf-8") for name in files)
    (command,) = re.findall(r"transformers serve \./minimind-v (.*)", PAGE)
    assert all(f'"{option}"' in tested for option in re.findall(r"--\w+", command))
