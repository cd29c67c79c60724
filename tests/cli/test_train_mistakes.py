"""Every mistake that a beginner makes with `mmv train`: one line, an exit code, a next step, nothing half-written."""

import multiprocessing
import shutil

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from tests.cli.harness import ASSETS, BASE, EYE, ROWS, read_rows, run_mmv, tree, write_rows

HTML = "<!DOCTYPE html>\n<html><head><title>lm_512.pth · Hugging Face</title></head></html>"


@pytest.fixture
def refused(tiny_data, tmp_path):
    """Runs a training that must be refused with this exit code; returns the line that says why."""

    def run(code, *more, stage="pretrain", out=tmp_path / "out", **changes):
        ended = run_mmv(*tiny_data.train(out, stage, **changes), *more)
        assert ended.code == code, ended.err
        assert ended.out == ""
        assert not out.is_dir() or tree(out) == []
        return ended.error

    return run


# --- inputs that are not there ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "wrong", "step"),
    [
        ("vision_model", "nowhere", "`mmv demo` makes it"),
        ("vision_model", ASSETS, "`mmv demo` makes it"),  # the tokenizer's folder
        ("tokenizer", "nowhere", "`mmv demo` makes it"),
        ("tokenizer", EYE, "`mmv demo` makes it"),
        ("data", "nowhere.jsonl", "no data file nowhere.jsonl"),
        ("images", "nowhere.zip", "no file nowhere.zip — give a folder, zip or tar with --images"),
        ("init", "nowhere.pth", "`mmv demo` makes it"),
        ("config", "nowhere.yaml", "no configuration file nowhere.yaml"),
    ],
)
def test_a_missing_input_is_named_with_the_command_that_brings_it(refused, option, wrong, step):
    line = refused(1, **{option: wrong})
    assert str(wrong) in line
    assert step in line


def test_the_base_that_is_missing_is_that_of_the_size_that_was_asked_for(refused):
    assert "`mmv download lm --preset base`" in refused(1, init="out/lm_768.pth", preset="base")


def test_fine_tuning_before_pretraining_gets_advice_to_pretrain_first(refused):
    assert "`mmv train pretrain --preset demo`" in refused(1, stage="sft", init=None)
    assert "this text-only base has no projector; `mmv train pretrain` trains one" in refused(1, stage="sft", init=BASE)


# --- inputs that are something else -----------------------------------------------------------------------------------


def test_a_web_page_given_as_a_file_is_recognised(refused, tmp_path):
    page = tmp_path / "page"
    page.write_text(HTML)
    assert "HTML page, not weights" in refused(1, init=page)
    assert "HTML page, not data" in refused(1, data=page)
    assert "HTML page" in refused(1, images=page)
    (tmp_path / "tokenizer.json").write_text(HTML)
    assert "not a tokenizer" in refused(1, tokenizer=tmp_path)
    (tmp_path / "config.json").write_text(HTML)
    assert "not JSON" in refused(1, vision_model=tmp_path)


def test_damaged_weights_of_the_vision_model_are_reported_with_their_folder(refused, tmp_path):
    shutil.copytree(EYE, tmp_path / "eye")
    whole = (EYE / "model.safetensors").read_bytes()
    for damage in (whole[:1000], HTML.encode(), b""):
        (tmp_path / "eye" / "model.safetensors").write_bytes(damage)
        line = refused(1, vision_model=tmp_path / "eye")
        assert str(tmp_path / "eye") in line
        assert "mmv download clip" in line
    (tmp_path / "eye" / "model.safetensors").unlink()
    assert "the vision model could not be loaded" in refused(1, vision_model=tmp_path / "eye")


def test_a_base_of_another_size_is_reported_by_its_preset(refused):
    line = refused(1, preset="small")
    assert "wrong shape (model.embed_tokens.weight [600, 128] for [6400, 512]" in line
    assert line.endswith("its sizes match --preset demo")


def test_a_base_trained_with_another_vision_model_is_reported(refused, trained, tmp_path):
    shutil.copytree(EYE, tmp_path / "eye")
    (tmp_path / "eye" / "config.json").write_text((EYE / "config.json").read_text().replace("128", "64"))
    (tmp_path / "eye" / "model.safetensors").unlink()
    CLIPVisionModel(CLIPVisionConfig.from_pretrained(tmp_path / "eye")).save_pretrained(tmp_path / "eye")
    line = refused(1, stage="sft", init=trained.out / "pretrain_vlm_128.pth", vision_model=tmp_path / "eye")
    assert "vision_proj.vision_proj.0.weight [128, 128] for [128, 64]" in line
    assert line.endswith("it needs a vision model with features of width 128 (--vision-model)")


