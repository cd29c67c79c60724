"""The front door: `import minimind_v as mmv`."""

import doctest
import json
import logging
import os
import subprocess
import sys
from dataclasses import replace
from inspect import isfunction
from pathlib import Path
from statistics import median

import numpy as np
import pytest
import torch
from PIL import Image

import minimind_v as mmv
from minimind_v import api
from minimind_v.core.data import processor as processing
from tests.cli.harness import ROOT
from tests.demo_folder import demo_folder

QUESTION, STAR = "What colour is the star?", "pictures/star.jpg"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return demo_folder(tmp_path_factory.mktemp("api") / "demo")


@pytest.fixture(autouse=True)
def in_the_folder(folder, monkeypatch):
    monkeypatch.chdir(folder)


@pytest.fixture(scope="module")
def m(folder):
    return mmv.load(folder / "out" / "sft_vlm_128.pth", device="cpu")


def python(program):
    """What a fresh process prints."""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


# --- the import -------------------------------------------------------------------------------------------------------


def test_the_import_takes_milliseconds_and_no_torch():
    program = "import time; start = time.process_time(); import minimind_v; print(time.process_time() - start)"
    assert median(float(python(program)) for _ in range(5)) < 0.05
    assert python("import sys, minimind_v; print('torch' in sys.modules or 'typing' in sys.modules)") == "False"


def test_errors_and_configurations_need_no_torch():
    program = "import sys, minimind_v as mmv; mmv.MmvError, mmv.RunConfig; print('torch' in sys.modules)"
    assert python(program) == "False"


def test_every_public_name_is_there_and_others_are_not():
    assert {name for name in mmv.__all__ if getattr(mmv, name) is None} == set()
    assert set(mmv._MODULES) | {"__version__"} == set(mmv.__all__) == set(dir(mmv))
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        _ = mmv.lode


def test_types_come_with_the_package():
    assert (Path(mmv.__file__).parent / "py.typed").is_file()
    assert '"minimind_v" = ["py.typed"]' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


@pytest.mark.parametrize("module", [api, processing], ids=lambda module: module.__name__)
def test_the_examples_of_docstrings_run(module, capsys):
    finder = doctest.DocTestFinder()
    examples = [test for test in finder.find(module, globs={"mmv": mmv}) if test.examples]
    assert examples
    for test in examples:
        assert doctest.DocTestRunner().run(test).failed == 0, capsys.readouterr().out


def test_every_function_of_the_front_door_has_an_example():
    public = [api.load, api.config, api.train, api.evaluate, *vars(api.LoadedVLM).values(), api.Processor.__call__]
    without = [f.__name__ for f in public if isfunction(f) and ">>>" not in (f.__doc__ or "")]
    assert sorted(without) == ["__init__", "__repr__", "parameters"]


# --- a model ----------------------------------------------------------------------------------------------------------


def test_a_forward_pass_predicts_the_first_token_of_the_answer(m):
    inputs = m.processor(QUESTION, images=STAR)
    logits = m(**inputs).logits
    assert logits.shape == (1, inputs["input_ids"].shape[1], m.config.vocab_size)
    token = m.tokenizer.decode([int(logits[0, -1].argmax())])
    assert token == m.ask(QUESTION, STAR, max_new_tokens=1)
    assert logits.requires_grad


def test_a_batch_gives_what_its_rows_give_alone(m):
    questions, images = (
        [QUESTION, "Hello, how are you today?", "Is it big?"],
        [STAR, None, [STAR, "pictures/circle.jpg"]],
    )
    batch = m.processor(questions, images)
    logits = m(**batch).logits
    assert len(batch["pixel_values"]) == 3
    for row, (question, image) in enumerate(zip(questions, images, strict=True)):
        alone = m(**m.processor(question, image)).logits[0]
        assert batch["attention_mask"][row].sum() == len(alone)
        assert torch.allclose(logits[row, : len(alone)], alone, atol=1e-4)


