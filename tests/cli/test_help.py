"""`mmv --help` answers at once, for every command."""

import sys

import pytest

from minimind_v import __version__
from minimind_v.__main__ import main
from minimind_v.core.errors import MissingInput
from tests.cli.harness import in_forks, run_mmv

COMMANDS = ("train", "eval", "chat", "convert", "demo", "bench", "info", "doctor")
HELP = ("--help", "--version", *(f"{command} --help" for command in COMMANDS))
CONFIGURATION = "train sft --print-config"
HEAVY = {"torch", "transformers", "safetensors", "numpy", "PIL"}


@pytest.fixture(scope="module")
def outcomes():
    return in_forks(*HELP, CONFIGURATION)


@pytest.mark.parametrize("line", HELP)
def test_help_needs_no_torch(outcomes, line):
    ended, modules = outcomes[line]
    assert ended.code == 0, ended.err
    assert modules & HEAVY == set()
    assert ended.out


def test_printing_a_configuration_needs_no_torch(outcomes):
    ended, modules = outcomes[CONFIGURATION]
    assert ended.code == 0, ended.err
    assert "torch" not in modules
    assert ended.out.startswith("stage: sft\n")


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
    assert run_mmv("--version").out == f"mmv {__version__}\n"


def test_without_a_command_the_commands_are_shown():
    ended = run_mmv()
    assert ended.code == 2
    assert all(command in ended.out + ended.err for command in COMMANDS)


def test_help_of_training_names_every_option_of_the_interface():
    shown = run_mmv("train", "--help").out
    for option in (
        *("--config", "--preset", "--data", "--images", "--vision-model", "--tokenizer", "--init", "--out", "--epochs"),
        *("--batch-size", "--accumulate", "--lr", "--max-length", "--freeze", "--max-steps", "--save-every"),
        *("--log-every", "--seed", "--dtype", "--device", "--workers", "--overwrite", "--set", "--print-config"),
    ):
        assert f"{option} " in shown


def test_an_error_with_debug_shows_where():
    assert run_mmv("info", "nowhere.pth").error == "no file nowhere.pth"
    with pytest.raises(MissingInput):
        run_mmv("--debug", "info", "nowhere.pth")
