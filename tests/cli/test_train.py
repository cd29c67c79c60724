"""`mmv train`, both stages, as a user runs them."""

import math
import subprocess
from pathlib import Path

import pytest
import torch
import yaml

from minimind_v.core.config.presets import PRESETS
from minimind_v.core.formats.checkpoint import export_tensors, read_checkpoint, write_checkpoint
from minimind_v.core.model.vision.encoder import read_vision_spec
from minimind_v.core.model.vlm import VLM
from minimind_v.core.train import saver
from tests.cli.harness import BASE, EYE, ROWS, read_rows, run_mmv, tree, write_rows

KEYS = {"step", "loss", "lr", "grad_norm", "epoch", "samples", "supervised_tokens", "seconds"}


def published_rate(step, total, peak):
    return peak / 10 + peak / 2 * (1 + math.cos(math.pi * step / total))


def losses(out):
    return [record["loss"] for record in read_rows(out / "pretrain_vlm_128" / "metrics.jsonl")]


def test_both_stages_end_well_and_leave_the_published_names(trained):
    assert (trained.pretrain.code, trained.sft.code) == (0, 0), trained.pretrain.err + trained.sft.err
    assert {"pretrain_vlm_128.pth", "sft_vlm_128.pth"} <= set(tree(trained.out))
    assert read_checkpoint(trained.out / "pretrain_vlm_128.pth").stage == "pretrain"
    assert read_checkpoint(trained.out / "sft_vlm_128.pth").stage == "sft"


def test_fine_tuning_starts_from_what_pretraining_left(trained):
    assert "39 tensors loaded; 2 new (vision_proj" in trained.pretrain.err
    assert f"{trained.out / 'pretrain_vlm_128.pth'}: 41 tensors loaded" in trained.sft.err


def test_a_run_talks_on_stderr_only(trained):
    assert trained.pretrain.out == trained.sft.out == ""
    assert "step 1/10  loss " in trained.pretrain.err
    assert f"done after 10 steps; weights in {trained.out / 'pretrain_vlm_128.pth'}" in trained.pretrain.err