def test_heads_that_change_no_shape_must_be_those_of_the_weights(refused, sighted):
    other = ("--set", "model.num_attention_heads=8", "--set", "model.num_key_value_heads=4")
    line = refused(1, *other, stage="sft", init=sighted)
    assert "num_attention_heads 4, the model has 8" in line
    assert "--set model.num_attention_heads=4" in line


def test_a_tokenizer_too_large_for_the_model_is_refused(refused):
    line = refused(2, "--set", "model.vocab_size=599", init="none")
    assert "600 tokens, but the model has only 599" in line


def test_a_folder_where_weights_are_required_and_the_other_way_round(refused, tiny_data, tmp_path):
    assert "a folder, not a weights file" in refused(1, init=tmp_path)
    assert "is not a data file" in refused(1, data=tmp_path)
    assert "no vision model in" in refused(1, vision_model=tiny_data.picture())
    assert "no tokenizer in" in refused(1, tokenizer=tiny_data.picture())


def test_an_out_that_is_a_file_is_refused(refused, tiny_data):
    line = refused(2, out=tiny_data.picture())
    assert line == f"--out {tiny_data.picture()}: {tiny_data.picture()} is a file, not a folder — name another folder"


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("freeze", "projecter", "did you mean 'projector'?"),
        ("freeze", "projector-last", "did you mean 'projector+last'?"),
        ("preset", "smal", "did you mean 'small'?"),
        ("preset", "", "must be one of small, base, moe, 3v, 3v-moe, demo"),
        ("dtype", "bf16", "must be one of auto, float32, bfloat16"),
        ("dtype", "float16", "did you mean"),
        ("device", "gpu", "--device gpu: not available on this machine"),
        ("device", "", "not available on this machine"),
        ("device", "meta", "not available on this machine"),
        ("device", "hpu", "not available on this machine"),
        ("device", "vulkan", "not available on this machine"),
        ("lr", 5, "--lr must be between 0 and 1, not 5"),
        ("lr", 0, "--lr must be between 0 and 1"),
        ("lr", -1e-4, "--lr must be between 0 and 1"),
        ("lr", "nan", "--lr must be between 0 and 1"),
        ("epochs", 0, "--epochs must be at least 1, not 0"),
        ("epochs", -1, "--epochs must be at least 1, not -1"),
        ("batch_size", 0, "--batch-size must be at least 1"),
        ("batch_size", -4, "--batch-size must be at least 1"),
        ("accumulate", 0, "--accumulate must be at least 1"),
        ("max_length", -640, "--max-length must be at least 1"),
        ("max_steps", -1, "--max-steps must be at least 0"),
        ("save_every", -1, "--save-every must be at least 0"),
        ("log_every", 0, "--log-every must be at least 1"),
        ("workers", -1, "--workers must be at least 0"),
        ("seed", -1, "--seed must be at least 0"),
        ("seed", 2**64, "--seed must be below 2^63"),
    ],
)
def test_a_wrong_value_is_refused_before_anything_is_done(refused, option, value, message):
    line = refused(2, **{option: value})
    assert message in line
    assert len(line) < 250


def test_a_device_of_another_machine_is_refused(refused):
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    assert "--device cuda:7: not available on this machine" in refused(2, device="cuda:7")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["train"], "pretrain"),
        (["train", "pretrian"], "'pretrain', 'sft'"),
        (["train", "pretrain", "--batchsize", "4"], "--batch-size"),
        (["train", "pretrain", "--epochs", "two"], "Invalid value for '--epochs'"),
        (["train", "pretrain", "--epochs", "1.5"], "Invalid value for '--epochs'"),
        (["train", "pretrain", "sft"], "'sft': too many words"),
        (["trian"], "train"),
    ],
)
def test_a_command_line_that_is_none_says_what_would_be_one(args, message):
    ended = run_mmv(*args)
    assert ended.code == 2
    assert message in ended.err
    assert "Traceback" not in ended.err


