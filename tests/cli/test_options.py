"""Options that every command has: how much it shows, variables of the environment, groups of the help, completion."""

from __future__ import annotations

import os
import subprocess

import pytest

from minimind_v.cli.options import ENVIRONMENT
from tests.cli.harness import ASSETS, EYE, MMV, run_mmv

COMMANDS = (
    "download", "train", "eval", "chat", "convert", "plan", "runs", "report", "info", "upload", "demo", "doctor",
    "bench", "data", "data check", "data stats", "data preview", "data convert", "data split",
)  # fmt: skip


@pytest.fixture
def settings(monkeypatch, tmp_path):
    """Prints a configuration in an empty folder, with these variables set."""
    monkeypatch.chdir(tmp_path)

    def printed(variables, *args):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        ended = run_mmv("train", "sft", *args, "--print-config")
        assert ended.code == 0, ended.err
        return dict(line.strip().split(": ", 1) for line in ended.out.splitlines() if ": " in line)

    return printed


# --- verbosity --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_the_same_switches_in_the_last_group_of_its_help(command):
    *_, last = run_mmv(*command.split(), "--help").out.split("Output and help:")
    assert all(f"{switch} " in last for switch in ("-v, --verbose", "-q, --quiet", "--debug", "-h, --help"))


def test_quiet_shows_results_and_errors_only(tiny_data, tmp_path):
    line = ("data", "convert", tiny_data.data("sft"), tmp_path / "a.jsonl", "--images", tiny_data.images("sft"))
    ended = run_mmv(*line, "--quiet", "--json")
    assert (ended.json["rows"], ended.err) == (40, "")
    assert run_mmv(*line[:3], tmp_path / "b.jsonl", *line[4:], "-q").err == ""
    refused = run_mmv(*line, "-q")
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert refused.error
    assert run_mmv("-q", *line, "--overwrite").err == ""
    assert run_mmv("data", "-q", *line[1:], "--overwrite").err == ""


def test_verbose_shows_more(tiny_data, tmp_path):
    line = (
        "data",
        "convert",
        tiny_data.data("sft"),
        tmp_path / "a.jsonl",
        "--images",
        tiny_data.images("sft"),
        "--overwrite",
    )
    plain, detailed = run_mmv(*line), run_mmv(*line, "--verbose")
    assert len(detailed.err.splitlines()) > len(plain.err.splitlines())
    assert detailed.err.splitlines()[-1].startswith("done in ")
    assert "give one of them" in run_mmv(*line, "-v", "-q").error


# --- environment ------------------------------------------------------------------------------------------------------


def test_variables_stand_for_options_and_are_named_as_the_source(settings):
    shown = settings({"MMV_OUT": "runs", "MMV_VISION_MODEL": str(EYE), "MMV_TOKENIZER": str(ASSETS)})
    assert shown["out"].split() == ["runs", "#", "MMV_OUT"]
    assert shown["vision_model"].split() == [str(EYE), "#", "MMV_VISION_MODEL"]
    assert shown["tokenizer"].split()[0] == str(ASSETS)


def test_an_empty_variable_counts_as_unset(settings):
    assert settings({"MMV_OUT": "", "MMV_DEVICE": ""})["out"].split() == ["out", "#", "recipe", "sft"]


def test_an_option_outweighs_a_file_and_a_file_outweighs_a_variable(settings, tmp_path):
    (tmp_path / "run.yaml").write_text("out: of_the_file\n")
    variables = {"MMV_OUT": "of_the_variable", "MMV_DEVICE": "cpu"}
    shown = settings(variables, "--config", "run.yaml")
    assert (shown["out"].split()[0], shown["device"].split()[0]) == ("of_the_file", "cpu")
    assert settings(variables, "--config", "run.yaml", "--out", "mine")["out"].split() == ["mine", "#", "--out"]


def test_a_variable_may_name_the_folder_that_a_download_filled(settings, tmp_path):
    for name in ("pretrain_i2t.parquet", "sft_i2t.parquet"):
        (tmp_path / "big" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "big" / name).touch()
    assert settings({"MMV_DATA": "big"})["file"].split() == ["big/sft_i2t.parquet", "#", "MMV_DATA"]


def test_weights_are_searched_in_the_given_folder_of_runs(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MMV_OUT", "elsewhere")
    assert "no trained weights in elsewhere" in run_mmv("chat", "hello").error
    assert "no folder elsewhere" in run_mmv("runs").error


def test_help_names_every_variable():
    shown = " ".join("".join(run_mmv(command, "--help").out for command in ("train", "eval")).split())
    assert all(f"env var: {variable}" in shown for variable in ENVIRONMENT.values())


# --- help -------------------------------------------------------------------------------------------------------------


def test_the_five_commands_of_the_pipeline_come_first():
    ended = run_mmv()
    first = (ended.out + ended.err).split("The pipeline:\n")[1].split("\n\n")[0]
    names = [line.split()[0] for line in first.splitlines() if line.startswith("  ") and line[2] != " "]
    assert names == ["download", "train", "eval", "chat", "convert"]


def test_help_of_a_command_is_grouped():
    shown = run_mmv("train", "--help").out
    groups = [line for line in shown.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert groups == ["Required:", "Common options:", "Advanced options:", "Output and help:"]


def test_the_old_name_of_plan_still_works_and_names_the_new_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    old, new = run_mmv("train", "plan", "sft"), run_mmv("plan", "sft")
    assert old.err == f"`mmv train plan` is now `mmv plan`\n{new.err}"
    assert (old.code, new.code) == (1, 1)


# --- completion -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        ("mmv tr", ["train"]),
        ("mmv train ", ["pretrain", "sft"]),
        ("mmv train sft --freeze pro", ["projector", "projector+last", "projector+ends"]),
        ("mmv plan sft --preset ", ["small", "base", "moe", "3v", "3v-moe", "demo", "demo-3v"]),
        ("mmv convert --to s", ["safetensors"]),
        ("mmv data check a.jsonl --stage p", ["pretrain"]),
    ],
)
def test_the_shell_completes_words(typed, completed):
    env = os.environ | {"_MMV_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(typed.count(" "))}
    done = subprocess.run([MMV], env=env, capture_output=True, text=True, check=False)
    assert done.stdout.split() == completed, done.stderr
