"""Both generations in one project, with files of the same names: a command opens what belongs together, or refuses."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
import yaml

from minimind_v.core.config.presets import PRESETS
from minimind_v.core.formats.checkpoint import export_tensors
from minimind_v.core.model.vision.spec import read_vision_spec
from minimind_v.core.model.vlm import VLM
from minimind_v.core.paths import TOKENIZER_3V_DIR, TOKENIZER_DIR, VISION_3V_DIR, VISION_DIR
from tests.cli.harness import ASSETS, EYE, run_mmv, tiny_data
from tests.formats.made3v import SIZES, tiny_3v

NAME = "sft_vlm_48.pth"
OF_2025 = replace(PRESETS["small"], **{**SIZES, "num_hidden_layers": 2})
SMALL = ("--device", "cpu", "--max-new-tokens", 1)


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """The standard folders of both generations, and weights of each under one name in `old` and `new`."""
    folder = tmp_path_factory.mktemp("both")
    weights, tower, tokenizer = tiny_3v(folder / "parts", name=NAME)
    shutil.copytree(EYE, folder / VISION_DIR)
    shutil.copy(ASSETS / "tokenizer.json", folder / TOKENIZER_DIR)
    shutil.copytree(tower, folder / VISION_3V_DIR)
    shutil.copytree(tokenizer, folder / TOKENIZER_3V_DIR)
    torch.manual_seed(0)
    for name in ("old", "new", "out"):
        (folder / name).mkdir()
    torch.save(export_tensors(VLM(OF_2025, read_vision_spec(EYE), 34)), folder / "old" / NAME)
    shutil.copy(weights, folder / "new" / NAME)
    shutil.rmtree(folder / "parts")
    return folder


@pytest.fixture
def project(template, tmp_path, monkeypatch):
    shutil.copytree(template, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    return tmp_path / "project"


def sets(sizes):
    return [word for name, value in sizes.items() for word in ("--set", f"model.{name}={value}")]


def train(preset, *more, stage="sft", command="train"):
    data, sizes = tiny_data(), {**SIZES, **({} if preset == "3v" else {"num_hidden_layers": 2})}
    few = ("--device", "cpu", "--workers", 0, "--max-steps", 1, "--seed", 1, "--max-length", 300)
    rows = ("--data", data.data(stage), "--images", data.images(stage))
    return run_mmv(command, stage, "--preset", preset, *sets(sizes), *rows, *few, *more)


def run_of(preset, out="out"):
    """A run folder with the settings of a run of this preset, named like the weights."""
    words = train(preset, "--init", "none", "--out", out, "--print-config").out
    folder = f"{out}/{NAME.removesuffix('.pth')}"
    shutil.os.makedirs(folder)
    with open(f"{folder}/config.yaml", "w", encoding="utf-8") as file:
        file.write(words)
    return yaml.safe_load(words)


def test_a_run_folder_of_the_other_generation_does_not_decide_for_the_weights(project):
    for name, preset, layout in (("old", "3v", "chatml"), ("new", "small", "chatml-think")):
        run_of(preset, name)
        ended = run_mmv("chat", "Hello", "--model", f"{name}/{NAME}", *SMALL)
        assert ended.code == 0, ended.err
        assert f"{name}/sft_vlm_48 is the run of another model (" in ended.err
        assert f"than {name}/{NAME}: it is ignored" in ended.err
        described = run_mmv("info", f"{name}/{NAME}", "--json").json
        assert described["layout"] == layout
        assert "tokenizer" not in described


def test_the_card_of_an_export_leaves_out_the_run_of_another_model(project):
    run_of("small", "new")
    assert run_mmv("convert", "--to", "hf", "--model", f"new/{NAME}", "--out", "hf", "--no-verify").code == 0
    assert "Nothing more is known about its training." in (project / "hf" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("preset", "folder"), [("3v", "old"), ("small", "new")])
@pytest.mark.parametrize("how", [(), ("--resume",)])
def test_a_run_says_whose_weights_have_its_name(project, preset, folder, how):
    shutil.copy(f"{folder}/{NAME}", "out")
    error = train(preset, "--init", "none", *how).error
    names = ("MiniMind-V (2025)", "minimind-3v (2026)")
    theirs, ours = names if preset == "3v" else reversed(names)
    assert f"out/{NAME} has weights of {theirs}, this run trains {ours} — name another --out to keep it" in error
    assert "earlier run" not in error


@pytest.mark.parametrize("how", [(), ("--resume",)])
def test_a_run_says_that_the_folder_of_its_name_is_a_run_of_the_other_generation(project, how):
    assert train("small", "--init", "none").code == 0
    error = train("3v", "--init", "none", *how).error
    assert "out/sft_vlm_48 is a run of MiniMind-V (2025), this is one of minimind-3v (2026) — name another" in error
    assert train("3v", "--init", "none", "--overwrite").code == 0


def test_a_run_says_that_weights_of_its_name_were_downloaded(project):
    weights = shutil.copy(f"new/{NAME}", "out")
    status = (project / weights).stat()
    kept = {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "sha256": "", "hub": "hf", "commit": "c",
            "repo": "jingyaogong/minimind-3v-pytorch", "remote": NAME}  # fmt: skip
    (project / "out" / ".mmv-download").mkdir()
    notes = {"files": {NAME: kept}, "commits": {}, "wants": {}}
    (project / "out" / ".mmv-download" / "receipt.json").write_text(json.dumps(notes))
    error = train("3v", "--init", "none").error
    assert f"out/{NAME} was downloaded from jingyaogong/minimind-3v-pytorch (presets 3v, 3v-moe) — name" in error


MIXES = [
    (("--vision-model", VISION_DIR), "vision model belongs to MiniMind-V (2025)", "clip"),
    (("--tokenizer", TOKENIZER_DIR), "tokenizer belongs to MiniMind-V (2025)", "tokenizer"),
]


@pytest.mark.parametrize(("preset", "folder", "other"), [("3v", "old", "small"), ("small", "new", "3v")])
@pytest.mark.parametrize("command", ["train", "plan"])
def test_weights_of_the_other_generation_are_no_start(project, preset, folder, other, command):
    error = train(preset, "--init", f"{folder}/{NAME}", command=command).error
    assert f"{folder}/{NAME}: these weights belong to" in error
    assert f"add --preset {other}, or name other weights with --init" in error


def test_a_description_of_other_weights_is_refused_with_the_next_step(project):
    assert train("small", "--init", "none").code == 0
    shutil.copy(f"new/{NAME}", "out")
    error = run_mmv("chat", "Hello", "--model", f"out/{NAME}", *SMALL).error
    assert "the description beside it belongs to other weights" in error
    assert "is sft_vlm_48.json from an older file? Without it, sizes are read from the tensors" in error


@pytest.mark.long
@pytest.mark.parametrize(("mix", "message", "what"), MIXES)
def test_no_command_mixes_the_generations(project, mix, message, what):
    data = tiny_data()
    rows = (data.data("sft"), "--images", data.images("sft"))
    model = ("--model", f"new/{NAME}")
    commands = [
        ("chat", "Hello", *model, *mix, *SMALL),
        ("eval", *model, *mix, "--data", *rows, "--device", "cpu"),
        ("convert", "--to", "hf", *model, *mix, "--out", "hf"),
        ("data", "check", *rows, "--preset", "3v", *mix),
        ("data", "stats", *rows, "--preset", "3v", *mix),
        ("data", "preview", *rows, "--preset", "3v", *mix),
    ]
    errors = [run_mmv(*command).error for command in commands]
    errors += [train("3v", "--init", "none", *mix, command=command).error for command in ("train", "plan")]
    for error in errors:
        assert message in error
        assert f"`mmv download {what} --preset 3v`" in error
    assert not (project / "hf").exists()


def test_a_plan_refuses_a_mix_before_it_counts_rows(project, monkeypatch):
    monkeypatch.setattr("minimind_v.core.train.forecast.count_sample", lambda *_, **__: pytest.fail("it counted rows"))
    assert "belongs to MiniMind-V (2025)" in train("3v", *MIXES[1][0], command="plan").error


def test_data_commands_read_rows_as_a_preset_does(project):
    data, presets = tiny_data(), ("small", "3v", "3v-moe")
    rows = (data.data("sft"), "--images", data.images("sft"))
    old, new, experts = (run_mmv("data", "preview", *rows, "--preset", name, "--json").json for name in presets)
    assert new == experts
    assert old["rows"][0]["tokens"] > new["rows"][0]["tokens"], "64 tokens per image, not 16"
    for preset in presets:
        assert run_mmv("data", "check", *rows, "--preset", preset, "--json").json["ok"]
    assert run_mmv("data", "check", *rows, "--preset", "4v").code == 2


def test_without_a_preset_the_tokenizer_decides_how_rows_are_read(project):
    data = tiny_data()
    rows = (data.data("sft"), "--images", data.images("sft"))
    by_tokenizer = run_mmv("data", "preview", *rows, "--tokenizer", TOKENIZER_3V_DIR, "--json").json
    assert by_tokenizer == run_mmv("data", "preview", *rows, "--preset", "3v", "--json").json
    error = run_mmv("data", "check", *rows, "--tokenizer", TOKENIZER_3V_DIR, "--vision-model", VISION_DIR).error
    assert "the vision model belongs to MiniMind-V (2025) (CLIP), but the model of 2026 needs SigLIP" in error


def test_hints_are_commands_of_the_generation(project):
    model = ("chat", "Hello", "--model", f"new/{NAME}", *SMALL)
    error = run_mmv(*model, "--vision-model", "eyes", "--tokenizer", "words").error
    error += train("3v", "--init", "none", "--vision-model", "eyes", "--tokenizer", "words").error
    assert error.count("`mmv download clip --preset 3v`, which writes to") == 2
    assert error.count("`mmv download tokenizer --preset 3v`, which writes to") == 2
    assert "`mmv download lm --preset 3v`" in train("3v", "--init", "weights/llm_48.pth", stage="pretrain").error
    shutil.copytree(VISION_3V_DIR, "eyes")
    shutil.copytree(TOKENIZER_3V_DIR, "words")
    (project / "eyes" / "model.safetensors").write_bytes(b"damaged")
    (project / "words" / "tokenizer.json").write_text("damaged")
    for option, folder, what in (("--vision-model", "eyes", "clip"), ("--tokenizer", "words", "tokenizer")):
        for error in (run_mmv(*model, option, folder).error, train("3v", "--init", "none", option, folder).error):
            assert f"`mmv download {what} --preset 3v`" in error


def test_a_model_that_is_missing_is_reported_with_one_generation(project):
    """The standard folders of 2025 are empty, those of minimind-3v are complete: nothing but weights is missing."""
    shutil.rmtree(VISION_DIR)
    (project / TOKENIZER_DIR / "tokenizer.json").unlink()
    error = run_mmv("chat", "Hello").error
    assert "no trained weights in out" in error
    assert "mmv download" not in error


def test_doctor_reports_what_is_of_the_other_generation(project):
    shutil.copy(f"new/{NAME}", "out/llm_768.pth")  # the name of a base of both generations
    report = run_mmv("doctor", "--preset", "base", "--json").json
    assert report["language model"] == (
        "wrong, out/llm_768.pth has weights of minimind-3v (2026), not of MiniMind-V (2025) — "
        "`mmv download lm --preset base`"
    )
    assert report["tokenizer"].startswith("found, ")
    assert run_mmv("doctor", "--preset", "3v", "--json").json["language model"] == "found, out/llm_768.pth"
    shutil.copy(TOKENIZER_3V_DIR / "tokenizer.json", TOKENIZER_DIR)
    report = run_mmv("doctor", "--json").json
    assert report["tokenizer"].startswith("wrong, model: the tokenizer belongs to minimind-3v (2026)")
