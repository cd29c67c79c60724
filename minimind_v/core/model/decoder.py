"""The language model: a pre-norm decoder with rotary positions and grouped-query attention.

State-dict keys and arithmetic are those of the published MiniMind weights. With the same tensors a dense model equals
transformers' LlamaForCausalLM; with `qk_norm` it equals Qwen3ForCausalLM, with experts then Qwen3MoeForCausalLM.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minimind_v.core.config.schema import TextConfig
from minimind_v.core.model import ops
from minimind_v.core.model.feed_forward import FeedForward
from minimind_v.core.model.kv_cache import KVCache
from minimind_v.core.model.moe import MoEFeedForward


@dataclass
class AttentionContext:
    """The inputs that all layers of a forward pass share.

    A right-padded batch needs no mask: causality already keeps real tokens from the padding behind them.
    """

    cos: Tensor  # [B or 1, 1, T, hd], of each position's angles
    sin: Tensor
    mask: Tensor | None = None  # [B or 1, 1, T, S], true where a query may attend; None: causal
    cache: KVCache | None = None
    attention_mask: Tensor | None = None  # [B, T], 1 for tokens, 0 for padding; None: no padding


class RMSNorm(nn.Module):
    """Root-mean-square norm (Zhang & Sennrich, 2019), computed in fp32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] → [..., D]."""
        return ops.rms_norm(x, self.weight, self.eps)


class Rotary(nn.Module):
    """The angles of rotary position embedding (Su et al., 2021)."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        exponent = torch.arange(0, config.head_dim, 2).float() / config.head_dim
        self.inv_freq: Tensor
        self.register_buffer("inv_freq", 1.0 / config.rope_theta**exponent, persistent=False)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Positions [B, T] → cosines and sines [B, 1, T, hd], the same for both halves of a head."""
        angles = positions[:, None, :, None].float() * self.inv_freq.float()  # [B, 1, T, hd/2]
        angles = torch.cat((angles, angles), dim=-1)  # [B, 1, T, hd]
        return angles.cos(), angles.sin()


class Attention(nn.Module):
    """Causal self-attention, several query heads to one key-value head (Ainslie et al., 2023)."""

    attend = staticmethod(ops.attention)

    def __init__(self, config: TextConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        width = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.q_norm: nn.Module = RMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm: nn.Module = RMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor, context: AttentionContext) -> Tensor:
        """x [B, T, D] → [B, T, D]."""
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)  # [B, T, heads · hd], [B, T, KV · hd] twice
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for y in (q, k, v))  # [B, heads, T, hd]
        q, k = self.q_norm(q), self.k_norm(k)  # of each head, with `qk_norm`
        q, k = ops.rotate(q, context.cos, context.sin), ops.rotate(k, context.cos, context.sin)
        if context.cache is not None:
            keys, values = context.cache.write(self.layer, k, v)
            k, v = keys.to(q.dtype), values.to(q.dtype)  # [B, KV, S, hd]
        # A single token behind a cache attends to all before it.
        is_causal = context.mask is None and (context.cache is None or x.shape[1] > 1)
        out = self.attend(q, k, v, context.mask, is_causal)  # [B, heads, T, hd]
        return self.o_proj(out.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """x + attn(rms(x)), then x + mlp(rms(x))."""

    def __init__(self, config: TextConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp: nn.Module = MoEFeedForward(config) if config.use_moe else FeedForward(config)

    def forward(
        self, x: Tensor, context: AttentionContext, positions: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """x [B, T, D] → x [B, T, D] and, with experts in training, their auxiliary loss.

        With `positions` [S] in the flattened batch, x [S, D] of these alone: what follows attention needs no others.
        """
        x = x + self.self_attn(self.input_layernorm(x), context)  # [B, T, D]
        if isinstance(self.mlp, MoEFeedForward):  # the balance of experts is one of all tokens
            y, aux_loss = self.mlp(self.post_attention_layernorm(x), context.attention_mask, positions)
            return ops.select(x, positions) + y, aux_loss
        x = ops.select(x, positions)  # [S, D]
        return x + self.mlp(self.post_attention_layernorm(x)), None


class Decoder(nn.Module):
    """Embeddings in, hidden states out: blocks and a final norm. It holds the embedding too."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, n) for n in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = Rotary(config)
        self.config = config

    def context(
        self, x: Tensor, attention_mask: Tensor | None = None, cache: KVCache | None = None
    ) -> AttentionContext:
        """The shared inputs of the layers for x [B, T, D]. A cache makes room for it."""
        if cache is None:
            positions, mask = torch.arange(x.shape[1], device=x.device)[None], None  # [1, T]
        else:
            positions, mask = cache.extend(x.shape[1], attention_mask)  # [B or 1, T], [B or 1, 1, T, S]
        cos, sin = self.rotary(positions)  # [B or 1, 1, T, hd]
        return AttentionContext(cos, sin, mask, cache, attention_mask)

    def forward(
        self,
        x: Tensor,
        attention_mask: Tensor | None = None,
        cache: KVCache | None = None,
        positions: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Embeddings x [B, T, D] → hidden states [B, T, D] and the summed auxiliary loss (0 without experts).

        With `positions` [S] in the flattened batch, hidden states [S, D] of these alone: the last block computes for
        no others what no other token depends on.
        """
        context = self.context(x, attention_mask, cache)
        aux_loss = x.new_zeros((), dtype=torch.float32)
        for layer in self.layers:
            x, layer_loss = layer(x, context, positions if layer is self.layers[-1] else None)
            if layer_loss is not None:
                aux_loss = aux_loss + layer_loss
        return self.norm(x), aux_loss
