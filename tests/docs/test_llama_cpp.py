"""The pages on conversion: their commands run as they are written, in a folder that holds what the stages leave."""

import re
import shlex

import pytest

from minimind_v.core.export.prove import verify_gguf
from minimind_v.core.formats.gguf.file import QUANTIZATIONS
from tests.cli.harness import ROOT, run_mmv
from tests.docs.conftest import commands

PAGE = (ROOT / "docs" / "llama_cpp.md").read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def without_llama(monkeypatch):
    monkeypatch.setattr(verify_gguf, "_llama_is_installed", lambda: False)


def test_the_commands_run(workplace):
    lines = commands(PAGE)
    assert len(lines) == 4
    for line in lines:
        done = run_mmv(*shlex.split(line)[1:])
        assert done.code == 0, (line, done.err)
    for name in re.findall(r"minimind-v-gguf/(\S+\.gguf)", PAGE):
        assert (workplace / "minimind-v-gguf" / name).is_file()
    assert (workplace / "minimind-v-gguf" / "Modelfile").is_file()


def test_every_type_is_named():
    assert all(f"`{name}`" in PAGE for name in QUANTIZATIONS)


def test_the_server_is_started_as_the_interop_tests_start_it():
    tested = (ROOT / "tests" / "interop" / "test_llama.py").read_text(encoding="utf-8")
    (command,) = re.findall(r"python -m llama_cpp\.server (.*)", PAGE)
    assert all(f'"{option}"' in tested for option in re.findall(r"--\w+", command))
