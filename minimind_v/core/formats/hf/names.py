"""Tensor names of a model: the published ones and those of transformers' LLaVA.

| published                                  | LLaVA                                              |
|--------------------------------------------|----------------------------------------------------|
| `model.embed_tokens.weight`                | `model.language_model.embed_tokens.weight`, with a |
|                                            | row of zeros for the image token                   |
| `model.layers.N.…`, `model.norm.weight`    | `model.language_model.…`                           |
| `lm_head.weight` (tied)                    | not stored: tied                                   |
| `vision_proj.vision_proj.0.{weight,bias}`  | `model.multi_modal_projector.linear_1.…`, before a |
|                                            | `linear_2` that is the identity                    |
| `vision_encoder.*` (never stored)          | `model.vision_tower.*`                             |

A mixture of experts becomes GraniteMoeShared, below `model.language_model.layers.N.`:

| published, below `model.layers.N.mlp.`     | GraniteMoeShared                                   |
|--------------------------------------------|----------------------------------------------------|
| `gate.weight`                              | `block_sparse_moe.router.weight`                   |
| `experts.E.{gate,up}_proj.weight`          | `block_sparse_moe.experts.gate_up_proj[E]`, gate   |
|                                            | above up                                           |
| `experts.E.down_proj.weight`               | `block_sparse_moe.experts.down_proj[E]`            |
| `shared_experts.S.{gate,up}_proj.weight`   | `shared_mlp.input_linear.weight`, all gates above  |
|                                            | all ups                                            |
| `shared_experts.S.down_proj.weight`        | `shared_mlp.output_linear.weight`, side by side    |
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from minimind_v.core.config.schema import TextConfig

TEXT = "model.language_model."
TOWER = "model.vision_tower."
PROJECTOR = "model.multi_modal_projector."
OUR_PROJECTOR = "vision_proj.vision_proj.0."
EMBEDDING = "embed_tokens.weight"
HEAD = "lm_head.weight"

# transformers saves older names than those of its modules, and reads both.
_OLDER = (
    (re.compile(r"^language_model\.lm_head\."), "lm_head."),
    (re.compile(r"^language_model\.(model\.)?"), TEXT),
    (re.compile(r"^vision_tower\."), TOWER),
    (re.compile(r"^model\.vision_tower\.vision_model\."), TOWER),
    (re.compile(r"^multi_modal_projector\."), PROJECTOR),
    (re.compile(r"\.block_sparse_moe\.router\.layer\.weight$"), ".block_sparse_moe.router.weight"),
    (re.compile(r"\.block_sparse_moe\.input_linear\.weight$"), ".block_sparse_moe.experts.gate_up_proj"),
    (re.compile(r"\.block_sparse_moe\.output_linear\.weight$"), ".block_sparse_moe.experts.down_proj"),
)


def module_name(name: str) -> str:
    """The name of a tensor in transformers' module, from any name that it was saved under."""
    for pattern, new in _OLDER:
        name = pattern.sub(new, name)
    return name


def published_shapes(config: TextConfig) -> dict[str, torch.Size]:
    """Every tensor of a published checkpoint of these sizes, without the projector's."""
    wide, narrow, inner = config.hidden_size, config.num_key_value_heads * config.head_dim, config.intermediate_size
    all_heads = config.num_attention_heads * config.head_dim
    layer = {"input_layernorm": (wide,), "post_attention_layernorm": (wide,), "self_attn.q_proj": (all_heads, wide),
             "self_attn.k_proj": (narrow, wide), "self_attn.v_proj": (narrow, wide),
             "self_attn.o_proj": (wide, all_heads)}  # fmt: skip
    if config.qk_norm:
        layer |= {"self_attn.q_norm": (config.head_dim,), "self_attn.k_norm": (config.head_dim,)}
    forward = {"gate_proj": (inner, wide), "up_proj": (inner, wide), "down_proj": (wide, inner)}
    blocks = ["mlp."]
    if config.use_moe:
        layer["mlp.gate"] = (config.n_routed_experts, wide)
        blocks = [f"mlp.experts.{number}." for number in range(config.n_routed_experts)]
        blocks += [f"mlp.shared_experts.{number}." for number in range(config.n_shared_experts)]
    layer |= {block + name: shape for block in blocks for name, shape in forward.items()}
    layers = range(config.num_hidden_layers)
    shapes = {f"model.layers.{n}.{name}": shape for n in layers for name, shape in layer.items()}
    embedding = (config.vocab_size, wide)
    shapes |= {"model.embed_tokens": embedding, "model.norm": (wide,), "lm_head": embedding}
    return {f"{name}.weight": torch.Size(shape) for name, shape in shapes.items()}


def to_llava(tensors: Mapping[str, Tensor], config: TextConfig) -> dict[str, Tensor]:
    """Published tensors → the text model and the projector of a LLaVA, in their own types."""
    named = {name: tensor for name, tensor in tensors.items() if name != HEAD}
    embedding = named.pop(f"model.{EMBEDDING}")  # [V, D]
    weight, bias = (named.pop(OUR_PROJECTOR + kind) for kind in ("weight", "bias"))
    llava = {
        TEXT + EMBEDDING: torch.cat((embedding, embedding.new_zeros(1, embedding.shape[1]))),  # [V + 1, D]
        f"{PROJECTOR}linear_1.weight": weight,
        f"{PROJECTOR}linear_1.bias": bias,
        f"{PROJECTOR}linear_2.weight": torch.eye(config.hidden_size, dtype=weight.dtype),
        f"{PROJECTOR}linear_2.bias": torch.zeros(config.hidden_size, dtype=weight.dtype),
    }
    if config.use_moe:
        for layer in range(config.num_hidden_layers):
            llava |= _stack_experts(named, layer, config)
    return llava | {TEXT + name.removeprefix("model."): tensor for name, tensor in named.items()}


