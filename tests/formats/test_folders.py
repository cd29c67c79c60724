"""Folders as others publish them: read by their tensors and their configuration, whatever code lies beside."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from minimind_v.core.errors import WeightsError
from minimind_v.core.export.folder import MANIFEST
from minimind_v.core.formats.checkpoint import read_checkpoint
from tests.cli.harness import run_mmv
from tests.export.made import exported
from tests.formats.made import DENSE, MOE, state

CODE = "raise SystemExit('somebody else\\'s code was run')\n"


def published(folder, config=DENSE, form="model.safetensors", shards=1, **changes):
    """A folder in the published layout, custom code and all."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({
        "architectures": ["MiniMindVLM"], "model_type": "minimind-v",
        "auto_map": {"AutoConfig": "model_vlm.VLMConfig", "AutoModelForCausalLM": "model_vlm.MiniMindVLM"},
        "hidden_size": config.hidden_size, "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers, "num_key_value_heads": config.num_key_value_heads,
        "vocab_size": config.vocab_size, "use_moe": config.use_moe, "rope_theta": 1e6, "dropout": 0.0,
        "image_ids": [34],
    } | changes))  # fmt: skip
    (folder / "model_vlm.py").write_text(CODE)
    tensors = {name: tensor.clone() for name, tensor in state(config).items()}
    tensors |= {"vision_encoder.vision_model.embeddings.class_embedding": torch.ones(4)}
    names = sorted(tensors)
    stem, ending = form.rsplit(".", 1)
    files = {
        form if shards == 1 else f"{stem}-{n + 1:05}-of-{shards:05}.{ending}": names[n::shards] for n in range(shards)
    }
    for file, chosen in files.items():
        stored = {name: tensors[name] for name in chosen}
        save_file(stored, folder / file) if ending == "safetensors" else torch.save(stored, folder / file)
    if shards > 1:
        index = {"weight_map": {name: file for file, chosen in files.items() for name in chosen}}
        (folder / f"{form}.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("config", [DENSE, MOE], ids=["dense", "moe"])
@pytest.mark.parametrize("form", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("shards", [1, 3])
def test_the_published_layout_is_read(tmp_path, config, form, shards):
    checkpoint = read_checkpoint(published(tmp_path / "folder", config, form, shards))
    assert checkpoint.config == config
    assert checkpoint.ignored == ["vision_encoder.vision_model.embeddings.class_embedding"]
    expected = state(config)
    assert checkpoint.tensors.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in checkpoint.tensors.items())


def test_a_tied_head_may_be_left_out(tmp_path):
    folder = published(tmp_path)
    tensors = {name: tensor.clone() for name, tensor in state().items() if name != "lm_head.weight"}
    save_file(tensors, folder / "model.safetensors")
    assert "lm_head.weight" in read_checkpoint(folder).tensors


def test_older_names_of_sizes_are_known(tmp_path):
    folder = published(tmp_path, dim=32, n_heads=4, n_kv_heads=2, norm_eps=1e-6, max_seq_len=999)
    config = json.loads((folder / "config.json").read_text())
    for name in ("hidden_size", "num_attention_heads", "num_key_value_heads"):
        del config[name]
    (folder / "config.json").write_text(json.dumps(config))
    config = read_checkpoint(folder).config
    assert (config.num_attention_heads, config.rms_norm_eps, config.max_position_embeddings) == (4, 1e-6, 999)


def test_it_becomes_a_file_and_info_reports_it(tmp_path):
    folder = published(tmp_path / "Some.Model")
    ended = run_mmv("convert", "--to", "pth", "--model", folder)
    assert ended.code == 0, ended.err
    assert torch.load(tmp_path / "Some.Model.pth", weights_only=True).keys() == state().keys()
    assert run_mmv("info", folder, "--json").json["kind"].startswith("published layout")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda folder: (folder / "pytorch_model-00002-of-00003.bin").unlink(),
            r"00002-of-00003.bin \(part of the weights\) is missing",
        ),
        (lambda folder: (folder / "pytorch_model-00002-of-00003.bin").write_bytes(b"PK\3\4"), "truncated or damaged"),
        (lambda folder: (folder / "pytorch_model.bin.index.json").write_text("{}"), "names no files"),
        (lambda folder: (folder / "pytorch_model.bin.index.json").unlink(), "has a config.json but no weights"),
        (lambda folder: (folder / "config.json").write_text("<html>"), "config.json: not JSON"),
        (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
        (
            lambda folder: (folder / "config.json").write_text('{"hidden_size": 64}'),
            "belongs to other weights",
        ),
    ],
)
def test_a_folder_that_lacks_a_file_is_reported(tmp_path, spoil, message):
    folder = published(tmp_path / "folder", form="pytorch_model.bin", shards=3)
    spoil(folder)
    with pytest.raises(WeightsError, match=message):
        read_checkpoint(folder)


