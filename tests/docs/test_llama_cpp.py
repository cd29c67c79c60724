"""The pages on conversion: their commands run as they are written, in a folder that holds what the stages leave."""

import re
import shlex
import shutil

import pytest

from minimind_v.core.export import verify_gguf
from minimind_v.core.gguf.store import QUANTIZATIONS
from tests.cli import harness
from tests.cli.harness import ASSETS, EYE, ROOT, here

PAGE = (ROOT / "docs" / "llama_cpp.md").read_text(encoding="utf-8")


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    shutil.copytree(EYE, tmp_path / "model/vision_model/clip-vit-base-patch16")
    shutil.copy(ASSETS / "tokenizer.json", tmp_path / "model")
    (tmp_path / "out").mkdir()
    for ending in (".pth", ".json"):
        shutil.copy(harness.sighted().with_suffix(ending), tmp_path / "out" / f"sft_vlm_128{ending}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(verify_gguf, "_llama_is_installed", lambda: False)
    return tmp_path


def test_the_commands_run(workplace):
    commands = [line for block in re.findall(r"```bash\n(.*?)```", PAGE, re.S) for line in block.splitlines()]
    assert len(commands) == 4
    for command in commands:
        done = here(*shlex.split(command)[1:])
        assert done.code == 0, (command, done.err)
    for name in re.findall(r"minimind-v-gguf/(\S+\.gguf)", PAGE):
        assert (workplace / "minimind-v-gguf" / name).is_file()
    assert (workplace / "minimind-v-gguf" / "Modelfile").is_file()


def test_every_type_is_named():
    assert all(f"`{name}`" in PAGE for name in QUANTIZATIONS)


def test_the_server_is_started_as_the_interop_tests_start_it():
    tested = (ROOT / "tests" / "interop" / "test_llama.py").read_text(encoding="utf-8")
    (command,) = re.findall(r"python -m llama_cpp\.server (.*)", PAGE)
    assert all(f'"{option}"' in tested for option in re.findall(r"--\w+", command))