def from_llava(tensors: Mapping[str, Tensor], config: TextConfig) -> dict[str, Tensor]:
    """A LLaVA's text model and projector → published tensors.

    Rows of the embedding after the vocabulary (the image token's) are dropped; a trained second layer of the projector
    is multiplied into the first. Raises KeyError for a missing tensor, ValueError for another shape.
    """
    named = {name: tensor for name, tensor in tensors.items() if name.startswith(TEXT)}
    if TEXT + EMBEDDING not in named:  # tied: saved under the other name
        named[TEXT + EMBEDDING] = tensors[HEAD]
    embedding = named.pop(TEXT + EMBEDDING)[: config.vocab_size]  # [V, D]
    if not torch.equal(embedding, tensors.get(HEAD, embedding)[: config.vocab_size]):
        raise ValueError(f"{HEAD} and {TEXT}{EMBEDDING} differ, but they must be equal")
    published = {f"model.{EMBEDDING}": embedding, HEAD: embedding}
    if config.use_moe:
        for layer in range(config.num_hidden_layers):
            published |= _unstack_experts(named, layer, config)
    published |= {f"model.{name.removeprefix(TEXT)}": tensor for name, tensor in named.items()}
    return published | _fold_projector(tensors, config.hidden_size)


def _fold_projector(tensors: Mapping[str, Tensor], width: int) -> dict[str, Tensor]:
    """Two linear layers with nothing between them are one."""
    first, bias, second, shift = (
        tensors[f"{PROJECTOR}{name}"]
        for name in ("linear_1.weight", "linear_1.bias", "linear_2.weight", "linear_2.bias")
    )
    if second.shape != (width, width):
        raise ValueError(f"{PROJECTOR}linear_2.weight is {list(second.shape)}")
    if shift.any() or not torch.equal(second, torch.eye(len(second), dtype=second.dtype)):
        exact = second.double()
        bias = (exact @ bias.double() + shift.double()).to(bias.dtype)
        first = (exact @ first.double()).to(first.dtype)
    return {f"{OUR_PROJECTOR}weight": first, f"{OUR_PROJECTOR}bias": bias}


def _stack_experts(named: dict[str, Tensor], layer: int, config: TextConfig) -> dict[str, Tensor]:
    """Remove the experts of a layer from `named` and return them as GraniteMoeShared has them."""
    ours, theirs = f"model.layers.{layer}.mlp.", f"{TEXT}layers.{layer}."

    def take(kind: str, count: int, matrix: str) -> list[Tensor]:
        return [named.pop(f"{ours}{kind}.{number}.{matrix}_proj.weight") for number in range(count)]

    gate, up, down = (take("experts", config.n_routed_experts, matrix) for matrix in ("gate", "up", "down"))
    stacked = {
        f"{theirs}block_sparse_moe.router.weight": named.pop(f"{ours}gate.weight"),
        f"{theirs}block_sparse_moe.experts.gate_up_proj": torch.stack(
            [torch.cat(pair) for pair in zip(gate, up, strict=True)]
        ),  # [E, 2I, D]
        f"{theirs}block_sparse_moe.experts.down_proj": torch.stack(down),  # [E, D, I]
    }
    if config.n_shared_experts:
        gate, up, down = (take("shared_experts", config.n_shared_experts, matrix) for matrix in ("gate", "up", "down"))
        stacked[f"{theirs}shared_mlp.input_linear.weight"] = torch.cat((*gate, *up))  # [2SI, D]
        stacked[f"{theirs}shared_mlp.output_linear.weight"] = torch.cat(down, dim=1)  # [D, SI]
    return stacked


def _unstack_experts(named: dict[str, Tensor], layer: int, config: TextConfig) -> dict[str, Tensor]:
    """Remove the experts of a layer from `named` and return them under their published names."""
    ours, theirs = f"model.layers.{layer}.mlp.", f"{TEXT}layers.{layer}."
    published = {f"{ours}gate.weight": named.pop(f"{theirs}block_sparse_moe.router.weight")}

    def give(kind: str, matrix: str, each: Sequence[Tensor] | Tensor) -> None:
        if len(each) != (config.n_routed_experts if kind == "experts" else config.n_shared_experts):
            raise ValueError(f"layer {layer} has {len(each)} {kind}")
        for n, tensor in enumerate(each):
            published[f"{ours}{kind}.{n}.{matrix}_proj.weight"] = tensor.contiguous()

    gate, up = named.pop(f"{theirs}block_sparse_moe.experts.gate_up_proj").chunk(2, dim=1)  # [E, I, D]
    give("experts", "gate", gate)
    give("experts", "up", up)
    give("experts", "down", named.pop(f"{theirs}block_sparse_moe.experts.down_proj"))
    if count := config.n_shared_experts:
        gate, up = named.pop(f"{theirs}shared_mlp.input_linear.weight").chunk(2)  # [SI, D]
        give("shared_experts", "gate", gate.chunk(count))
        give("shared_experts", "up", up.chunk(count))
        give("shared_experts", "down", named.pop(f"{theirs}shared_mlp.output_linear.weight").chunk(count, dim=1))
    return published
