"""The language model of minimind-3v as llama.cpp's `qwen3` and `qwen3moe`: read by other programs, and back."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader
from jinja2 import Environment
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from minimind_v.core.data.prompt import PromptEncoder
from minimind_v.core.data.tokenizer import Tokenizer
from minimind_v.core.errors import WeightsError
from minimind_v.core.formats.checkpoint import read_checkpoint
from minimind_v.core.formats.gguf import language
from minimind_v.core.formats.gguf import tokenizer as words
from minimind_v.core.formats.gguf.file import Reader
from minimind_v.core.formats.gguf.read import MMPROJ, MODEL, MODELFILE
from minimind_v.core.formats.gguf.write import write
from minimind_v.core.formats.load import load
from minimind_v.core.formats.request import ExportRequest
from minimind_v.core.model.vlm import VLM
from tests.formats.gguf.graphs import File, Words
from tests.formats.gguf.made import TEXTS, random_texts
from tests.formats.gguf.test_written import IDS
from tests.formats.made3v import DENSE, MOE, tiny_3v

PUBLISHED = Path(__file__).parents[4] / "shared" / "tokenizer-3v"
TALKS = (
    [{"role": "user", "content": "Who are you? <think> @"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a"},
     {"role": "assistant", "content": "<think>\nhm\n</think>\n\nb"}, {"role": "user", "content": "看\n图"}],
)  # fmt: skip


def loud_model(folder, config):
    """A loaded tiny model whose logits differ: a fresh model says nearly the same of everything."""
    loaded = load(*tiny_3v(folder, config), device="cpu")
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in loaded.model.model.parameters():
            parameter.mul_(8) if parameter.ndim > 1 else parameter.add_(torch.randn_like(parameter) / 5)
    return loaded


@pytest.fixture(scope="module", params=[DENSE, MOE], ids=["dense", "moe"])
def exported(request, tmp_path_factory):
    """The loaded source, and its folder in full precision."""
    folder = tmp_path_factory.mktemp("gguf")
    loaded = loud_model(folder / "parts", request.param)
    (folder / "export").mkdir()
    write(loaded, folder / "export", ExportRequest(loaded.checkpoint.path, quantize="f32"))
    return loaded, folder / "export"


def test_the_gguf_package_reads_the_names_of_llama_cpp(exported):
    loaded, folder = exported
    reader, arch = GGUFReader(folder / MODEL), "qwen3moe" if loaded.model.config.use_moe else "qwen3"
    keys = {name: field.contents() for name, field in reader.fields.items()}
    assert keys["general.architecture"] == arch
    assert (keys[f"{arch}.attention.key_length"], keys[f"{arch}.rope.dimension_count"]) == (12, 12)
    assert keys["tokenizer.ggml.pre"] == "gpt-2"
    shapes = {tensor.name: tensor.shape.tolist() for tensor in reader.tensors}
    assert shapes["blk.0.attn_q_norm.weight"] == shapes["blk.2.attn_k_norm.weight"] == [12]
    assert ("blk.0.ffn_gate_exps.weight" in shapes) == loaded.model.config.use_moe
    assert "output.weight" not in shapes, "the head is tied"
    assert not (folder / MMPROJ).exists()


@torch.no_grad()
def test_the_logits_are_those_that_transformers_computes_from_the_file(exported):
    loaded, folder = exported
    config = AutoConfig.from_pretrained(folder, gguf_file=MODEL)
    config.head_dim = loaded.model.config.head_dim  # transformers does not read these two keys
    config.moe_intermediate_size = loaded.model.config.intermediate_size
    theirs = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    stored = load_gguf_checkpoint(folder / MODEL, return_tensors=True, model_to_load=theirs)["tensors"]
    missing, unexpected = theirs.load_state_dict(stored, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], []), "the head is tied"
    assert type(theirs).__name__ == ("Qwen3MoeForCausalLM" if loaded.model.config.use_moe else "Qwen3ForCausalLM")
    prompt = PromptEncoder(loaded.tokenizer, 16).prompt(TALKS[1]).input_ids
    for ids in (IDS, prompt):
        ours, expected = loaded.model(torch.tensor([ids])).logits, theirs(torch.tensor([ids])).logits
        assert ours.abs().max() > 1
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)


def test_a_file_is_read_back_as_a_text_only_base(exported):
    loaded, folder = exported
    for path in (folder, folder / MODEL):
        base = read_checkpoint(path)
        assert (base.config, base.stage, base.projector) == (loaded.model.config, "lm", None)
        ours = loaded.model.state_dict()
        assert all(torch.equal(tensor, ours[name]) for name, tensor in base.tensors.items())
    assert {name for name in ours if name.startswith(("model.", "lm_head."))} == base.tensors.keys()
    with pytest.raises(WeightsError, match="the language model alone, which cannot encode images — use the model that"):
        load(folder)


def with_other(loaded, config, tokenizer):
    """A loaded model with the language model of another configuration, and another tokenizer."""
    encoder = loaded.model.vision_encoder
    model = VLM(config, loaded.config.vision, tokenizer.placeholder_id, encoder, loaded.config.projector)
    return replace(loaded, model=model, tokenizer=tokenizer)


@pytest.mark.parametrize(
    "settings", [{}, {"aux_loss_alpha": 0.2, "aux_loss_scope": "row", "num_experts_per_tok": 2, "rope_theta": 5e4}]
)
def test_all_settings_are_read_back(exported, tmp_path, settings):
    loaded, config = exported[0], replace(MOE, **settings)
    write(with_other(loaded, config, loaded.tokenizer), tmp_path, ExportRequest(tmp_path))
    assert language.read_config(Reader(tmp_path / MODEL)) == config


def test_a_model_with_shared_experts_is_refused():
    with pytest.raises(WeightsError, match="qwen3moe has no shared experts"):
        language.architecture(replace(MOE, n_shared_experts=1))


def test_the_token_ids_are_the_tokenizers(exported):
    loaded, folder = exported
    check_ids(loaded.tokenizer, folder / MODEL)


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the tokenizer of minimind-3v is not here")
def test_the_token_ids_are_those_of_the_published_tokenizer(exported, tmp_path):
    tokenizer = Tokenizer.load(PUBLISHED)
    write(with_other(exported[0], replace(DENSE, vocab_size=6400), tokenizer), tmp_path, ExportRequest(tmp_path))
    back = check_ids(tokenizer, tmp_path / MODEL)
    assert (back.token_id("<think>"), back.placeholder_id) == (25, 12)


def check_ids(tokenizer, path):
    """Compare the ids of many texts with those of llama.cpp's rules and of the tokenizer that is read back."""
    theirs, back = Words(File(path)), words.read_tokenizer(Reader(path))
    for text in (*TEXTS, "<think>\n</think> <|image_pad|>", *random_texts(1000)):
        ids = tokenizer.encode(text).ids
        assert theirs.encode(text) == ids, text
        assert back.encode(text).ids == ids, text
    assert (back.pad_id, back.bos_id, back.eos_id) == (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id)
    assert (back.placeholder_id, back.layout) == (tokenizer.placeholder_id, "chatml-think")
    assert back.backend.get_added_tokens_decoder().keys() == tokenizer.backend.get_added_tokens_decoder().keys()
    return back


