"""Write and read the language model as GGUF: llama.cpp's tensor names, row order and keys.

A dense model of 2025 is llama.cpp's `llama`. A mixture of experts is its `granitemoe`, whose block computes the same
(softmax, the k best, renormalised, plus an ungated shared expert) with all its multipliers 1. A model whose heads have
norms is its `qwen3` or `qwen3moe`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from minimind_v.core.config.presets import PRESETS
from minimind_v.core.config.schema import TextConfig
from minimind_v.core.errors import UsageError, WeightsError
from minimind_v.core.formats.gguf.file import OURS, Reader, Writer

# llama.cpp's architectures, and the preset that each one holds. It has all settings that a file does not contain.
ARCHITECTURES = {"llama": "small", "granitemoe": "moe", "qwen3": "3v", "qwen3moe": "3v-moe"}
# Only training needs these: they are stored where they are not those of the preset, and llama.cpp ignores them.
_OF_TRAINING = ("aux_loss_alpha", "aux_loss_scope")
_MATRICES = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
             "attn_output": "self_attn.o_proj"}  # fmt: skip
# Without norms of heads, llama.cpp rotates neighbours of a head together, not component i and i + half: `interleave`
# makes them neighbours.
_TURNED = ("attn_q", "attn_k")
_NARROW = ("attn_k", "attn_v")  # as wide as the key-value heads
_FORWARD = ("gate", "up", "down")


def architecture(config: TextConfig) -> str:
    """llama.cpp's name for a model of these sizes. Raises WeightsError where it has none."""
    if config.use_moe and config.qk_norm and config.n_shared_experts:
        raise WeightsError("llama.cpp's qwen3moe has no shared experts — convert to safetensors or pth")
    kinds = ((name, PRESETS[preset]) for name, preset in ARCHITECTURES.items())
    return next(name for name, kind in kinds if (kind.use_moe, kind.qk_norm) == (config.use_moe, config.qk_norm))


def _norms(config: TextConfig) -> Iterator[tuple[str, str, int]]:
    """The norms of a layer: llama.cpp's name, ours, and the width."""
    yield "attn_norm", "input_layernorm", config.hidden_size
    yield "ffn_norm", "post_attention_layernorm", config.hidden_size
    if config.qk_norm:
        yield "attn_q_norm", "self_attn.q_norm", config.head_dim
        yield "attn_k_norm", "self_attn.k_norm", config.head_dim


def write_keys(writer: Writer, config: TextConfig) -> None:
    """Write the sizes that llama.cpp needs."""
    file, arch = writer.file, architecture(config)
    file.add_vocab_size(config.vocab_size)
    file.add_context_length(config.max_position_embeddings)
    file.add_embedding_length(config.hidden_size)
    file.add_block_count(config.num_hidden_layers)
    file.add_feed_forward_length(config.intermediate_size)
    file.add_head_count(config.num_attention_heads)
    file.add_head_count_kv(config.num_key_value_heads)
    file.add_key_length(config.head_dim)
    file.add_value_length(config.head_dim)
    file.add_rope_dimension_count(config.head_dim)
    file.add_rope_freq_base(config.rope_theta)
    file.add_layer_norm_rms_eps(config.rms_norm_eps)
    if config.use_moe:
        file.add_expert_count(config.n_routed_experts)
        file.add_expert_used_count(config.num_experts_per_tok)
    if arch == "qwen3moe":
        file.add_expert_feed_forward_length(config.intermediate_size)
    if arch == "granitemoe":
        if config.n_shared_experts:
            file.add_expert_shared_feed_forward_length(config.n_shared_experts * config.intermediate_size)
        file.add_attention_scale(config.head_dim**-0.5)
        for add_scale in (file.add_embedding_scale, file.add_residual_scale, file.add_logit_scale):
            add_scale(1.0)
    for name in _OF_TRAINING:
        if (value := getattr(config, name)) != getattr(PRESETS[ARCHITECTURES[arch]], name):
            (file.add_string if isinstance(value, str) else file.add_float32)(f"{OURS}{name}", value)


def write_tensors(writer: Writer, config: TextConfig, tensors: dict[str, Tensor]) -> None:
    """Write the tensors, given under the published names. The head is tied, so it is not written."""
    writer.embedding("token_embd.weight", tensors["model.embed_tokens.weight"])
    writer.exact("output_norm.weight", tensors["model.norm.weight"])
    for layer in range(config.num_hidden_layers):
        ours, theirs = f"model.layers.{layer}.", f"blk.{layer}."
        for name, published, _ in _norms(config):
            writer.exact(f"{theirs}{name}.weight", tensors[f"{ours}{published}.weight"])
        for name, published in _MATRICES.items():
            weight = tensors[f"{ours}{published}.weight"]
            turned = name in _TURNED and not config.qk_norm
            writer.matrix(f"{theirs}{name}.weight", interleave(weight, config.head_dim) if turned else weight)
        _write_forward(writer, config, tensors, ours + "mlp.", theirs)


def _write_forward(writer: Writer, config: TextConfig, tensors: dict[str, Tensor], ours: str, theirs: str) -> None:
    if not config.use_moe:
        for kind in _FORWARD:
            writer.matrix(f"{theirs}ffn_{kind}.weight", tensors[f"{ours}{kind}_proj.weight"])
        return
    writer.exact(f"{theirs}ffn_gate_inp.weight", tensors[f"{ours}gate.weight"])
    for kind in _FORWARD:
        experts = [tensors[f"{ours}experts.{n}.{kind}_proj.weight"] for n in range(config.n_routed_experts)]
        writer.matrix(f"{theirs}ffn_{kind}_exps.weight", torch.stack(experts))  # [E, out, in]
        if config.n_shared_experts:
            # Several shared experts are one, as wide as all of them: their outputs are only added.
            experts = [tensors[f"{ours}shared_experts.{n}.{kind}_proj.weight"] for n in range(config.n_shared_experts)]
            writer.matrix(f"{theirs}ffn_{kind}_shexp.weight", torch.cat(experts, dim=1 if kind == "down" else 0))


