"""The language model: a pre-norm decoder with rotary positions and grouped-query attention.

State-dict keys and arithmetic are those of the published MiniMind weights; a dense model equals
transformers' LlamaForCausalLM with the same tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from minimind_v.core.config.schema import TextConfig
from minimind_v.core.model import ops
from minimind_v.core.model.kernels.cpu_training import attend, attend_together, project, rms_norm
from minimind_v.core.model.moe import FeedForward, MoEFeedForward, pick


class KVCache:
    """Keys and values of every layer, allocated once: [L, B, KV, max_length, head_dim].

    All rows write to the same columns, behind everything that is there: one slice, and no scattered copies. Where a
    shorter row has nothing to write, its columns are padding that nobody attends to; a token's position counts only
    the real tokens before it, so right-padded prompts of different lengths can be continued together.
    """

    def __init__(
        self, config: TextConfig, batch: int, max_length: int, device: torch.device | str, dtype: torch.dtype
    ) -> None:
        shape = (config.num_hidden_layers, batch, config.num_key_value_heads, max_length, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.used = 0  # columns, on the host: slicing by it costs no device synchronisation
        self.padding: Tensor | None = None  # [B, max_length], True where a row has nothing; None: in no row

    @property
    def max_length(self) -> int:
        return self.keys.shape[3]

    @property
    def lengths(self) -> Tensor:
        """How many tokens each row really has [B]."""
        whole = torch.full((self.keys.shape[1],), self.used, device=self.keys.device)
        return whole if self.padding is None else whole - self.padding[:, : self.used].sum(dim=1)

    def rewind(self, length: int) -> None:
        """Forget all tokens from `length` on. For caches without padding."""
        self.used = length

    def drop(self, row: int) -> None:
        """Forget a whole row; the last one takes its number."""
        last = self.keys.shape[1] - 1
        for part in (self.keys, self.values):
            part[:, row, :, : self.used] = part[:, last, :, : self.used]
        self.keys, self.values = self.keys[:, :last], self.values[:, :last]
        if self.padding is not None:
            self.padding[row] = self.padding[last]
            self.padding = self.padding[:last]

    def extend(self, time: int, attention_mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Make room for a chunk of so many columns; attention_mask [B, T] is 0 where a row has padding.

        Returns the chunk's positions [B, T] (of one row where all are alike) and the mask that attention to all
        columns needs [B, 1, T, S]; None where the chunk is the first, which is causal, or all may be seen.
        """
        start, end = self.used, self.used + time
        if end > self.max_length:
            raise ValueError(f"the KV cache holds {self.max_length} tokens, {end} are needed")
        columns = torch.arange(start, end, device=self.keys.device)  # [T]
        positions = columns[None] if self.padding is None else self.lengths[:, None] + (columns - start)
        self.used = end
        if attention_mask is not None and not attention_mask.all():
            if self.padding is None:
                shape = (self.keys.shape[1], self.max_length)
                self.padding = torch.zeros(shape, dtype=torch.bool, device=self.keys.device)
            self.padding[:, start:end] = ~attention_mask.bool()
        if start == 0 or (time == 1 and self.padding is None):
            return positions, None
        mask = (torch.arange(end, device=self.keys.device) <= columns[:, None])[None, None]  # [1, 1, T, S]
        return positions, mask if self.padding is None else mask & ~self.padding[:, None, None, :end]

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store the newest chunk's [B, KV, T, hd]; returns all that is used so far, [B, KV, S, hd]."""
        time = keys.shape[2]
        parts = self.keys[layer], self.values[layer]
        for part, new in zip(parts, (keys, values), strict=True):
            part.narrow(2, self.used - time, time).copy_(new)
        return parts[0].narrow(2, 0, self.used), parts[1].narrow(2, 0, self.used)


