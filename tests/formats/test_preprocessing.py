"""How a folder says that its images are prepared, and what of it mmv does not do; the tower of April 2026."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPImageProcessor, Siglip2VisionConfig, Siglip2VisionModel, SiglipImageProcessor

from minimind_v.core.errors import WeightsError
from minimind_v.core.formats.vision_tower import read_tower
from minimind_v.core.model.vision.spec import read_vision_spec
from tests.cli.harness import ASSETS, EYE, run_mmv, sighted, tiny_data
from tests.formats.made3v import tiny_3v, tiny_siglip

FILE = "preprocessor_config.json"
USUAL = {"size": {"height": 64, "width": 64}, "resample": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}


@pytest.fixture
def clip(tmp_path):
    shutil.copytree(EYE, tmp_path / "clip")
    return tmp_path / "clip"


@pytest.fixture
def siglip(tmp_path):
    return tiny_siglip(tmp_path / "siglip")


def change(folder, usual, **settings):
    (folder / FILE).write_text(json.dumps(usual | settings))


@pytest.mark.parametrize(
    "settings",
    [
        {"do_resize": False},
        {"do_rescale": False},
        {"do_normalize": False},
        {"rescale_factor": 1 / 127.5},
        {"size": {"shortest_edge": 72}},
        {"size": {"height": 64, "width": 64}},
        {"size": 224},
        {"do_center_crop": False},
        {"crop_size": 56},
        {"resample": 2},
    ],
)
def test_clip_refuses_what_it_would_not_do(clip, settings):
    change(clip, {}, **settings)
    with pytest.raises(WeightsError, match=rf"clip: .*in preprocessor_config.json {next(iter(settings))} is .*, but "):
        read_tower(clip)


@pytest.mark.parametrize(
    "settings",
    [
        {"do_resize": False},
        {"do_rescale": False},
        {"do_normalize": False},
        {"rescale_factor": 2},
        {"size": {"shortest_edge": 64}},
        {"size": {"height": 64, "width": 32}},
        {"size": 224},
        {"do_center_crop": True},
        {"max_num_patches": 256},
        {"tile_size": 512},
        {"tile_size": 64, "max_tiles": 10},
        {"tile_size": 64, "use_thumbnail": True},
    ],
)
def test_siglip_refuses_what_it_would_not_do(siglip, settings):
    change(siglip, USUAL, **settings)
    with pytest.raises(
        WeightsError, match=rf"in preprocessor_config.json {[*settings][-1]} .*`mmv download clip --pre"
    ):
        read_tower(siglip)


def test_files_of_transformers_own_processors_are_read(clip, siglip):
    CLIPImageProcessor(size={"shortest_edge": 64}, crop_size=64).save_pretrained(clip)
    assert (read_vision_spec(clip).resize_mode, read_vision_spec(clip).resample) == ("crop", "bicubic")
    SiglipImageProcessor(size={"height": 64, "width": 64}, resample=2).save_pretrained(siglip)
    assert (read_vision_spec(siglip).resize_mode, read_vision_spec(siglip).resample) == ("squeeze", "bilinear")


def test_settings_in_the_file_of_a_whole_processor_are_read(siglip):
    """transformers 5 saves them there."""
    expected = read_vision_spec(siglip)
    (siglip / FILE).unlink()
    (siglip / "processor_config.json").write_text(json.dumps({"image_processor": USUAL}))
    assert read_vision_spec(siglip) == expected


@pytest.mark.parametrize("generation", ["2025", "2026"])
def test_a_folder_without_settings_is_reported(tmp_path, generation):
    weights, tower, tokenizer = (sighted(), EYE, ASSETS) if generation == "2025" else tiny_3v(tmp_path)
    shutil.copytree(tower, tmp_path / "bare")
    (tmp_path / "bare" / FILE).unlink()
    ended = run_mmv("chat", "Hello", "--model", weights, "--vision-model", tmp_path / "bare", "--tokenizer", tokenizer,
                    "--max-new-tokens", 1, "--device", "cpu")  # fmt: skip
    assert ended.code == 0, ended.err
    numbers = {"2025": ("0.481, 0.458, 0.408", "0.269, 0.261, 0.276"), "2026": ("0.5, 0.5, 0.5",) * 2}[generation]
    assert "bare has no preprocessor_config.json: images are resized bicubic, and normalised with " in ended.err
    assert "with mean {} and deviation {}\n".format(*numbers) in ended.err


# --- April 2026 -------------------------------------------------------------------------------------------------------

NAFLEX = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}


def naflex_tower(folder):
    """A SigLIP2 for images of any aspect, as transformers saves it."""
    torch.manual_seed(0)
    Siglip2VisionModel(Siglip2VisionConfig(**NAFLEX)).save_pretrained(folder)
    return folder


@pytest.mark.long
def test_the_tower_of_april_is_named_wherever_it_is_opened(tmp_path):
    weights, _, tokenizer = tiny_3v(tmp_path)
    tower = naflex_tower(tmp_path / "april")
    data, eyes = tiny_data(), ("--vision-model", tower, "--tokenizer", tokenizer)
    train = data.train(tmp_path / "out", "sft", preset="3v", vision_model=tower, tokenizer=tokenizer, init="none")
    rows = (data.data("sft"), "--images", data.images("sft"), *eyes)
    for line in (
        ("chat", "Hello", "--model", weights, *eyes),
        ("eval", "--model", weights, "--data", *rows),
        ("convert", "--to", "hf", "--model", weights, *eyes, "--out", tmp_path / "hf"),
        ("data", "check", *rows),
        ("data", "stats", *rows),
        ("data", "preview", *rows, "--html", tmp_path / "page.html"),
        train,
        ["plan", *train[1:]],
    ):
        error = run_mmv(*line).error
        assert "april: the vision model could not be loaded (in config.json it is a SigLIP2 NaFlex, of 256 pat" in error
        assert "April 2026; mmv supports today's form" in error
        assert "`mmv download clip --preset 3v`" in error


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "siglip2", "vision_config": {"num_patches": 256, "patch_size": 16}},
        {"model_type": "siglip2", "vision_config": {"model_type": "siglip2_vision_model", "hidden_size": 768}},
        {"model_type": "siglip2_vision_model", "image_size": 256, "patch_size": 32, "num_patches": 256},
    ],
)
def test_the_form_of_april_is_read_from_its_configuration(tmp_path, config):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match="NaFlex, of 256 patches"):
        read_vision_spec(tmp_path)


def test_its_tensors_under_another_configuration_are_refused(tmp_path, siglip):
    tensors = Siglip2VisionModel(Siglip2VisionConfig(**NAFLEX)).state_dict()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, siglip / "model.safetensors")
    with pytest.raises(
        WeightsError, match=r"could not be loaded \(embeddings.position_embedding.weight is \[256, 24\]"
    ):
        read_tower(siglip)