def read_config(reader: Reader) -> TextConfig:
    """Read the sizes. Raises WeightsError where the file is that of another kind of model."""
    arch = reader.key("general.architecture")
    if arch not in ARCHITECTURES:
        raise WeightsError(f"{reader.path}: a llama.cpp model of architecture {arch!r}, not a MiniMind model")
    if (scaling := reader.keys.get(f"{arch}.rope.scaling.type", "none")) != "none":
        raise WeightsError(f"{reader.path}: scales its rotary positions ({scaling}), which mmv does not compute")
    preset = PRESETS[ARCHITECTURES[arch]]

    def size(name: str) -> int:
        return int(reader.number(f"{arch}.{name}"))

    stored = {name: reader.keys[f"{OURS}{name}"] for name in _OF_TRAINING if f"{OURS}{name}" in reader.keys}
    settings: dict[str, Any] = {
        name: _decimal(value) if isinstance(value, float) else value for name, value in stored.items()
    }
    if preset.use_moe:
        settings |= {"n_routed_experts": size("expert_count"), "num_experts_per_tok": size("expert_used_count")}
    if arch == "granitemoe":
        shared_width = "expert_shared_feed_forward_length"
        shared_inner = size(shared_width) if f"{arch}.{shared_width}" in reader.keys else 0
        settings["n_shared_experts"] = shared_inner // max(size("feed_forward_length"), 1)
    try:
        return replace(
            preset,
            hidden_size=size("embedding_length"),
            num_hidden_layers=size("block_count"),
            num_attention_heads=size("attention.head_count"),
            num_key_value_heads=size("attention.head_count_kv"),
            intermediate_size=size("feed_forward_length"),
            vocab_size=size("vocab_size"),
            rms_norm_eps=_decimal(reader.number(f"{arch}.attention.layer_norm_rms_epsilon", float)),
            rope_theta=_decimal(reader.number(f"{arch}.rope.freq_base", float)),
            max_position_embeddings=size("context_length"),
            **settings,
        )
    except UsageError as error:
        raise WeightsError(f"{reader.path}: its sizes do not make a model ({error}) — convert again") from None


def _decimal(number: float) -> float:
    """A float32 as the shortest decimal: 1e-5, not 9.999999747378752e-06."""
    return float(f"{number:.7g}")


def read_tensors(reader: Reader, config: TextConfig) -> dict[str, Tensor]:
    """Read the tensors under the published names, the tied head included."""
    if "output.weight" in reader.entries:
        raise WeightsError(
            f"{reader.path}: has a separate head (output.weight), but the head must be tied to the embedding"
        )
    wide, narrow = config.hidden_size, config.num_key_value_heads * config.head_dim
    embedding = reader.tensor("token_embd.weight", config.vocab_size, wide)
    tensors = {"model.embed_tokens.weight": embedding, "lm_head.weight": embedding}
    tensors["model.norm.weight"] = reader.tensor("output_norm.weight", wide)
    for layer in range(config.num_hidden_layers):
        ours, theirs = f"model.layers.{layer}.", f"blk.{layer}."
        for name, published, width in _norms(config):
            tensors[f"{ours}{published}.weight"] = reader.tensor(f"{theirs}{name}.weight", width)
        for name, published in _MATRICES.items():
            weight = reader.tensor(f"{theirs}{name}.weight", narrow if name in _NARROW else wide, wide)
            turned = name in _TURNED and not config.qk_norm
            tensors[f"{ours}{published}.weight"] = separate(weight, config.head_dim) if turned else weight
        _read_forward(reader, config, tensors, ours + "mlp.", theirs)
    return tensors


def _read_forward(reader: Reader, config: TextConfig, tensors: dict[str, Tensor], ours: str, theirs: str) -> None:
    wide, inner, count = config.hidden_size, config.intermediate_size, config.n_shared_experts
    if not config.use_moe:
        for kind in _FORWARD:
            shape = (wide, inner) if kind == "down" else (inner, wide)
            tensors[f"{ours}{kind}_proj.weight"] = reader.tensor(f"{theirs}ffn_{kind}.weight", *shape)
        return
    tensors[f"{ours}gate.weight"] = reader.tensor(f"{theirs}ffn_gate_inp.weight", config.n_routed_experts, wide)
    for kind in _FORWARD:
        shape = (wide, inner) if kind == "down" else (inner, wide)
        for n, expert in enumerate(reader.tensor(f"{theirs}ffn_{kind}_exps.weight", config.n_routed_experts, *shape)):
            tensors[f"{ours}experts.{n}.{kind}_proj.weight"] = expert
        if count:
            shape, dim = ((wide, count * inner), 1) if kind == "down" else ((count * inner, wide), 0)
            for n, expert in enumerate(reader.tensor(f"{theirs}ffn_{kind}_shexp.weight", *shape).chunk(count, dim)):
                tensors[f"{ours}shared_experts.{n}.{kind}_proj.weight"] = expert


def interleave(weight: Tensor, head_dim: int) -> Tensor:
    """Reorder rows of [heads · hd, D]: alternate the two halves of each head, which rotate together."""
    return weight.view(-1, 2, head_dim // 2, weight.shape[-1]).transpose(1, 2).reshape(weight.shape)


def separate(weight: Tensor, head_dim: int) -> Tensor:
    """The inverse of `interleave`."""
    return weight.view(-1, head_dim // 2, 2, weight.shape[-1]).transpose(1, 2).reshape(weight.shape)