def test_no_text_of_a_user_becomes_an_image(m):
    inputs = m.processor("@" * 70)
    assert not inputs["image_mask"].any()
    assert "pixel_values" not in inputs
    assert m(**inputs).logits.shape[0] == 1


def test_every_form_of_an_image_gives_the_same_pixels(m):
    pixels, data = m.processor.pixels(STAR), Path(STAR).read_bytes()
    with Image.open(STAR) as picture:
        array = np.asarray(picture)
        floats = array.astype(np.float32) / 255
        for image in (Path(STAR), data, bytearray(data), picture, array, floats, np.dstack([array, array[..., :1]])):
            assert np.array_equal(m.processor.pixels(image), pixels), type(image)
    grey = m.processor.pixels(np.full((30, 40), 7, np.uint8))
    assert (grey == 7).all()


def test_an_opened_image_is_turned_upright_as_its_file_is(m, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.arange(96 * 80 * 3, dtype=np.uint32).astype(np.uint8).reshape(96, 80, 3)).save(
        tmp_path / "turned.png", exif=exif
    )
    with Image.open(tmp_path / "turned.png") as picture:
        assert np.array_equal(m.processor.pixels(picture), m.processor.pixels(tmp_path / "turned.png"))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((3, 9, 9), np.uint8), r"shape \[3, 9, 9\] and type uint8"),
        (np.full((9, 9, 3), 255.0), "not an image: an array of .* type float64"),
        (np.full((9, 9, 3), np.nan), "not an image: an array of .* type float64"),
        (np.zeros((9, 9, 3), np.int64), "type int64"),
        (np.zeros((2, 9, 9, 3), np.uint8), r"\[2, 9, 9, 3\]"),
        (np.zeros((0, 9, 3), np.uint8), "not an image"),
        (np.zeros((3, 9, 9)), r"shape \[3, 9, 9\] and type float64, values from 0 to 0 .* with the channels last"),
        (np.zeros((9, 9)) > 0, "type bool"),
        (np.array(3.5), r"shape \[\] and type float64"),
        (torch.zeros(3, 9, 9), r"a tensor of shape \[3, 9, 9\] and type float32, values .* with the channels last"),
        (torch.full((9, 9, 3), 255, dtype=torch.uint8), "a tensor of .* type uint8 — give .* from 0 to 1$"),
        (torch.full((9, 9), 255.0, requires_grad=True), "values from 255 to 255 — give a numpy array"),
        (torch.zeros(0, dtype=torch.bfloat16), "type bfloat16 — give a numpy array"),
        (Image.new("RGB", (0, 5)), "0×5 pixels"),
        (7, "not an image: int"),
        ("", "the name of an image is empty"),
        (b"no picture", "not an image"),
        ("pictures/moon.jpg", "no image file at pictures/moon.jpg"),
    ],
)
def test_what_is_no_image_is_refused_in_one_line(m, image, message):
    with pytest.raises(mmv.MmvError, match=message) as raised:
        m.ask(QUESTION, image)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "PA", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "I;16"])
def test_an_image_of_any_usual_mode_is_read(m, mode):
    pixels = m.processor.pixels(Image.new(mode, (40, 30)))
    assert pixels.shape == (3, 64, 64)
    assert pixels.std(axis=(1, 2)).max() == 0