@pytest.mark.parametrize("think", [False, True])
@pytest.mark.parametrize("talk", TALKS, ids=["question", "talk"])
def test_the_chat_template_writes_our_prompt(exported, talk, think):
    loaded, folder = exported
    template = File(folder / MODEL).keys["tokenizer.chat_template"]
    environment = Environment(trim_blocks=True, lstrip_blocks=True)
    parts = [turn | {"content": [{"type": "text", "text": turn["content"]}]} for turn in talk]
    ours = loaded.tokenizer.backend.decode(
        PromptEncoder(loaded.tokenizer, 16).prompt(talk, think).input_ids, skip_special_tokens=False
    )
    for messages in (talk, parts):
        text = environment.from_string(template).render(
            messages=messages, add_generation_prompt=True, open_thinking=think
        )
        assert text == ours


def test_the_modelfile_names_the_file_and_writes_our_prompt(exported):
    loaded, folder = exported
    text = (folder / MODELFILE).read_text(encoding="utf-8")
    assert [line for line in text.splitlines() if line.startswith(("FROM", "SYSTEM"))] == ["FROM ./model.gguf"]
    loop = text.split('TEMPLATE """')[1].split('"""')[0]
    body, tail = re.fullmatch(r"{{- range .Messages }}(.*){{ end }}(.*)", loop, re.DOTALL).groups()
    block = r'{{ if eq .Role "assistant" }}(.*){{ end }}'
    talk = [*TALKS[0], {"role": "assistant", "content": "A model."}, {"role": "user", "content": "Of whom?"}]
    texts = (
        re.sub(block, r"\1" if message["role"] == "assistant" else "", body, flags=re.DOTALL)
        .replace("{{ .Role }}", message["role"])
        .replace("{{ .Content }}", message["content"])
        for message in talk
    )
    ids = PromptEncoder(loaded.tokenizer, 16).prompt(talk).input_ids
    assert "".join(texts) + tail == loaded.tokenizer.backend.decode(ids, skip_special_tokens=False)
