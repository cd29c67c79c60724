"""The dense language model is transformers' Llama, with normed heads Qwen3 and with experts then Qwen3-MoE."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from tests.model.conftest import NORMED, NORMED_EXPERTS

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


def qwen3_of(model):
    """transformers' class with the tensors of a model with normed heads."""
    ours = model.config
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
             "intermediate_size", "vocab_size", "rms_norm_eps")  # fmt: skip
    sizes = {name: getattr(ours, name) for name in names} | {"tie_word_embeddings": True}
    sizes["rope_parameters"] = {"rope_type": "default", "rope_theta": ours.rope_theta}
    weights = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("vision_proj.")}
    if not ours.use_moe:
        qwen = Qwen3ForCausalLM(Qwen3Config(**sizes))
        qwen.load_state_dict(weights)  # strict: the names are the same too
        return qwen.eval()
    experts = {"num_experts": ours.n_routed_experts, "num_experts_per_tok": 1, "norm_topk_prob": True}
    experts |= {"moe_intermediate_size": ours.intermediate_size, "decoder_sparse_step": 1}
    for layer in range(ours.num_hidden_layers):
        mlp = f"model.layers.{layer}.mlp.experts"
        gate, up, down = (
            torch.stack([weights.pop(f"{mlp}.{number}.{kind}_proj.weight") for number in range(ours.n_routed_experts)])
            for kind in ("gate", "up", "down")
        )
        weights |= {f"{mlp}.gate_up_proj": torch.cat((gate, up), dim=1), f"{mlp}.down_proj": down}
    qwen = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **experts))
    qwen.load_state_dict(weights)
    return qwen.eval()


@pytest.mark.parametrize("heads", [(4, 4), (6, 3), (4, 1)])
@pytest.mark.parametrize("kind", [NORMED, NORMED_EXPERTS], ids=["dense", "experts"])
@torch.no_grad()
def test_logits_of_normed_heads_are_those_of_qwen3(kind, heads, make_vlm):
    sizes = {"hidden_size": 48, "num_attention_heads": heads[0], "num_key_value_heads": heads[1]}
    ours = make_vlm(seed=sum(heads), rms_norm_eps=1e-3, **sizes, **kind)
    input_ids = torch.randint(0, ours.config.vocab_size, (2, 70))
    expected = qwen3_of(ours)(input_ids).logits  # [B, T, V]
    assert expected.std() > 0.3, "the comparison would be empty"
    assert (ours(input_ids).logits - expected).abs().max() < 1e-5


def test_gradients_of_normed_heads_are_those_of_qwen3(make_vlm):
    ours = make_vlm(seed=3, **NORMED).train()
    qwen, input_ids = qwen3_of(ours).train(), torch.randint(0, ours.config.vocab_size, (2, 40))
    ours(input_ids, labels=input_ids).loss.backward()
    qwen(input_ids, labels=input_ids).loss.backward()
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters()}
    for name, parameter in qwen.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-5, rtol=1e-4, msg=name)


@torch.no_grad()
def test_logits_to_keep_are_the_last(make_vlm):
    model, input_ids = make_vlm(), torch.randint(0, 61, (2, 9))
    torch.testing.assert_close(model(input_ids, logits_to_keep=3).logits, model(input_ids).logits[:, -3:])


def test_head_and_embedding_are_one_tensor(make_vlm):
    model = make_vlm()
    assert model.lm_head.weight is model.model.embed_tokens.weight