IDS = torch.ones(1, 5, dtype=torch.long)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.ask(5), "question must be a text, not 5"),
        (lambda m: m.stream(b"hi"), "question must be a text, not b'hi'"),
        (lambda m: m.chat().ask(None), "question must be a text, not None"),
        (lambda m: m.look(5, STAR), "question must be a text"),
        (lambda m: m.ask("a", max_new_tokens=1.5), "max_new_tokens must be a whole number, not 1.5"),
        (lambda m: m.ask("a", max_new_tokens=True), "max_new_tokens must be a whole number, not True"),
        (lambda m: m.ask("a", max_new_tokens="5"), "max_new_tokens must be a whole number, not '5'"),
        (lambda m: m.ask("a", temperature="a"), "temperature must be a number, not 'a'"),
        (lambda m: m.chat(seed=1.5), "seed must be a whole number or None, not 1.5"),
        (lambda m: m.look("What?", STAR, answer=5), "answer must be a text or None, not 5"),
        (lambda m: m.look("What?", STAR, swap=5), "not an image: int"),
        (lambda m: m.chat(1.0, None), "top_p must be a number, not None"),
        (lambda m: m.processor.question(7), "text must be a text, not 7"),
        (lambda m: m.save("a\0.pth"), "path contains a NUL character"),
        (lambda m: m.processor(5), "text must be a text or a list of texts, not 5"),
        (lambda m: m.processor([5]), "text must be a text or a list of texts, not list"),
        (lambda m: mmv.load(5), "path must be a text, a path or None, not 5"),
        (lambda m: mmv.load(""), "path is empty"),
        (lambda m: mmv.train(None), "config must be a RunConfig, a text or a path, not None"),
        (lambda m: mmv.config(5), "stage must be a text or a path, not 5"),
        (lambda m: mmv.evaluate(m, [{"conversations": []}]), "data must be a text, a path or None, not list"),
        (lambda m: mmv.evaluate(m, "rows.jsonl", limit=-1), "limit must be at least 1, not -1"),
        (lambda m: mmv.evaluate(m, "rows.jsonl", task="vqa", limit=0), "limit must be at least 1, not 0"),
        (lambda m: mmv.evaluate(m, "rows.jsonl", dtype="x"), "dtype 'x' must be one of auto"),
        (lambda m: m(input_ids=[[1, 2]]), "input_ids must be a Tensor, not list"),
        (lambda m: m(torch.tensor([[99_999]])), "input_ids must have int64 numbers from 0 to 599"),
        (lambda m: m(IDS[0]), "input_ids must be .B, T. with T from 1 to 32768, not .5."),
        (lambda m: m(IDS[:, :0]), "input_ids must be .B, T. with T from 1 to 32768, not .1, 0."),
        (lambda m: m(IDS, labels=IDS[:, :2]), "labels must have the shape .1, 5., not .1, 2."),
        (lambda m: m(IDS, labels=IDS + 600), "labels must have int64 numbers"),
        (lambda m: m(IDS, pixel_values=torch.zeros(3, 64, 64)), "pixel_values must have the shape .…, 3, 64, 64."),
        (lambda m: m(IDS, image_mask=IDS.bool()), "row 0 has image placeholders, but no images"),
    ],
)
def test_arguments_of_a_wrong_type_or_shape_are_refused_in_one_line(m, call, message):
    with pytest.raises(mmv.MmvError, match=message) as raised:
        call(m)
    assert "\n" not in str(raised.value)


def test_numbers_may_be_those_of_numpy_and_a_name_that_does_not_exist_is_pythons_own_error(m):
    numbers = {"max_new_tokens": np.int64(4), "temperature": np.float32(1.5), "seed": np.int64(3)}
    assert m.ask(QUESTION, **numbers) == m.ask(QUESTION, max_new_tokens=4, temperature=1.5, seed=3)
    for call in (m.ask, mmv.evaluate, m.processor):
        with pytest.raises(TypeError, match="unexpected keyword argument 'answer'"):
            call(QUESTION, answer=1)
    assert m(IDS.int(), labels=torch.full_like(IDS, -100)).loss == 0


@pytest.mark.parametrize("question", ["", " \n"], ids=repr)
def test_an_empty_question_is_refused_before_its_image_is_read(m, question):
    for ask in (m.ask, m.look, m.processor, m.chat().ask, lambda *given: list(m.stream(*given))):
        with pytest.raises(mmv.MmvError, match="the question is empty"):
            ask(question, "pictures/moon.jpg")


