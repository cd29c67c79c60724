"""A folder that is removed or replaced while a run writes into it: all that is said at the end is there."""

import shutil

import pytest

from minimind_v.core.files import Held, Lock
from minimind_v.core.formats.checkpoint import read_checkpoint
from minimind_v.core.monitor.metrics import JsonLines
from minimind_v.core.train.loop import Run
from minimind_v.core.train.records import Records
from tests.cli.harness import read_rows, run_mmv, tiny_data

NAME = "pretrain_vlm_128"


def remove_after(step, then=lambda out: None):
    """Let somebody remove the folder of the run after one of its steps."""
    real = Run._launch

    def patched_step(run, number, batches):
        if number == step + 1:
            shutil.rmtree(run.config.out)
            then(run.config.out)
        return real(run, number, batches)

    return patched_step


@pytest.mark.long
@pytest.mark.parametrize(
    ("step", "then"),
    [
        (3, lambda out: None),
        (9, lambda out: None),
        (3, lambda out: (out / NAME).mkdir(parents=True)),
        (3, lambda out: ((out / NAME).mkdir(parents=True), (out / NAME / "metrics.jsonl").write_text('{"step": 9}\n'))),
    ],
    ids=["removed", "removed before the last step", "replaced by an empty one", "replaced by another's"],
)
@pytest.mark.parametrize("every", [1, 4])
def test_a_run_whose_folder_is_removed_leaves_all_that_it_says(tmp_path, monkeypatch, step, then, every):
    monkeypatch.setattr(Run, "_launch", remove_after(step, then))
    ended = run_mmv(*tiny_data().train(tmp_path / "out", log_every=every))
    folder = tmp_path / "out" / NAME
    assert ended.code == 0, ended.err
    assert f"{folder / 'metrics.jsonl'} was removed during the run" in ended.err
    assert f"weights in {tmp_path / 'out' / NAME}.pth, curve in {folder / 'metrics.jsonl'}" in ended.err
    assert read_checkpoint(tmp_path / "out" / f"{NAME}.pth").stage == "pretrain"
    steps = [record["step"] for record in read_rows(folder / "metrics.jsonl")]
    assert steps == [number for number in range(1, 11) if number in (1, 10) or number % every == 0]
    assert (folder / "report.html").is_file()
    assert (folder / "config.yaml").is_file()
    assert run_mmv("report", tmp_path / "out").code == 0


def test_a_folder_that_cannot_be_made_again_is_reported_and_the_run_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(Run, "_launch", remove_after(3, lambda out: out.write_text("")))
    ended = run_mmv(*tiny_data().train(tmp_path / "out"))
    assert ended.code == 1
    assert "cannot be written" in ended.error
    assert "weights in" not in ended.err


def test_weights_that_are_removed_after_the_save_are_not_claimed(tmp_path, monkeypatch):
    real = Records.report

    def report(records):
        real(records)
        shutil.rmtree(records.config.out)

    monkeypatch.setattr(Records, "report", report)
    ended = run_mmv(*tiny_data().train(tmp_path / "out", max_steps=1))
    assert ended.code == 1
    assert f"no weights: {tmp_path / 'out' / NAME}.pth was removed" in ended.err
    assert "was removed during the run" in ended.error
    assert "ask it" not in ended.err


def test_a_lock_that_was_removed_does_not_take_anothers_with_it(tmp_path):
    ours = Lock(tmp_path / "lock", {})
    (tmp_path / "lock").unlink()
    theirs = Lock(tmp_path / "lock", {}, patience=0)
    ours.release()
    with pytest.raises(Held):
        Lock(tmp_path / "lock", {}, patience=0)
    theirs.release()


def test_lines_are_made_again_once(tmp_path):
    lines = JsonLines(tmp_path / "run" / "metrics.jsonl")
    assert [lines.write({"step": number}) for number in (1, 2)] == [False, False]
    shutil.rmtree(tmp_path / "run")
    assert [lines.write({"step": number}) for number in (3, 4)] == [True, False]
    assert lines.write() is False
    lines.close()
    assert [record["step"] for record in read_rows(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3, 4]