def test_another_llava_is_not_taken_for_ours(tmp_path):
    folder = published(tmp_path)
    (folder / "config.json").write_text(json.dumps({
        "model_type": "llava", "projector_hidden_act": "gelu", "text_config": {"model_type": "qwen2"},
        "image_token_index": 7,
    }))  # fmt: skip
    with pytest.raises(
        WeightsError,
        match=r"a LLaVA model of another "
        r"kind.*projector_hidden_act.*text_config\.model_type",
    ):
        read_checkpoint(folder)


@pytest.mark.parametrize(
    ("kind", "text", "key"),
    [
        ("dense", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling"),
        ("dense", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e6}}, "rope_parameters"),
        ("dense", {"mlp_bias": True}, "mlp_bias"),
        ("moe", {"attention_multiplier": 1.0}, "attention_multiplier"),
        ("moe", {"attention_multiplier": None}, "attention_multiplier"),
        ("moe", {"embedding_multiplier": 12.0}, "embedding_multiplier"),
        ("moe", {"residual_multiplier": 0.2}, "residual_multiplier"),
        ("moe", {"logits_scaling": 6.0}, "logits_scaling"),
    ],
)
def test_a_llava_that_computes_otherwise_is_refused_by_its_key(tmp_path, kind, text, key):
    config = json.loads((exported(kind) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"text_config": config["text_config"] | text}))
    (tmp_path / "model.safetensors").symlink_to(exported(kind) / "model.safetensors")
    with pytest.raises(WeightsError, match=rf"another kind \(different text_config\.{key}\)"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"inference_rope_scaling": True, "rope_scaling": {"type": "yarn", "factor": 16}}, "inference_rope_scaling"),
        ({"rope_scaling": {"type": "yarn", "factor": 16}}, "rope_scaling"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"scoring_func": "sigmoid"}, "scoring_func"),
        ({"norm_topk_prob": False}, "norm_topk_prob"),
    ],
)
def test_a_published_folder_that_asks_for_more_is_refused_by_its_key(tmp_path, changes, key):
    with pytest.raises(WeightsError, match=rf"what the published model computes \({key}\), and mmv computes only that"):
        read_checkpoint(published(tmp_path / "folder", **changes))


def test_a_published_folder_with_its_usual_settings_is_read(tmp_path):
    usual = {"inference_rope_scaling": False, "rope_scaling": None, "hidden_act": "silu", "scoring_func": "softmax",
             "norm_topk_prob": True, "flash_attn": True}  # fmt: skip
    assert read_checkpoint(published(tmp_path / "folder", **usual)).config == DENSE


@pytest.mark.parametrize(
    "changes", [{"text_config": []}, {"vision_config": 5}, {"text_config": {"rope_parameters": []}}]
)
def test_a_configuration_of_other_kinds_of_values_is_refused(tmp_path, changes):
    folder = published(tmp_path)
    (folder / "config.json").write_text(json.dumps({"model_type": "llava"} | changes))
    with pytest.raises(WeightsError, match="a LLaVA model of another kind"):
        read_checkpoint(folder)
    (folder / "config.json").write_text("[" * 100_000)
    with pytest.raises(WeightsError, match="not JSON"):
        read_checkpoint(folder)


