"""The demo end to end, by the installed command. Shorter than `make demo`, and held to a bar of its own."""

import errno
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from minimind_v.core.config.presets import PRESETS
from minimind_v.core.demo import run
from minimind_v.core.demo.generations import DEMO_GENERATIONS
from minimind_v.core.errors import RunError, UsageError
from minimind_v.core.formats.checkpoint import read_checkpoint
from minimind_v.core.monitor.metrics import Listener
from tests.cli.harness import Running, installed, run_mmv

MMV = Path(sys.executable).with_name("mmv")


def smaller():
    """Fewer rows than the whole demo: enough for minimind-3v to reach the same bars."""
    run.SHORT = run.Size(pretrain_rows=2000, sft_rows=3000, test_rows=300)


# What makes each demo short, and its bars: scenes, pairs never seen. The whole demo of 2025 is `make demo`.
PREPARE = {"2025": None, "3v": smaller}
BARS = {"2025": (0.75, 0.6), "3v": (0.9, 0.75)}
BYTES = {"2025": 60e6, "3v": 70e6}  # of the folder


def trained_demo(out, generation):
    """The folder of a demo, its summary, and what it printed."""
    command = ["demo", "--generation", generation, "--seed", "11", "--out", out, "--json", "--short"]
    running = Running(out.with_name("streams"), *command, prepare=PREPARE[generation])
    assert running.process.wait(900) == 0, running.err
    return out, json.loads(running.out), running.err


@pytest.fixture(scope="module", params=DEMO_GENERATIONS)
def demo(tmp_path_factory, request):
    return trained_demo(tmp_path_factory.mktemp("demo") / request.param, request.param)


@pytest.mark.long
def test_the_model_uses_the_image(demo):
    out, summary, _ = demo
    scenes, pairs = BARS[out.name]
    assert summary["accuracy_heldout_scenes"] >= scenes
    assert summary["accuracy_heldout_pairs"] >= pairs
    assert summary["accuracy_blank"] <= 0.45
    assert summary["accuracy_before"] <= 0.45


@pytest.mark.long
def test_the_model_has_the_form_of_its_generation(demo):
    form = DEMO_GENERATIONS[demo[0].name]
    checkpoint = read_checkpoint(Path(demo[1]["example"]["model"]))
    assert (checkpoint.config, checkpoint.projector) == (PRESETS[form.preset], form.generation.projector)
    assert (demo[0] / form.generation.vision_model / "config.json").is_file()


@pytest.mark.long
def test_summary_is_written_and_complete(demo):
    out, summary, _ = demo
    assert json.loads((out / "summary.json").read_text()) == summary
    assert summary["seed"] == 11
    assert {"assets", "before", "pretrain", "sft", "eval", "chat", "convert"} <= set(summary["seconds"])


@pytest.mark.long
def test_report_is_one_file_with_curves_and_pictures(demo):
    page = (demo[0] / "report.html").read_text()
    assert page.count("<svg") == 4
    assert "When does it begin to look?" in page
    assert "the model uses its images: <b>step" in page
    assert all(f"<dt>{word}</dt>" in page for word in ("truth", "after", "before", "blank"))  # the legend
    assert "understands nothing else" in page
    assert page.count("data:image/jpeg;base64,") == 24
    assert 'src="http' not in page
    assert 'href="http' not in page


@pytest.mark.long
def test_each_stage_names_the_command_that_it_stands_for(demo):
    for command in ("mmv train pretrain", "mmv train sft", "mmv eval", "mmv chat", "mmv convert"):
        assert f"$ {command}" in demo[2]


@pytest.mark.long
def test_printed_commands_are_real(demo):
    """The commands that the demo prints do what the demo did: here the evaluations, over the same rows."""
    _, summary, talk = demo
    lines = [line.strip().removeprefix("$ mmv ") for line in talk.splitlines() if "$ mmv eval --model" in line]
    scores = []
    for line in lines:
        scores.append(installed(*shlex.split(line), "--json").json)
    scenes, pairs = scores
    assert scenes["accuracy"] == pytest.approx(summary["accuracy_heldout_scenes"])
    assert scenes["accuracy_blind"] == pytest.approx(summary["accuracy_blank"])
    assert pairs["accuracy"] == pytest.approx(summary["accuracy_heldout_pairs"])


@pytest.fixture(scope="module")
def shown(demo):
    """What the demo says at its end where nobody asks for JSON, over a summary that is there already."""
    out, summary, _ = demo
    with mock.patch("minimind_v.core.demo.run.Demo.run", return_value=summary):
        ended = run_mmv("demo", "--generation", out.name, "--out", out)
    assert ended.code == 0
    return dict(re.split(r"  +", line, maxsplit=1) for line in ended.out.splitlines()), ended.err


@pytest.mark.long
def test_the_last_lines_can_be_pasted(demo, shown):
    line = shown[0]["ask the model"]
    path = {"PATH": f"{MMV.parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", f"{line} --greedy"], capture_output=True, text=True, timeout=120, env=os.environ | path
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() == demo[1]["example"]["answer"]
    assert {"--vision-model", "--tokenizer", "PICTURE"}.isdisjoint(shlex.split(line))
    assert shlex.split(shown[0]["or on a page"])[-3:] == ["web", "--model", demo[1]["example"]["model"]]


