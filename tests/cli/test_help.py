"""`mmv --help` answers at once, for every command."""

import subprocess
import sys

import pytest

from minimind_v import __version__
from minimind_v.__main__ import main
from minimind_v.core.errors import MissingInput
from tests.cli.harness import here

COMMANDS = ("train", "eval", "chat", "convert", "demo", "bench", "info", "doctor")


@pytest.mark.parametrize("args", [["--help"], ["--version"], *([command, "--help"] for command in COMMANDS)])
def test_help_needs_no_torch(args):
    program = (
        "import sys\nfrom minimind_v.cli.app import main\n"
        f"sys.argv = ['mmv', *{args!r}]\n"
        "try:\n    main()\nfinally:\n"
        "    heavy = {'torch', 'transformers', 'safetensors', 'numpy', 'PIL'} & set(sys.modules)\n"
        "    print(sorted(heavy), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "[]"
    assert done.stdout


def test_printing_a_configuration_needs_no_torch():
    program = (
        "import sys\nfrom minimind_v.cli.app import main\nsys.argv = ['mmv', 'train', 'sft', '--print-config']\n"
        "try:\n    main()\nfinally:\n    assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("stage: sft\n")


def test_ctrl_c_before_the_command_line_is_there(monkeypatch):
    class Interrupt:
        def find_spec(self, name, *_):
            if name == "minimind_v.cli.app":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "minimind_v.cli.app", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Interrupt(), *sys.meta_path])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 130


def test_the_version_is_one():
    assert here("--version").out == f"mmv {__version__}\n"


def test_without_a_command_the_commands_are_shown():
    ended = here()
    assert ended.code == 2
    assert all(command in ended.out + ended.err for command in COMMANDS)


def test_help_of_training_names_every_option_of_the_interface():
    shown = here("train", "--help").out
    for option in (
        *("--config", "--preset", "--data", "--images", "--vision-model", "--tokenizer", "--init", "--out", "--epochs"),
        *("--batch-size", "--accumulate", "--lr", "--max-length", "--freeze", "--max-steps", "--save-every"),
        *("--log-every", "--seed", "--dtype", "--device", "--workers", "--overwrite", "--set", "--print-config"),
    ):
        assert f"{option} " in shown


def test_an_error_with_debug_shows_where():
    assert here("info", "nowhere.pth").error == "no file nowhere.pth"
    with pytest.raises(MissingInput):
        here("--debug", "info", "nowhere.pth")