@pytest.mark.parametrize("stage", ["pretrain", "sft"])
def test_a_run_ends_with_its_report_and_a_chat_that_works(trained, stage):
    ended = getattr(trained, stage)
    *_, report, chat = ended.err.splitlines()
    assert report == f"report: {trained.out / f'{stage}_vlm_128' / 'report.html'}"
    assert Path(report.removeprefix("report: ")).is_file()
    assert str(trained.out / f"{stage}_vlm_128.pth") in chat
    done = subprocess.run(
        ["bash", "-c", f"echo 'Is there a red circle?' | {chat.removeprefix('chat with it: ')} --max-new-tokens 5"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0
    assert done.stderr.startswith("no image")


def test_metrics_hold_the_promised_keys_of_every_logged_step(trained):
    every, third = (read_rows(trained.out / f"{stage}_vlm_128" / "metrics.jsonl") for stage in ("pretrain", "sft"))
    assert [record["step"] for record in every] == list(range(1, 11))
    assert [record["step"] for record in third] == [1, 3, 6, 9, 10]
    assert all(record.keys() >= KEYS for record in every + third)
    assert every[-1]["samples"] == ROWS
    assert third[-1]["samples"] == 2 * ROWS
    assert [record["epoch"] for record in every] == [step / 10 for step in range(1, 11)]
    assert third[-1]["epoch"] == 2
    supervised = [record["supervised_tokens"] for record in every]
    assert supervised == sorted(set(supervised))
    assert all(math.isfinite(record["loss"]) and record["grad_norm"] > 0 for record in every + third)


@pytest.mark.parametrize(("stage", "peak"), [("pretrain", 1e-3), ("sft", 1e-4)])
def test_the_learning_rate_follows_the_published_cosine(trained, stage, peak):
    logged = {record["step"]: record["lr"] for record in read_rows(trained.out / f"{stage}_vlm_128" / "metrics.jsonl")}
    assert logged[1] == pytest.approx(1.1 * peak)
    assert logged == {step: pytest.approx(published_rate(step - 1, 10, peak)) for step in logged}
    assert min(logged.values()) == logged[10] > peak / 10


def test_pretraining_changes_the_projector_and_the_last_layer_alone(trained):
    before, after = read_checkpoint(BASE).tensors, read_checkpoint(trained.out / "pretrain_vlm_128.pth").tensors
    changed = {
        name for name, tensor in after.items() if name in before and not torch.equal(tensor, before[name].half())
    }
    assert changed == {name for name in before if name.startswith("model.layers.3.")}


def test_fine_tuning_changes_everything(trained):
    before, after = (read_checkpoint(trained.out / f"{stage}_vlm_128.pth").tensors for stage in ("pretrain", "sft"))
    assert all(not torch.equal(before[name], after[name]) for name in before)


def test_the_configuration_of_a_run_is_kept_and_runs_again(trained, tiny_data, tmp_path):
    kept = trained.out / "pretrain_vlm_128" / "config.yaml"
    assert yaml.safe_load(kept.read_text())["lr"] == 1e-3
    assert run_mmv("train", "pretrain", "--config", kept, "--out", tmp_path, "--set", "data.workers=0").code == 0
    assert losses(tmp_path) == losses(trained.out)


@pytest.mark.long
def test_the_same_seed_gives_the_same_losses_and_another_seed_others(tiny_data, tmp_path):
    for name, seed in (("one", 1), ("again", 1), ("other", 2)):
        assert run_mmv(*tiny_data.train(tmp_path / name, seed=seed, max_steps=4)).code == 0
    first, again, other = (losses(tmp_path / name) for name in ("one", "again", "other"))
    assert len(first) == 4
    assert first == again
    assert all(a != b for a, b in zip(first, other, strict=True))


@pytest.mark.long
def test_the_number_of_workers_changes_nothing(tiny_data, tmp_path):
    for workers in (0, 2):
        assert run_mmv(*tiny_data.train(tmp_path / str(workers), workers=workers, max_steps=3)).code == 0
    assert losses(tmp_path / "0") == losses(tmp_path / "2")


def test_accumulated_micro_batches_make_one_step(tiny_data, tmp_path):
    assert run_mmv(*tiny_data.train(tmp_path, accumulate=3)).code == 0
    records = read_rows(tmp_path / "pretrain_vlm_128" / "metrics.jsonl")
    assert [record["samples"] for record in records] == [12, 24, 36, 40]
    assert [record["epoch"] for record in records] == [0.25, 0.5, 0.75, 1.0]


def test_max_steps_ends_a_run_and_its_schedule(tiny_data, tmp_path):
    assert run_mmv(*tiny_data.train(tmp_path, max_steps=3, epochs=5)).code == 0
    records = read_rows(tmp_path / "pretrain_vlm_128" / "metrics.jsonl")
    assert [record["lr"] for record in records] == pytest.approx([published_rate(step, 3, 4e-4) for step in range(3)])


def test_bf16_autocast_trains_on_the_cpu(tiny_data, tmp_path):
    for dtype in ("bfloat16", "float32"):
        assert run_mmv(*tiny_data.train(tmp_path / dtype, dtype=dtype, max_steps=3)).code == 0
    half, full = losses(tmp_path / "bfloat16"), losses(tmp_path / "float32")
    assert half != full
    assert half == pytest.approx(full, rel=0.05)
    assert {t.dtype for t in read_checkpoint(tmp_path / "bfloat16/pretrain_vlm_128.pth").tensors.values()} == {
        torch.half
    }


def test_one_process_has_no_gradients_to_exchange(tiny_data, tmp_path):
    ended = run_mmv(*tiny_data.train(tmp_path, reduce_dtype="bfloat16", max_steps=1))
    assert ended.code == 0, ended.err
    assert "--reduce-dtype bfloat16 changes nothing: one process exchanges no gradients" in ended.err


def test_a_mixture_of_experts_trains_under_a_name_of_its_own(tiny_data, tmp_path):
    ended = run_mmv(*tiny_data.train(tmp_path, init="none", max_steps=2), "--set", "model.use_moe=true")
    assert ended.code == 0, ended.err
    assert "starting from random weights" in ended.err
    checkpoint = read_checkpoint(tmp_path / "pretrain_vlm_128_moe.pth")
    assert checkpoint.config.use_moe
    assert "model.layers.3.mlp.experts.3.up_proj.weight" in checkpoint.tensors
    assert not (tmp_path / "pretrain_vlm_128.pth").exists()


def test_sizes_of_ones_own_train_from_a_yaml_file(tiny_data, tmp_path):
    sizes = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 6, "num_key_value_heads": 3}
    mine = tmp_path / "mine.yaml"
    mine.write_text(yaml.safe_dump({"model": sizes | {"vocab_size": 600}, "lr": "1e-3", "init": "none"}))
    line = tiny_data.train(tmp_path / "out", preset=None, init=None, max_steps=2)
    assert run_mmv(*line, "--config", mine).code == 0
    config = read_checkpoint(tmp_path / "out" / "pretrain_vlm_48.pth").config
    assert (config.hidden_size, config.num_attention_heads, config.num_key_value_heads) == (48, 6, 3)
    assert config.intermediate_size == 128
    ended = run_mmv(
        *tiny_data.train(tmp_path / "out", "sft", preset=None, init=None, max_steps=1, config=mine), "--set", "init="
    )
    assert ended.code == 0, ended.err


def test_save_every_saves_on_the_way_and_at_the_end(tiny_data, tmp_path, monkeypatch):
    real, saved = saver.write_checkpoint, []
    monkeypatch.setattr(saver, "write_checkpoint", lambda path, *rest: (saved.append(path.name), real(path, *rest)))
    assert run_mmv(*tiny_data.train(tmp_path, save_every=4)).code == 0
    assert saved == ["pretrain_vlm_128.pth"] * 3  # after steps 4 and 8 of 10, and at the end


def test_a_run_never_replaces_weights_unasked(tiny_data, tmp_path):
    assert run_mmv(*tiny_data.train(tmp_path, max_steps=1)).code == 0
    before = (tmp_path / "pretrain_vlm_128.pth").read_bytes()
    refused = run_mmv(*tiny_data.train(tmp_path, max_steps=2))
    assert refused.code == 2
    assert "pretrain_vlm_128.pth exists from an earlier run" in refused.error
    assert "--overwrite" in refused.error
    assert (tmp_path / "pretrain_vlm_128.pth").read_bytes() == before
    assert run_mmv(*tiny_data.train(tmp_path, max_steps=2), "--overwrite").code == 0
    assert (tmp_path / "pretrain_vlm_128.pth").read_bytes() != before
    assert len(losses(tmp_path)) == 2  # the metrics of the new run alone


def test_the_first_loss_separates_an_untrained_base_from_a_trained_one(tiny_data, tmp_path):
    torch.manual_seed(0)
    blank = VLM(PRESETS["demo"], read_vision_spec(EYE), placeholder_id=34)
    text = {name: tensor for name, tensor in export_tensors(blank).items() if not name.startswith("vision_proj.")}
    write_checkpoint(tmp_path / "lm_128.pth", text, PRESETS["demo"], "lm")
    warned = run_mmv(*tiny_data.train(tmp_path, init=tmp_path / "lm_128.pth", max_steps=1))
    assert warned.code == 0
    assert "it is not trained" in warned.err
    assert f"{math.log(600):.2f}" in warned.err
    assert "not trained" not in run_mmv(*tiny_data.train(tmp_path, max_steps=1), "--overwrite").err


def test_rows_without_pictures_need_none(tiny_data, tmp_path):
    talk = [{"role": "user", "content": "Is it red?"}, {"role": "assistant", "content": "no"}]
    data = write_rows(tmp_path / "talk.jsonl", [{"conversations": talk}] * 8)
    ended = run_mmv(*tiny_data.train(tmp_path, data=data, images=None))
    assert ended.code == 0, ended.err
    assert read_rows(tmp_path / "pretrain_vlm_128" / "metrics.jsonl")[-1]["samples"] == 8