def test_images_and_texts_must_fit_each_other(m):
    with pytest.raises(mmv.MmvError, match="2 <image> marks for 1"):
        m.processor("<image> or <image>?", STAR)
    with pytest.raises(mmv.MmvError, match="2 texts need a list of 2"):
        m.processor([QUESTION, QUESTION], STAR)


def test_a_seed_repeats_a_drawn_answer_and_pieces_join_to_it(m):
    drawn = {"temperature": 5.0, "top_p": 1.0, "max_new_tokens": 12}
    first = m.ask(QUESTION, STAR, seed=1, **drawn)
    assert m.ask(QUESTION, STAR, seed=1, **drawn) == first == "".join(m.stream(QUESTION, STAR, seed=1, **drawn))
    assert m.ask(QUESTION, STAR, seed=2, **drawn) != first


def test_a_conversation_remembers_its_turns(m):
    chat = m.chat()
    chat.ask(QUESTION, STAR, max_new_tokens=4)
    first = list(chat._session.turns)
    chat.ask("And now?", max_new_tokens=4)
    assert len(chat._session.turns) == 1 + 2
    assert chat._session.turns[: len(first)] == first


def test_what_is_saved_is_the_model(m, tmp_path):
    for name in ("a.pth", "a.safetensors"):
        again = mmv.load(m.save(tmp_path / name), "model/vision_model/clip-vit-base-patch16", "model")
        assert again.stage == "sft"
        assert again.ask(QUESTION, STAR, max_new_tokens=8) == m.ask(QUESTION, STAR, max_new_tokens=8)
        with pytest.raises(mmv.MmvError, match="exists already"):
            m.save(tmp_path / name)
    with pytest.raises(mmv.MmvError, match=r"must end with one of \.pth, \.safetensors"):
        m.save(tmp_path / "a.bin")


def test_the_latest_model_is_loaded_where_none_is_named():
    assert mmv.load().path.name == "sft_vlm_128.pth"
    with pytest.raises(mmv.MmvError, match=r"no weights at out/sft\.pth"):
        mmv.load("out/sft.pth")


# --- training and evaluation ------------------------------------------------------------------------------------------


def settings(out, **more):
    return {"preset": "demo", "out": out, "max_steps": 2, "batch_size": 4, "workers": 0, "device": "cpu"} | more


def test_a_stage_a_file_and_a_configuration_train_the_same_run(tmp_path, capsys, caplog):
    caplog.set_level(logging.WARNING)
    stage = mmv.train("sft", **settings(tmp_path / "stage"))
    assert (stage.best_weights, stage.best) == (None, None)
    config = mmv.config("sft", **settings(tmp_path / "config"))
    Path("run.yaml").write_text("stage: sft\npreset: demo\n", encoding="utf-8")
    runs = [stage, mmv.train(config), mmv.train("run.yaml", **settings(tmp_path / "file"))]
    assert [run.steps for run in runs] == [2, 2, 2]
    weights = [torch.load(run.weights)["model.norm.weight"] for run in runs]
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[0], weights[2])
    assert capsys.readouterr() == ("", "")
    with pytest.raises(mmv.MmvError, match="overwrite"):
        mmv.train(config)
    assert mmv.train(config, resume=True).steps == 2


def test_progress_is_shown_where_it_is_asked_for(tmp_path, capsys):
    mmv.train("sft", progress=True, log_every=1, **settings(tmp_path))
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "loss" in shown.err