@pytest.mark.parametrize("name", ["../w.safetensors", "/etc/passwd", "a/b.safetensors", "", "..", "a\0b", "C:\\w.bin"])
def test_an_index_that_names_files_elsewhere_is_refused(tmp_path, name):
    folder = published(tmp_path / "folder", shards=3)
    (tmp_path / "w.safetensors").write_bytes((folder / "model-00001-of-00003.safetensors").read_bytes())
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    with pytest.raises(WeightsError, match=r"model\.safetensors\.index\.json: .* is not a file in the folder"):
        read_checkpoint(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 10**12}, "model.hidden_size must be at most 65,536"),
        ({"num_hidden_layers": 10**9}, "model.num_hidden_layers must be at most 1,000"),
        ({"vocab_size": -1}, "model.vocab_size must be at least 1"),
        ({"num_attention_heads": 0}, "model.num_attention_heads must be at least 1"),
        ({"hidden_size": "32"}, "model.hidden_size must be a whole number"),
        ({"num_hidden_layers": 2.5}, "model.num_hidden_layers must be a whole number"),
        ({"rope_theta": float("nan")}, "model.rope_theta must be between 0 and"),
        ({"rms_norm_eps": {"a": [1]}}, "model.rms_norm_eps must be a number"),
        ({"use_moe": "yes"}, "model.use_moe must be true or false"),
    ],
)
def test_sizes_that_no_model_has_are_named(tmp_path, changes, message):
    folder = published(tmp_path / "folder")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(WeightsError, match=message):
        read_checkpoint(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"hidden_size": ' + "9" * 5000 + "}", "not JSON"),
        ('{"a": ' * 5000 + "1" + "}" * 5000, "not JSON"),
        ("[]", "not a JSON object"),
        ("\0", "not JSON"),
        (" " * (17 << 20) + "{}", "not JSON .it has 17,825,794 bytes; the maximum is 16,777,216."),
    ],
    ids=["long number", "deep", "list", "NUL", "large"],
)
def test_a_json_of_another_kind_is_refused(tmp_path, text, message):
    folder = published(tmp_path / "folder")
    (folder / "config.json").write_text(text)
    with pytest.raises(WeightsError, match=message) as caught:
        read_checkpoint(folder)
    assert "\n" not in str(caught.value)


def changed_llava(folder, change):
    """A folder for transformers whose tensors somebody has changed."""
    shutil.copytree(exported(), folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


EMBEDDING = "model.language_model.embed_tokens.weight"


def later_token(folder, id):
    """Add a token to the tokenizer of a folder."""
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    data["added_tokens"].append({**data["added_tokens"][0], "id": id, "content": "<later>"})
    path.write_text(json.dumps(data), encoding="utf-8")


def test_a_token_that_was_added_behind_the_image_token_is_not_lost(tmp_path):
    def grow(tensors):
        tensors[EMBEDDING] = torch.cat((tensors[EMBEDDING], torch.ones(3, tensors[EMBEDDING].shape[1])))

    folder = changed_llava(tmp_path / "folder", grow)
    vocab_size = read_checkpoint(folder).config.vocab_size  # the rows behind are padding
    later_token(folder, vocab_size + 1)
    with pytest.raises(WeightsError, match=rf"1 token after .* \(<later>\).* lost .*model.vocab_size={vocab_size + 1}"):
        read_checkpoint(folder)
    line = run_mmv("convert", "--to", "pth", "--model", folder, "--out", tmp_path / "w.pth").error
    assert "their rows of the embedding would be lost" in line
    assert not (tmp_path / "w.pth").exists()


def test_a_llava_whose_head_alone_is_stored_is_read(tmp_path):
    folder = changed_llava(
        tmp_path / "folder", lambda tensors: tensors.update({"lm_head.weight": tensors.pop(EMBEDDING)})
    )
    tensors, plain = read_checkpoint(folder).tensors, read_checkpoint(exported()).tensors
    assert torch.equal(tensors["model.embed_tokens.weight"], plain["model.embed_tokens.weight"])


def test_a_llava_that_is_not_tied_is_refused(tmp_path):
    folder = changed_llava(tmp_path / "f", lambda tensors: tensors.update({"lm_head.weight": tensors[EMBEDDING] + 1}))
    with pytest.raises(WeightsError, match=r"lm_head.weight and model.language_model.embed_tokens.weight differ"):
        read_checkpoint(folder)


@pytest.mark.parametrize("note", [{"source": 5}, {"source": [], "verified": "yes"}, {"verified": [1]}])
def test_a_manifest_of_other_kinds_of_values_is_described(tmp_path, note):
    folder = tmp_path / "folder"
    shutil.copytree(exported(), folder)
    path = folder / MANIFEST
    path.write_text(
        json.dumps(json.loads(path.read_text()) | note) if path.exists() else json.dumps({"files": {}} | note)
    )
    assert run_mmv("info", folder, "--json").json["kind"] == "hf"


def test_a_name_that_is_no_text_is_reported(tmp_path):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.safetensors"))
    path.write_bytes(bytes(8) + b"{}")
    with pytest.raises(WeightsError, match="file name in UTF-8"):
        read_checkpoint(path)


def test_a_folder_with_code_that_wants_to_run_is_not_opened(tmp_path):
    folder = published(tmp_path, form="pytorch_model.bin")

    class Evil:
        def __reduce__(self):
            return print, ("run",)

    torch.save({"x": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(WeightsError, match="would run code"):
        read_checkpoint(folder)
