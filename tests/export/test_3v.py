"""A model of minimind-3v as transformers' LFM2-VL: the same logits, ids and pixels, and back again."""

import json
import re
from contextlib import nullcontext

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from minimind_v.core.data.images import to_pixels
from minimind_v.core.data.prompt import PromptEncoder
from minimind_v.core.errors import WeightsError
from minimind_v.core.export import targets
from minimind_v.core.export.folder import export
from minimind_v.core.export.prove.cases import Case, images
from minimind_v.core.export.prove.pillow_processor import has_torchvision
from minimind_v.core.formats.checkpoint import read_checkpoint
from minimind_v.core.formats.hf import write as hf
from minimind_v.core.formats.load import load
from minimind_v.core.formats.request import ExportRequest
from tests.formats.made3v import DENSE, MOE, tiny_3v

needs_torchvision = pytest.mark.skipif(not has_torchvision(), reason="torchvision cannot be imported")

TURNS = [
    {"role": "system", "content": "Answer in one word."},
    {"role": "user", "content": "<image>\n<image>\nWhich is brighter?"},
    {"role": "assistant", "content": "<think>\nThe second is white.\n</think>\n\nThe second."},
    {"role": "user", "content": "<image>\nThan this?"},
]


@pytest.fixture(scope="module", params=[DENSE, MOE], ids=["dense", "moe"])
def exported(request, tmp_path_factory):
    """The request of a tiny model, and its exported folder."""
    folder = tmp_path_factory.mktemp("lfm2")
    order = ExportRequest(*tiny_3v(folder / "parts", request.param))
    (folder / "export").mkdir()
    hf.make(order, folder / "export")
    return order, folder / "export"


def patches(pixels, side):
    """Images [M, 3, S, S] as the flat patches that SigLIP2 reads, [M, P, side · side · 3]."""
    return pixels.unfold(2, side, side).unfold(3, side, side).permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)


@torch.no_grad()
def test_the_logits_are_those_of_lfm2_vl(exported):
    order, folder = exported
    source, theirs = order.load(), AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    assert type(theirs).__name__ == "Lfm2VlForConditionalGeneration"
    tokens = PromptEncoder(source.tokenizer, 16).prompt(TURNS)
    ids, pixels = torch.tensor([tokens.input_ids]), torch.randn(3, 3, 64, 64)
    expected = theirs(
        input_ids=ids, pixel_values=patches(pixels, 16), spatial_shapes=torch.tensor([[4, 4]] * 3),
        pixel_attention_mask=torch.ones(3, 16, dtype=torch.int32),
    ).logits  # fmt: skip
    logits = source.model(ids, pixel_values=pixels, image_mask=torch.tensor([tokens.image_mask])).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


def test_a_folder_is_read_back_to_the_same_model(exported):
    order, folder = exported
    source, back = order.load(), load(folder, device="cpu")
    assert back.config == source.config
    assert (back.checkpoint.stage, back.tokenizer.layout) == ("sft", "chatml-think")
    before, after = source.model.state_dict(), back.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("think", [False, True])
def test_the_chat_template_writes_the_prompts_of_training(exported, think):
    order, folder = exported
    source, tokenizer = order.load(), AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template(
        Case(TURNS).standard, tokenize=False, add_generation_prompt=True, open_thinking=think
    )
    ids = tokenizer(text.replace("<|image_pad|>", "<|image_pad|>" * 16), add_special_tokens=False)["input_ids"]
    assert ids == PromptEncoder(source.tokenizer, 16).prompt(TURNS, think).input_ids


TOOLS = [{"type": "function", "function": {"name": "count", "parameters": {"type": "object"}}}, {"name": "放大"}]
WITH_TOOLS = [
    {"role": "user", "content": "<image>\nHow many?"},
    {"role": "assistant", "content": "Let me count.", "reasoning_content": "A tool.", "tool_calls": [
        {"type": "function", "function": {"name": "count", "arguments": {"what": "星"}}},
        {"name": "count", "arguments": '{"what": "moon"}'},
    ]},
    {"role": "tool", "content": "3"},
    {"role": "tool", "content": "1"},
    {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "count", "arguments": {}}}]},
    {"role": "tool", "content": "0"},
]  # fmt: skip


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_the_chat_template_writes_tools_as_rows_have_them(exported, system):
    order, folder = exported
    tokenizer = AutoTokenizer.from_pretrained(folder)
    opening = [] if system is None else [{"role": "system", "content": system}]
    standard = [*opening, Case(WITH_TOOLS[:1]).standard[0], *WITH_TOOLS[1:]]
    text = tokenizer.apply_chat_template(standard, tools=TOOLS, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text.replace("<|image_pad|>", "<|image_pad|>" * 16), add_special_tokens=False)["input_ids"]
    row = [{"role": "system", "content": system, "tools": TOOLS}, *WITH_TOOLS]
    assert ids == PromptEncoder(order.load().tokenizer, 16).prompt(row).input_ids


def test_a_user_cannot_write_an_image_token(exported):
    _, folder = exported
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "<|image_pad|> <|image_pad|>"}], tokenize=False)
    assert "<|image_pad|>" not in text