# --- data -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def broken(tiny_data, tmp_path):
    """Data in which every so many rows is broken, each in another way."""

    def make(rows, *numbers):
        good = read_rows(tiny_data.data("pretrain"))
        lines = [good[n % ROWS] for n in range(rows)]
        damages = ['{"conversations": [', {"image": "a.jpg"}, {**good[0], "image": "nowhere.jpg"}]
        for damage, number in enumerate(numbers):
            lines[number - 1] = damages[damage % len(damages)]
        return write_rows(tmp_path / "mine.jsonl", lines)

    return make


@pytest.mark.long
def test_a_few_broken_rows_are_named_and_counted(tiny_data, broken, tmp_path):
    data = broken(300, 7, 90, 201)
    ended = run_mmv(*tiny_data.train(tmp_path / "out", data=data, batch_size=60, workers=1, epochs=2, max_steps=7))
    assert ended.code == 0, ended.err
    for row, why in ((7, "not JSON"), (90, "conversations"), (201, "nowhere.jpg")):
        assert ended.err.count(f"row skipped: {data}:{row}: ") == 1
        assert why in next(line for line in ended.err.splitlines() if f"{data}:{row}:" in line)
    assert "3 broken rows skipped" in ended.err
    epoch = read_rows(tmp_path / "out" / "pretrain_vlm_128" / "metrics.jsonl")[4]
    assert (epoch["epoch"], epoch["samples"]) == (1.0, 297)


def test_more_than_one_row_in_a_hundred_is_an_error_with_the_first_named(tiny_data, broken, tmp_path):
    data = broken(80, 40)
    ended = run_mmv(*tiny_data.train(tmp_path / "out", data=data, batch_size=80))
    assert ended.code == 1
    assert "1 of 80 rows are broken, more than 1%" in ended.error
    assert f"for example {data}:40: not JSON" in ended.error
    assert "--set data.bad_rows=" in ended.error
    assert (
        run_mmv(*tiny_data.train(tmp_path / "out", data=data, batch_size=80), "--set", "data.bad_rows=0.02").code == 0
    )


def test_a_run_that_bad_rows_end_at_once_leaves_nothing_in_the_way_of_the_next(tiny_data, sighted, tmp_path):
    rows, data = read_rows(tiny_data.data("sft"))[:6], tmp_path / "mine.jsonl"
    line = tiny_data.train(tmp_path / "out", "sft", data=data, init=sighted, max_steps=1, batch_size=1)
    write_rows(data, [*rows[:2], rows[2] | {"image": "nowhere.jpg"}, "{", rows[4], "{"])
    ended = run_mmv(*line)
    assert ended.code == 1
    assert ended.error.startswith(f"3 of 6 rows are broken, more than 1%; for example {data}:3: nowhere.jpg: no such")
    assert ended.err.count("row skipped: ") == 3
    assert "step 1" not in ended.err
    write_rows(data, rows)
    assert run_mmv(*line).code == 0


def test_rows_whose_images_are_all_missing_lead_to_the_option_of_their_folder(tiny_data, tmp_path):
    (tmp_path / "empty").mkdir()
    ended = run_mmv(*tiny_data.train(tmp_path / "out", images=tmp_path / "empty"))
    assert ended.code == 1
    assert ended.error.startswith("40 of 40 rows are broken")
    assert "— check --images, or fix the data" in ended.error
    assert not (tmp_path / "out" / "pretrain_vlm_128").exists()


@pytest.mark.parametrize("allowed", ["0.01", "1"])
def test_data_of_broken_rows_alone_leaves_no_weights(tiny_data, tmp_path, allowed):
    data = write_rows(tmp_path / "mine.jsonl", ["{"] * 20)
    ended = run_mmv(*tiny_data.train(tmp_path / "out", data=data, workers=1), "--set", f"data.bad_rows={allowed}")
    assert ended.code == 1
    assert f"{data}:" in ended.error
    assert not list(tmp_path.rglob("*.pth"))


@pytest.mark.parametrize("content", ["", "\n\n  \n"])
def test_empty_data_is_reported(refused, tmp_path, content):
    (tmp_path / "mine.jsonl").write_text(content)
    assert "mine.jsonl: the file has no rows" in refused(1, data=tmp_path / "mine.jsonl")


def test_pictures_of_other_data_are_reported(tiny_data, tmp_path):
    ended = run_mmv(*tiny_data.train(tmp_path / "out", data=tiny_data.data("sft"), images=tmp_path))
    assert ended.code == 1
    assert f"no such image in {tmp_path}" in ended.error
    assert not list(tmp_path.rglob("*.pth"))