@pytest.mark.long
def test_the_last_lines_say_what_the_model_recognises_and_how_to_free_the_disk(demo, shown):
    lines, talk = shown
    size = sum(path.stat().st_size for path in demo[0].rglob("*") if path.is_file())
    assert lines["free the disk"] == f"rm -r {demo[0]} ({size / 1e6:,.0f} MB)"
    assert size < BYTES[demo[0].name]
    assert "dark background" in talk


@pytest.mark.long
def test_the_chat_stage_shows_a_question_and_its_answer(demo):
    example, lines = demo[1]["example"], [line.strip() for line in demo[2].splitlines()]
    begin = next(n for n, line in enumerate(lines) if line.startswith("$ mmv chat"))
    assert lines[begin + 1] == example["question"]
    assert lines[begin + 2].startswith(f"{example['answer']} (")
    assert shlex.split(lines[begin])[-2:] == [example["image"], example["question"]]


@pytest.mark.long
def test_a_dozen_pictures_lie_as_files(demo):
    pictures = sorted((demo[0] / "pictures").glob("*.jpg"))
    assert len(pictures) == 12
    assert demo[0] / "pictures" / "star.jpg" in pictures


@pytest.mark.long
def test_the_folder_is_a_project_of_its_own(demo, monkeypatch):
    """Everything is where the standard folders are: in it no command needs an option."""
    monkeypatch.chdir(demo[0])
    assert run_mmv("chat", "--greedy", "--image", "pictures/star.jpg", demo[1]["example"]["question"]).err == ""
    doctor = run_mmv("doctor", "--preset", DEMO_GENERATIONS[demo[0].name].preset, "--json").json
    assert all(
        doctor[name].startswith("found, ") for name in ("vision model", "tokenizer", "pretrain data", "sft data")
    )


@pytest.mark.long
def test_files_stand_under_published_names(demo):
    names = {path.name for path in (demo[0] / "out").iterdir()}
    width = PRESETS[DEMO_GENERATIONS[demo[0].name].preset].hidden_size
    assert {f"pretrain_vlm_{width}.pth", f"sft_vlm_{width}.pth", f"sft_vlm_{width}.safetensors"} <= names


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    ended = installed("demo", "--out", tmp_path)
    assert ended.code == 2
    assert "name a new folder" in ended.error
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """A demo whose folder has the results of an earlier one, and the function that ends its next run early."""

    def stop_by(error):
        def stop(*args):
            raise error

        monkeypatch.setattr(run, "as_file", stop)  # the first that it does after it has looked at its folder

    demo = run.Demo(tmp_path / "demo", 0, Listener(), lambda *message: None)
    demo.runs.mkdir(parents=True)
    for path in (*demo.weights.values(), *(demo.out / name for name in run.RESULTS)):
        path.write_bytes(b"by the demo")
    records = demo.weights["sft"].with_suffix("") / "metrics.jsonl"
    records.parent.mkdir()
    records.touch()
    demo._note_end()
    return demo, stop_by


def test_a_demo_is_repeated_unless_its_weights_were_trained_on_since(finished):
    demo, stop_by = finished
    stop_by(KeyboardInterrupt())
    demo.weights["sft"].write_bytes(b"by its user")
    with pytest.raises(UsageError, match=r"sft_vlm_128\.pth was changed after the demo wrote it"):
        demo.run()
    assert demo.weights["sft"].read_bytes() == b"by its user"


def test_a_demo_that_is_stopped_leaves_no_result_of_an_earlier_one_and_says_so(finished):
    demo, stop_by = finished
    stop_by(KeyboardInterrupt())
    demo.listener = mock.Mock()
    for _ in range(2):  # the same command works again
        with pytest.raises(KeyboardInterrupt):
            demo.run()
    assert [path.relative_to(demo.out) for path in demo.out.rglob("*") if path.is_file()] == [Path(run.MARK)]
    assert demo.listener.lost.call_args_list[-1].args == (
        f"stopped — the demo in {demo.out} is not finished; the same command starts it again from the beginning",
    )


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), OSError("full")])
def test_a_demo_that_cannot_write_ends_in_one_line(finished, error):
    demo, stop_by = finished
    stop_by(error)
    with pytest.raises(RunError, match=r"^(No space left on device|full) — the demo in \S+ is not finished; the same"):
        demo.run()


def test_assets_that_do_not_fit_are_reported_as_any_other_file(tmp_path):
    demo = run.Demo(tmp_path / "demo", 0, Listener(), lambda *message: None)
    full = OSError(errno.ENOSPC, "No space left on device")
    with (
        mock.patch("shutil.copyfile", side_effect=full),
        mock.patch("shutil.copy2", side_effect=full),
        pytest.raises(RunError, match=r"^No space left on device — the demo in"),
    ):
        demo.run()


@pytest.mark.parametrize(
    ("seed", "size", "generation"), [(1, run.FULL, "2025"), (0, run.SHORT, "2025"), (0, run.FULL, "3v")]
)
def test_a_finished_demo_is_not_replaced_by_one_of_other_options(finished, seed, size, generation):
    out = finished[0].out
    other = run.Demo(out, seed, Listener(), lambda *message: None, size, DEMO_GENERATIONS[generation])
    with pytest.raises(UsageError, match="has the finished demo of --generation 2025 --seed 0 — name a new folder"):
        other.run()
    assert all((out / name).exists() for name in run.RESULTS)
