"""The language model: a pre-norm decoder with rotary positions and grouped-query attention.

State-dict keys and arithmetic are those of the published MiniMind weights; a dense model equals
transformers' LlamaForCausalLM with the same tensors.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimind_v.core.config.schema import TextConfig
from minimind_v.core.model.moe import FeedForward, MoEFeedForward


class KVCache:
    """Keys and values of every layer, allocated once: [L, B, KV, max_length, head_dim].

    `lengths` counts the tokens that each row really has. The next token of a row is written right behind them,
    so right-padded prompts of different lengths can be continued together.
    """

    def __init__(
        self, config: TextConfig, batch: int, max_length: int, device: torch.device | str, dtype: torch.dtype
    ) -> None:
        shape = (config.num_hidden_layers, batch, config.num_key_value_heads, max_length, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = torch.zeros(batch, dtype=torch.long, device=device)
        self.used = 0  # the longest row, on the host: slicing by it costs no device synchronisation

    @property
    def max_length(self) -> int:
        return self.keys.shape[3]

    def rewind(self, length: int) -> None:
        """Forget all tokens from `length` on. For caches whose rows are equally long."""
        self.used = length
        self.lengths.fill_(length)

    def write(self, layer: int, positions: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store [B, KV, T, hd] at positions [B, T]; returns all that is used so far, [B, KV, S, hd]."""
        rows = torch.arange(keys.shape[0], device=keys.device)[:, None]  # [B, 1]
        self.keys[layer][rows, :, positions] = keys.transpose(1, 2).to(self.keys.dtype)
        self.values[layer][rows, :, positions] = values.transpose(1, 2).to(self.values.dtype)
        return self.keys[layer, :, :, : self.used], self.values[layer, :, :, : self.used]


class RMSNorm(nn.Module):
    """Root-mean-square norm (Zhang & Sennrich, 2019), computed in fp32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), (x.shape[-1],), self.weight.float(), self.eps).to(x.dtype)


class Rotary(nn.Module):
    """Rotary position embedding in the half-rotation form: cat(-x2, x1) (Su et al., 2021; Llama, NeoX)."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        exponent = torch.arange(0, config.head_dim, 2).float() / config.head_dim
        self.inv_freq: Tensor
        self.register_buffer("inv_freq", 1.0 / config.rope_theta**exponent, persistent=False)

    def forward(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """position_ids [B, T] → cos, sin [B, 1, T, hd]."""
        angles = position_ids[:, None, :, None].float() * self.inv_freq.float()  # [B, 1, T, hd/2]
        angles = torch.cat((angles, angles), dim=-1)  # [B, 1, T, hd]
        return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn [B, heads, T, hd] by its positions' angles [B, 1, T, hd]."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention, several query heads to one key-value head (Ainslie et al., 2023)."""

    def __init__(self, config: TextConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        width = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, place: Place) -> Tensor:
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [B, heads, T, hd]
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, place.cos, place.sin), rotate(k, place.cos, place.sin)
        if place.cache is not None:
            keys, values = place.cache.write(self.layer, place.position_ids, k, v)
            if place.mask is not None:  # an empty cache is attended to like no cache
                k, v = keys.to(q.dtype), values.to(q.dtype)  # [B, KV, S, hd]
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=place.mask, is_causal=place.mask is None, enable_gqa=True
        )  # [B, heads, T, hd]
        return self.o_proj(out.transpose(1, 2).flatten(2))  # [B, T, D]


class Place:
    """Where the tokens of one forward pass stand, worked out once for all layers.

    A right-padded batch without a past needs no mask: causality already keeps real tokens from the padding behind them.
    """

    def __init__(self, rotary: Rotary, x: Tensor, attention_mask: Tensor | None, cache: KVCache | None) -> None:
        batch, time = x.shape[:2]
        self.cache = cache
        self.mask: Tensor | None = None
        past = torch.zeros(batch, dtype=torch.long, device=x.device) if cache is None else cache.lengths.clone()
        self.position_ids = past[:, None] + torch.arange(time, device=x.device)  # [B, T]
        if cache is not None:
            empty = cache.used == 0
            if cache.used + time > cache.max_length:
                raise ValueError(f"the KV cache holds {cache.max_length} tokens, {cache.used + time} are needed")
            cache.used += time
            cache.lengths += time if attention_mask is None else attention_mask.sum(dim=1)
            if not empty:
                slots = torch.arange(cache.used, device=x.device)
                self.mask = slots <= self.position_ids[:, None, :, None]  # [B, 1, T, S]
        self.cos, self.sin = rotary(self.position_ids)


class Block(nn.Module):
    """x + attn(rms(x)), then x + mlp(rms(x))."""

    def __init__(self, config: TextConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp: nn.Module = MoEFeedForward(config) if config.use_moe else FeedForward(config)

    def forward(self, x: Tensor, place: Place, attention_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """x [B, T, D] → x [B, T, D] and the auxiliary loss, if the block has one."""
        x = x + self.self_attn(self.input_layernorm(x), place)
        normed = self.post_attention_layernorm(x)
        if isinstance(self.mlp, MoEFeedForward):
            y, aux = self.mlp(normed, attention_mask)
            return x + y, aux
        return x + self.mlp(normed), None


class Decoder(nn.Module):
    """Embedding, blocks and final norm: ids or embeddings in, hidden states out."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, n) for n in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = Rotary(config)

    def forward(
        self, x: Tensor, attention_mask: Tensor | None = None, cache: KVCache | None = None
    ) -> tuple[Tensor, Tensor]:
        """Embeddings x [B, T, D] → hidden states [B, T, D] and the summed auxiliary loss (0 without experts)."""
        place = Place(self.rotary, x, attention_mask, cache)
        aux = x.new_zeros((), dtype=torch.float32)
        for layer in self.layers:
            x, layer_aux = layer(x, place, attention_mask)
            if layer_aux is not None:
                aux = aux + layer_aux
        return self.norm(x), aux
