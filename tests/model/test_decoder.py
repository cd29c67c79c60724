"""The dense language model is transformers' Llama, number for number."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

# hidden, layers, heads, kv heads, intermediate, vocabulary, rope theta
SHAPES = {
    "a head of its own for every query": (32, 2, 4, 4, 64, 97, 1e6),
    "two queries to a head": (48, 3, 6, 3, 40, 64, 1e6),
    "four queries to a head": (64, 1, 8, 2, 96, 50, 1e4),
    "one head for all": (40, 2, 10, 1, 72, 33, 1e6),
    "a single query head": (16, 2, 1, 1, 24, 40, 1e2),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@torch.no_grad()
def test_logits_are_those_of_llama(shape, make_vlm):
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    sizes = dict(zip((*names, "vocab_size", "rope_theta"), shape, strict=True)) | {"rms_norm_eps": 1e-3}
    ours = make_vlm(seed=sum(map(ord, str(shape))), **sizes)
    config = LlamaConfig(**sizes, max_position_embeddings=512, tie_word_embeddings=True)
    config.rope_parameters = {"rope_type": "default", "rope_theta": sizes["rope_theta"]}
    llama = LlamaForCausalLM(config).eval()
    weights = {name: tensor for name, tensor in ours.state_dict().items() if not name.startswith("vision_proj.")}
    llama.load_state_dict(weights)  # strict: the names are the same too

    input_ids = torch.randint(0, ours.config.vocab_size, (3, 130))
    lengths = torch.tensor([130, 77, 1])
    mask = torch.arange(130) < lengths[:, None]  # [B, T]
    expected = llama(input_ids, attention_mask=mask.long()).logits  # [B, T, V]
    assert expected.std() > 0.3, "the comparison would be empty"
    assert (ours(input_ids[:1]).logits - expected[:1]).abs().max() < 1e-5
    padded = ours(input_ids, attention_mask=mask).logits  # right padding is not seen by the tokens before it
    assert (padded - expected)[mask].abs().max() < 1e-5


@torch.no_grad()
def test_logits_to_keep_are_the_last(make_vlm):
    model, input_ids = make_vlm(), torch.randint(0, 61, (2, 9))
    torch.testing.assert_close(model(input_ids, logits_to_keep=3).logits, model(input_ids).logits[:, -3:])


def test_head_and_embedding_are_one_tensor(make_vlm):
    model = make_vlm()
    assert model.lm_head.weight is model.model.embed_tokens.weight