@needs_torchvision
@pytest.mark.parametrize("size", [(600, 40), (30, 700), (5, 7), (64, 64), (1800, 1200)])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
def test_the_own_processor_squeezes_every_image_into_one_tile(exported, size, mode):
    order, folder = exported
    image = images()[0].resize(size).convert(mode)
    inputs = AutoProcessor.from_pretrained(folder)(images=[image], text="<|image_pad|>", return_tensors="pt")
    assert inputs["spatial_shapes"].tolist() == [[4, 4]]
    assert inputs["input_ids"].shape[1] == inputs["pixel_attention_mask"].sum() == 16
    spec = order.load().model.spec
    pixels = torch.tensor(to_pixels(image, spec.image_size, spec.resize_mode, spec.resample)) / 255
    difference = patches((pixels[None] - 0.5) / 0.5, 16) - inputs["pixel_values"]
    assert float(difference.abs().max()) * 0.5 * 255 < 1.01, "a grey level"


@needs_torchvision
@pytest.mark.parametrize("think", [False, True])
def test_the_own_processor_writes_the_prompts_of_training(exported, think):
    order, folder = exported
    messages, pictures = Case(TURNS).standard, iter(images())
    for message in messages:
        message["content"] = [
            item | {"image": next(pictures)} if item["type"] == "image" else item for item in message["content"]
        ]
    inputs = AutoProcessor.from_pretrained(folder).apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", open_thinking=think
    )
    assert inputs["pixel_values"].shape == (3, 16, 3 * 16 * 16)
    assert inputs["input_ids"][0].tolist() == PromptEncoder(order.load().tokenizer, 16).prompt(TURNS, think).input_ids


@needs_torchvision
def test_the_snippet_of_the_card_runs(exported, tmp_path, monkeypatch, capsys):
    card = (exported[1] / "README.md").read_text()
    snippet = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    images()[0].save(tmp_path / "picture.jpg")
    monkeypatch.chdir(tmp_path)
    exec(snippet.replace('folder = "."', f"folder = {str(exported[1])!r}"), {})
    assert capsys.readouterr().out


@pytest.mark.long
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_an_export_is_verified(exported, prover, tmp_path, monkeypatch, dtype):
    """With torchvision by the folder's own processor; without it by Pillow, and the report says so."""
    monkeypatch.setattr(targets, "Worker", lambda *_: nullcontext(prover))
    order, _ = exported
    report = export(ExportRequest(order.model, order.vision_model, order.tokenizer, dtype), "hf", tmp_path / "verified")
    assert not report.wrong
    assert report.findings["token ids"] == "equal in 3 of 3 prompts"
    assert "Lfm2VlForConditionalGeneration" in report.findings["opened by"]
    assert ("images prepared by" in report.findings) == (not has_torchvision())
    assert load(tmp_path / "verified", device="cpu").config == order.load().config


def test_another_lfm2_vl_is_refused_by_the_keys_that_differ(exported, tmp_path):
    _, folder = exported
    config = json.loads((folder / "config.json").read_text())
    yarn = {"rope_type": "yarn", "factor": 16.0, "rope_theta": 1e6}
    config["text_config"] |= {"model_type": "lfm2", "rope_parameters": yarn}
    config |= {"downsample_factor": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    differences = "downsample_factor, text_config.model_type, text_config.rope_parameters"
    with pytest.raises(WeightsError, match=f"an LFM2-VL model of another kind .*{differences}"):
        read_checkpoint(tmp_path)


def changed(folder, target, config, text=None, vision=None):
    """The exported folder with other settings in its config.json; the other files are links."""
    for path in folder.iterdir():
        (target / path.name).symlink_to(path)
    settings = json.loads((folder / "config.json").read_text())
    for key, changes in (("text_config", text), ("vision_config", vision)):
        settings[key] |= changes or {}
    (target / "config.json").unlink()
    (target / "config.json").write_text(json.dumps(settings | config))
    return target


YARN = {"rope_type": "yarn", "factor": 16.0, "rope_theta": 1e6, "original_max_position_embeddings": 2048}


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ({"rope_parameters": YARN}, "rope_parameters"),
        ({"rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 0.5}}, "rope_parameters"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "rope_parameters"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "rope_scaling"),
        ({"partial_rotary_factor": 0.25}, "partial_rotary_factor"),
        ({"use_sliding_window": True, "sliding_window": 8}, "use_sliding_window"),
        ({"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "layer_types"),
        ({"layer_types": ["conv", "conv", "full_attention"]}, "layer_types"),
        ({"layer_types": 3}, "layer_types"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
    ],
)
def test_a_setting_that_mmv_does_not_compute_is_refused(exported, tmp_path, text, key):
    folder = changed(exported[1], tmp_path, {}, text)
    with pytest.raises(WeightsError, match=rf"another kind \(different text_config\.{key}\); mmv reads only"):
        read_checkpoint(folder)


def test_an_image_token_that_is_not_the_tokenizers_is_refused(exported, tmp_path):
    with pytest.raises(WeightsError, match=r"another kind \(different image_token_id\)"):
        read_checkpoint(changed(exported[1], tmp_path, {"image_token_id": 7}))


def test_an_image_processor_that_makes_several_tiles_is_refused(exported, tmp_path):
    folder = changed(exported[1], tmp_path, {})
    settings = json.loads((folder / "preprocessor_config.json").read_text()) | {"max_tiles": 10}
    (folder / "preprocessor_config.json").unlink()
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(WeightsError, match=r"max_tiles is 10, but this vision model needs 1\)"):
        load(folder, device="cpu")


def test_what_transformers_saves_again_is_read(exported, tmp_path):
    """It adds keys with their usual values, such as `layer_types`."""
    order, folder = exported
    AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).save_pretrained(tmp_path)
    assert load(tmp_path, folder, folder, "cpu").config.text == order.load().config.text