@pytest.mark.parametrize(
    ("arguments", "more", "message"),
    [
        (["stf"], {}, "'stf' is neither pretrain nor sft nor a YAML file"),
        (["no.yaml"], {}, "no configuration file no.yaml"),
        (["sft"], {"epoch": 3}, "epoch"),
        (["sft"], {"lr": "fast"}, "lr must be of type float"),
        (["sft"], {"gpus": 2}, "mmv train sft --gpus 2"),
        (["sft"], {"data": "no.jsonl", "vision_model": "no"}, "3 inputs are missing: .*no.jsonl"),
        ([mmv.config("sft")], {"lr": 1.0}, "a RunConfig takes no settings"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_mistakes_are_one_line(arguments, more, message):
    with pytest.raises(mmv.MmvError, match=message) as raised:
        mmv.train(*arguments, **more)
    assert "\n" not in str(raised.value)


def test_an_evaluation_counts_its_rows_and_shows_what_images_are_worth(m):
    rows = "dataset/heldout_scenes_data.jsonl"
    scores = mmv.evaluate(m, rows)
    assert (scores.n, scores.short_answers) == (12, 12)
    assert 0 <= scores.accuracy <= 1
    assert mmv.evaluate(m, rows, blank=True).loss != scores.loss
    assert mmv.evaluate("out/sft_vlm_128.pth", rows, limit=5).n == 5


def test_an_evaluation_by_a_task_returns_the_report_of_the_command(m, tmp_path):
    rows = "dataset/heldout_scenes_data.jsonl"
    report = mmv.evaluate(m, rows, task="vqa", limit=4, out=tmp_path / "out")
    assert [metric["name"] for metric in report["metrics"]] == ["vqa", "exact"]
    assert (report["rows"], set(report["visual_gain"])) == (4, {"blank", "swapped", "none"})
    assert json.loads((tmp_path / "out/report.json").read_text()) == json.loads(json.dumps(report))
    own = tmp_path / "own.yaml"
    own.write_text("task: loss\nfields:\n  question: nothing\n")
    with pytest.raises(mmv.MmvError, match="no row has the field `nothing`"):
        mmv.evaluate(m, rows, task=own)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"task": "vqa", "blank": True}, "for an evaluation without a task"),
        ({"task": "vqa", "batch_size": 4}, "for an evaluation without a task"),
        ({"task": "vqua"}, "no task 'vqua' .did you mean 'vqa'"),
        ({"out": "x"}, "name one with task="),
    ],
)
def test_settings_of_another_kind_of_evaluation_are_refused(m, more, message):
    with pytest.raises(mmv.MmvError, match=message):
        mmv.evaluate(m, "dataset/heldout_scenes_data.jsonl", **more)


def test_an_evaluation_reads_the_features_beside_the_weights(m, monkeypatch, tmp_path):
    (tmp_path / "features").mkdir()
    monkeypatch.setattr(m, "path", tmp_path / m.path.name)
    rows, counts = "dataset/heldout_scenes_data.jsonl", []

    def count(encoder, inputs, features):
        counts[-1] += len(features)

    handle = m.model.vision_encoder.register_forward_hook(count)
    scores = [counts.append(0) or mmv.evaluate(m, rows) for _ in range(2)]
    handle.remove()
    assert scores[0] == scores[1]
    assert counts[0] - counts[1] == 12  # those of the rows; some more measure the encoder


def test_an_evaluation_resizes_images_as_the_tower_says(m, monkeypatch):
    modes = []

    def score(model, dataset, *rest, **more):
        modes.append(dataset.preparation[1])
        raise mmv.MmvError("enough")

    monkeypatch.setattr(api, "score", score)
    monkeypatch.setattr(m.model, "spec", replace(m.model.spec, resize_mode="squeeze"))
    with pytest.raises(mmv.MmvError, match="enough"):
        mmv.evaluate(m, "dataset/heldout_scenes_data.jsonl")
    assert modes == ["squeeze"]


def test_a_script_needs_no_main_guard_and_no_compiler(folder, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        "import minimind_v as mmv\n"
        f"summary = mmv.train('sft', **{settings(str(tmp_path / 'out'), workers=2)!r})\n"
        "print(summary.steps, {'torch._dynamo', 'transformers'} & set(sys.modules))  # they take seconds to import\n",
        encoding="utf-8",
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(script)], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout == "2 set()\n", done.stderr