class RMSNorm(nn.Module):
    """Root-mean-square norm (Zhang & Sennrich, 2019), computed in fp32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class Rotary(nn.Module):
    """Rotary position embedding in the half-rotation form: cat(-x2, x1) (Su et al., 2021; Llama, NeoX)."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        exponent = torch.arange(0, config.head_dim, 2).float() / config.head_dim
        self.inv_freq: Tensor
        self.register_buffer("inv_freq", 1.0 / config.rope_theta**exponent, persistent=False)

    def forward(self, position_ids: Tensor) -> Tensor:
        """Positions [B, T] → by what their pairs turn, complex [B, T, 1, hd/2]; on MPS, as `fused.turn` says."""
        angles = position_ids[..., None].float() * self.inv_freq.float()  # [B, T, hd/2]
        if angles.device.type == "mps":
            return torch.stack((angles.cos(), angles.sin()), dim=-1)[:, :, None]  # [B, T, 1, hd/2, 2]
        return torch.polar(torch.ones_like(angles), angles)[:, :, None]


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

    def forward(self, x: Tensor, place: AttentionContext, read: Tensor | None) -> Tensor:
        """x [B, T, D] → [B, T, D], or with the positions `read` [S] of those that are read further, [S, D] of these."""
        q, k, v = project(x, self.q_proj.weight, self.k_proj.weight, self.v_proj.weight, place.turns, place.shared)
        if place.cache is not None:
            keys, values = place.cache.write(self.layer, k, v)
            if not place.first:  # an empty cache is attended to like no cache
                k, v = keys.to(q.dtype), values.to(q.dtype)  # [B, KV, S, hd]
        if place.shared:
            out = attend_together(q, k, v, place.shared, place.rows)  # [1, N, D]
        elif place.first:
            out = attend(q, k, v)  # [B, T, D]
        else:
            out = ops.attention(q, k, v, place.mask, scale=1.0)
            out = out.transpose(1, 2).flatten(2)
        return self.o_proj(out if read is None else pick(out, read))


class AttentionContext:
    """Where the tokens of one forward pass stand, worked out once for all layers.

    A right-padded batch without a past needs no mask: causality already keeps real tokens from the padding behind them.
    """

    def __init__(
        self, model: Decoder, x: Tensor, attention_mask: Tensor | None, cache: KVCache | None, shared: int = 0
    ) -> None:
        self.cache, self.shared, self.rows = cache, shared, len(x)
        self.first = cache is None or cache.used == 0
        self.mask: Tensor | None = None
        if cache is None:
            position_ids = torch.arange(x.shape[1], device=x.device)[None]  # [1, T]
        else:
            position_ids, self.mask = cache.extend(x.shape[1], attention_mask)
        # Laid out for all heads: one long product is faster than one for each. Queries are scaled by it as well.
        heads, kv_heads = model.config.num_attention_heads, model.config.num_key_value_heads
        turns = model.rotary(position_ids)
        more = (1,) * (turns.ndim - 3)
        self.turns = turns.repeat(1, 1, heads + kv_heads, *more)  # [B or 1, T, all but values', hd/2]
        self.turns[:, :, :heads] *= model.config.head_dim**-0.5


class Block(nn.Module):
    """x + attn(rms(x)), then x + mlp(rms(x))."""

    def __init__(self, config: TextConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp: nn.Module = MoEFeedForward(config) if config.use_moe else FeedForward(config)

    def forward(
        self, x: Tensor, place: AttentionContext, attention_mask: Tensor | None, read: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """x [B, T, D] → x [B, T, D] and the auxiliary loss, if the block has one.

        `read`, positions [S] in the flattened batch: only these are read further, and x comes as [S, D].
        """
        if isinstance(self.mlp, MoEFeedForward):  # the balance of its experts is asked of every token
            x = x + self.self_attn(self.input_layernorm(x), place, None)
            y, aux = self.mlp(self.post_attention_layernorm(x), attention_mask, read)
            return (x if read is None else pick(x, read)) + y, aux
        x = (x if read is None else pick(x, read)) + self.self_attn(self.input_layernorm(x), place, read)
        return x + self.mlp(self.post_attention_layernorm(x)), None


class Decoder(nn.Module):
    """Embedding, blocks and final norm: ids or embeddings in, hidden states out."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, n) for n in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = Rotary(config)
        self.config = config

    def forward(
        self,
        x: Tensor,
        attention_mask: Tensor | None = None,
        cache: KVCache | None = None,
        read: Tensor | None = None,
        shared: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """Embeddings x [B, T, D] → hidden states [B, T, D] and the summed auxiliary loss (0 without experts).

        `read`, positions [S] in the flattened batch: only the hidden states of these are wanted, and come as [S, D].
        What of the last block no other token depends on is not computed for the rest. `shared`, with `read`: at so
        many positions from the beginning all rows are alike, and none is read; they are computed once.
        """
        if self.config.use_moe or x.device.type == "mps":  # the balance of experts is one of whole rows
            shared = 0
        place = AttentionContext(self, x, attention_mask, cache, shared)
        if shared and read is not None:
            rest = x.shape[1] - shared
            x = torch.cat([x[0, :shared], x[:, shared:].flatten(0, 1)])[None]  # [1, N, D]
            read = read // (shared + rest) * rest + read % (shared + rest)  # where they are now
        aux = x.new_zeros((), dtype=torch.float32)
        for layer in self.layers:
            last = layer is self.layers[-1]
            x, layer_aux = layer(x, place, attention_mask, read if last else None)
            if layer_aux is not None:
                aux = aux + layer_aux
        return self.norm(x), aux