def test_a_length_that_holds_no_prompt_is_reported(tiny_data, tmp_path):
    ended = run_mmv(*tiny_data.train(tmp_path / "out", max_length=50))
    assert ended.code == 1
    assert "the prompt alone is longer than 50 tokens" in ended.error
    assert not list(tmp_path.rglob("*.pth"))


def test_no_processes_are_left_when_a_run_fails(tiny_data, tmp_path):
    ended = run_mmv(*tiny_data.train(tmp_path / "out", data=write_rows(tmp_path / "mine.jsonl", ["{"] * 20), workers=2))
    assert ended.code == 1
    assert multiprocessing.active_children() == []


# --- pictures that are not shown --------------------------------------------------------------------------------------


def test_rows_with_a_picture_and_no_mark_are_text_rows_and_reported_once(tiny_data, sighted, tmp_path):
    rows = read_rows(tiny_data.data("sft"))
    for row in rows[::4]:
        for message in row["conversations"]:
            message["content"] = message["content"].replace("<image>", "").strip()
        row["image"] = "none.jpg"  # nobody looks
    data = write_rows(tmp_path / "mine.jsonl", rows)
    ended = run_mmv(*tiny_data.train(tmp_path / "out", "sft", data=data, init=sighted, epochs=2, workers=1))
    assert ended.code == 0, ended.err
    notes = [line for line in ended.err.splitlines() if "but no <image> in their text" in line]
    assert [line.startswith("step ") for line in notes] == [True, False], ended.err
    assert notes[-1].startswith("10 of 40 rows have an image but no <image> in their text: text rows")
    assert "skipped" not in ended.err


def test_what_rows_are_read_as_is_reported_once_and_counted(tiny_data, sighted, tmp_path):
    rows = read_rows(tiny_data.data("sft"))
    for row in rows[::4]:
        row["messages"] = [{"from": "gpt", "value": "Hello."}, *row.pop("conversations")]
        row["images"] = [{"path": row.pop("image")}]
    data = write_rows(tmp_path / "mine.jsonl", rows)
    ended = run_mmv(*tiny_data.train(tmp_path / "out", "sft", data=data, init=sighted, epochs=2, workers=1))
    assert ended.code == 0, ended.err
    notes = [line for line in ended.err.splitlines() if "begin with an answer" in line]
    assert [line.startswith("step ") for line in notes] == [True, False], ended.err
    assert notes[-1].startswith("10 of 40 rows begin with an answer without a question; it is not used")
    assert "skipped" not in ended.err


@pytest.mark.parametrize("stage", ["pretrain", "sft"])
def test_a_set_that_lacks_its_marks_is_warned_of(tiny_data, sighted, tmp_path, stage):
    rows = read_rows(tiny_data.data(stage))
    for row in rows:
        for message in row["conversations"]:
            message["content"] = message["content"].replace("<image>", "").strip()
    data = write_rows(tmp_path / "mine.jsonl", rows)
    ended = run_mmv(*tiny_data.train(tmp_path / "out", stage, data=data, init=sighted if stage == "sft" else BASE))
    assert ended.code == 0, ended.err
    assert "40 of the first 40 rows have an image but no <image> in their text" in ended.err
    assert "40 of 40 rows have an image but no <image> in their text: text rows" in ended.err


def test_rows_whose_pictures_are_not_read_are_named_and_counted_in_a_mixture(tiny_data, sighted, tmp_path):
    rows = read_rows(tiny_data.data("sft"))
    rows[3] = {"conversations": rows[3]["conversations"], "video": "a.mp4"}
    talk = [{"from": "user", "value": "<img>a.jpg</img>\nWhat?"}, {"from": "assistant", "value": "A star."}]
    rows[20] = {"conversations": talk}
    data = write_rows(tmp_path / "mine.jsonl", rows)
    line = tiny_data.train(tmp_path / "out", "sft", data=data, init=sighted)
    ended = run_mmv(*line, "--set", "data.bad_rows=0.1")
    assert ended.code == 0, ended.err
    assert f"row skipped: {data}:4: images or videos in `video` are not supported" in ended.err
    assert f"row skipped: {data}:21: '<img>a.jpg</img>' in its text is not supported" in ended.err
    assert "2 broken rows skipped (2 images not read)" in ended.err
    refused = run_mmv(*line, "--overwrite")
    assert refused.code == 1
    assert "of 40 rows are broken, more than 1%" in refused.error
