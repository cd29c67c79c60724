"""The two files hold the same functions as the checkpoint: computed from them by other code, the numbers are equal."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from jinja2 import Environment

from minimind_v.core.data.prompt import PromptEncoder
from minimind_v.core.data.tokenizer import Tokenizer
from minimind_v.core.errors import MissingInput, UsageError, WeightsError
from minimind_v.core.formats.gguf import language, vision
from minimind_v.core.formats.gguf import tokenizer as words
from minimind_v.core.formats.gguf.file import QUANTIZATIONS, Reader
from minimind_v.core.formats.gguf.read import MMPROJ, MODEL, MODELFILE
from minimind_v.core.formats.gguf.write import write
from minimind_v.core.formats.request import ExportRequest
from minimind_v.core.formats.vision_tower import build_encoder
from tests.cli.harness import ASSETS
from tests.formats.gguf.graphs import File, Words, image_embeddings, language_logits
from tests.formats.gguf.made import SIZES, TEXTS, loaded_model, random_texts

PUBLISHED = Path(__file__).parents[4] / "shared" / "tokenizer"


def written(loaded, folder, quantize=None):
    write(loaded, folder, ExportRequest(loaded.checkpoint.path, quantize=quantize))


IDS = [1, 57, 300, 2, 599, 34, 34, 8, 100, 100, 41, 0]


@pytest.mark.parametrize("name", SIZES)
def test_logits_are_those_of_the_checkpoint(name, tmp_path):
    loaded = loaded_model(name)
    written(loaded, tmp_path, "f32")
    theirs = language_logits(File(tmp_path / MODEL), IDS)
    with torch.inference_mode():
        ours = loaded.model(torch.tensor([IDS])).logits[0].numpy()
    assert np.abs(ours).max() > 1
    assert np.abs(ours - theirs).max() < 1e-3 * np.abs(ours).max()


def test_picture_features_are_clips_without_the_corner(tmp_path):
    loaded = loaded_model()
    written(loaded, tmp_path, "f32")
    pixels = torch.randint(0, 256, (3, 48, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    encoder = loaded.model.vision_encoder
    normal = (pixels.float() / 255 - encoder.mean) / encoder.std
    theirs = image_embeddings(File(tmp_path / MMPROJ), normal.double().numpy())
    with torch.inference_mode():
        tower = encoder.tower
        embeddings = tower.embeddings(normal[None])
        without = torch.cat(
            (embeddings[:, :1], embeddings[:, 2:]), dim=1
        )  # the class token stands where the corner was
        features = tower.encode(without)
        expected = loaded.model.vision_proj(features)[0].numpy()
        whole = loaded.model.vision_proj(encoder(pixels[None]))[0].numpy()
    assert np.abs(theirs - expected).max() < 2e-3 * np.abs(expected).max()
    alike = (theirs * whole).sum(-1) / np.linalg.norm(theirs, axis=-1) / np.linalg.norm(whole, axis=-1)
    assert alike[1:].min() > 0.8  # of nine patches here; one of 196 is less


def test_the_corner_changes_no_feature(tmp_path):
    written(loaded_model(), tmp_path, "f32")
    pixels = np.random.default_rng(0).normal(size=(3, 48, 48))
    other = pixels.copy()
    other[:, :16, :16] = 9
    mmproj = File(tmp_path / MMPROJ)
    assert np.abs(image_embeddings(mmproj, pixels) - image_embeddings(mmproj, other)).max() < 1e-2


@pytest.mark.parametrize("folder", [ASSETS, PUBLISHED], ids=["demo", "published"])
def test_token_ids_are_the_tokenizers(folder, tmp_path):
    if not folder.is_dir():
        pytest.skip(f"the published tokenizer is not at {folder}")
    ours = Tokenizer.load(folder)
    config = SIZES["dense"].__class__(hidden_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=6400)
    loaded = loaded_model(tokenizer=folder, config=config)
    written(loaded, tmp_path)
    theirs, again = Words(File(tmp_path / MODEL)), words.read_tokenizer(Reader(tmp_path / MODEL))
    for text in (*TEXTS, *random_texts(2000)):
        ids = ours.encode(text).ids
        assert theirs.encode(text) == ids, text
        assert again.encode(text).ids == ids, text
    assert (again.pad_id, again.bos_id, again.eos_id, again.placeholder_id) == (0, 1, 2, 34)
    assert again.decode(ours.encode(TEXTS[8]).ids) == TEXTS[8]


@pytest.mark.parametrize("quantize", QUANTIZATIONS)
@pytest.mark.parametrize("name", ["odd", "moe"])
def test_every_type_is_read_back_within_its_precision(name, quantize, tmp_path):
    loaded = loaded_model(name, loud=1.0)
    written(loaded, tmp_path, quantize)
    reader, clip = Reader(tmp_path / MODEL), Reader(tmp_path / MMPROJ)
    config = language.read_config(reader)
    assert config == loaded.model.config
    tensors = language.read_tensors(reader, config) | vision.read_projector(clip)
    held = loaded.checkpoint.tensors
    assert tensors.keys() == held.keys()
    # Half a step of the coarsest block: of the largest number of a matrix.
    allowed = {
        "f32": 0,
        "f16": 2**-11,
        "bf16": 2**-8,
        "q8_0": 1 / 250,
        "q5_1": 1 / 30,
        "q5_0": 1 / 16,
        "q4_1": 1 / 14,
        "q4_0": 1 / 8,
    }
    for key, tensor in held.items():
        assert (tensors[key] - tensor).abs().max() <= allowed[quantize] * tensor.abs().max() * 1.02, key
    pixels = torch.randint(0, 256, (1, 3, 48, 48), dtype=torch.uint8)
    features, again = loaded.model.vision_encoder(pixels), build_encoder(vision.read_stored(clip))(pixels)
    assert torch.cosine_similarity(features, again, dim=-1).min() > (
        0.99 if QUANTIZATIONS[quantize] == "q8_0" else 0.9999
    )


def test_types_of_tensors(tmp_path):
    written(loaded_model("odd"), tmp_path, "q8_0")  # 72 and 100 are no whole blocks of 32
    odd = File(tmp_path / MODEL).types
    assert {odd[f"blk.0.{name}.weight"] for name in ("attn_q", "ffn_up", "ffn_down")} == {"F16"}
    assert odd["blk.0.attn_norm.weight"] == "F32"
    written(loaded_model("dense"), tmp_path, "q4_0")
    even, clip = File(tmp_path / MODEL).types, File(tmp_path / MMPROJ).types
    assert even["blk.0.attn_q.weight"] == "Q4_0"
    assert even["token_embd.weight"] == "Q8_0"
    assert clip["v.blk.0.attn_q.weight"] == "Q8_0"
    assert (clip["v.patch_embd.weight"], clip["v.position_embd.weight"], clip["mm.0.weight"]) == ("F16", "F32", "F32")


# --- prompts ----------------------------------------------------------------------------------------------------------

TALKS = (
    [{"role": "user", "content": "Who are you?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a"},
     {"role": "assistant", "content": "b"}, {"role": "user", "content": "看\n图"}],
)  # fmt: skip


def rendered(messages):
    return (
        Environment().from_string(words.chat_template("chatml")).render(messages=messages, add_generation_prompt=True)
    )


@pytest.mark.parametrize("talk", TALKS, ids=["question", "talk"])
def test_the_chat_template_writes_our_prompt(talk):
    tokenizer = Tokenizer.load(ASSETS)
    ids = PromptEncoder(tokenizer, 4).prompt(talk).input_ids
    ours = tokenizer.backend.decode(ids, skip_special_tokens=False)
    assert rendered(talk) == ours
    messages = [turn | {"content": [{"type": "text", "text": turn["content"]}]} for turn in talk]
    assert rendered(messages) == ours


def test_pictures_stand_on_lines_of_their_own_whatever_the_client_sends():
    mark = "<__media__>"
    texts = [{"type": "text", "text": text} for text in (mark, mark, "Which?")]
    expected = f"<|im_start|>user\n{mark}\n{mark}\nWhich?<|im_end|>"
    for content in (texts, f"{mark}{mark}Which?", f"{mark}\n{mark}\nWhich?"):
        assert expected in rendered([{"role": "user", "content": content}])
    assert "a <b__>c" in rendered([{"role": "user", "content": "a <b__>c"}])


def test_the_modelfile_names_both_files_and_writes_our_prompt(tmp_path):
    written(loaded_model(), tmp_path)
    text = (tmp_path / MODELFILE).read_text(encoding="utf-8")
    assert [line for line in text.splitlines() if line.startswith("FROM")] == [
        "FROM ./model.gguf",
        "FROM ./mmproj.gguf",
    ]
    assert 'PARAMETER stop "<|im_end|>"' in text
    loop = text.split('TEMPLATE """')[1].split('"""')[0]
    head, body = loop.split("{{- range .Messages }}")
    body, tail = body.split("{{ end }}")
    talk = [{"role": "system", "content": "You are a helpful assistant"}, *TALKS[0]]
    texts = (
        body.replace("{{ .Role }}", message["role"]).replace("{{ .Content }}", message["content"]) for message in talk
    )
    assert head + "".join(texts) + tail == rendered(TALKS[0])
    assert "You are a helpful assistant" in text.split("SYSTEM")[1]


# --- mistakes ---------------------------------------------------------------------------------------------------------


def test_mistakes_are_reported(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match=r"--quantize 'q8' must be one of f32, .*did you mean 'q8_0'"):
        written(loaded_model(), tmp_path, "q8")
    loud = loaded_model()
    loud.model.model.layers[0].mlp.up_proj.weight.data[0, 0] = 1e6
    with pytest.raises(WeightsError, match=r"blk\.0\.ffn_up\.weight does not fit in f16"):
        written(loud, tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(MissingInput, match=r"pip install 'minimind-v\[gguf\]'"):
        written(loaded_model(), tmp_path)


def test_a_tokenizer_of_another_kind_is_refused(tmp_path):
    loaded = loaded_model()
    from tokenizers import pre_tokenizers

    loaded.tokenizer.backend.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(WeightsError, match="other token ids"):
        written(loaded, tmp_path)


def test_a_tower_that_llama_cpp_cannot_compute_is_refused(tmp_path):
    loaded = loaded_model()
    tower = loaded.model.vision_encoder.tower
    tower.config = replace(tower.config, hidden_act="relu")
    with pytest.raises(WeightsError, match="activation 'relu'"):
        written(loaded, tmp_path)


def test_files_of_others_and_halves_are_refused(tmp_path):
    written(loaded_model(), tmp_path)
    with pytest.raises(WeightsError, match="architecture 'clip', not a MiniMind model"):
        language.read_config(Reader(tmp_path / MMPROJ))
    whole = (tmp_path / MODEL).read_bytes()
    for name, data in (("half", whole[: len(whole) // 2]), ("head", whole[:100]), ("text", b"<html>"), ("empty", b"")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(WeightsError, match="truncated, damaged or not a GGUF file"):
            Reader(tmp_path / name)
    with pytest.raises(MissingInput):
        Reader(tmp_path / "none.gguf")
