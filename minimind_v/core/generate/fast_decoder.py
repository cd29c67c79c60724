"""The language model for generation: the function of `model.decoder.Decoder`, laid out for few tokens at a time.

To decode one token costs the time to read every weight once, and some time per operator. So q, k and v are one matrix
here, and gate and up another; the last layer computes only what the next token depends on. The weights are copies, laid
out for products with few rows (`kernels.cpu_linear`). A wrapped Linear is called.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimind_v.core.generate.cuda_graph import Columns, Replay
from minimind_v.core.model.decoder import Attention, Block, RMSNorm
from minimind_v.core.model.feed_forward import FeedForward
from minimind_v.core.model.kernels.accelerate import attention_for
from minimind_v.core.model.kernels.cpu_linear import FEW, Product, product
from minimind_v.core.model.kernels.untouched import exactly_linear
from minimind_v.core.model.kv_cache import KVCache
from minimind_v.core.model.moe import MoEFeedForward
from minimind_v.core.model.vlm import VLM


class FastDecoder:
    """Embeddings in, logits of each row's last token out, by the present weights of the model."""

    def __init__(self, model: VLM, dtype: torch.dtype) -> None:
        self.config, self.device, self.dtype = model.config, model.device, dtype
        self.rotary = model.model.rotary
        self.attend = attention_for(self.device)
        threads = torch.get_num_threads() if self.device.type == "cpu" else 1  # Metal wants its commands from one
        with ThreadPoolExecutor(threads) as pool:  # laying out a weight takes one core
            head = pool.submit(_product, dtype, model.lm_head)
            self.layers = list(pool.map(partial(FastLayer, dtype=dtype), model.model.layers))
        self.norm = FastNorm(model.model.norm)
        self.head = head.result()
        self.replay = Replay() if model.device.type == "cuda" else None

    def new_cache(self, batch: int, max_length: int) -> KVCache:
        """An empty cache for `batch` rows of up to `max_length` tokens."""
        return KVCache(self.config, batch, max_length, self.device, self.dtype)

    def read(self, x: Tensor, cache: KVCache, attention_mask: Tensor | None = None) -> Tensor:
        """Read x [B, T, D] behind what the cache holds → logits [B, V] in fp32; attention_mask as in `VLM.forward`."""
        first = cache.used == 0
        positions, mask = cache.extend(x.shape[1], attention_mask)
        if self.replay and x.shape[1] == 1 and not first and len(x) <= FEW:
            return self.replay(self._step, x, positions, cache)
        last_mask = None if cache.padding is None else ~cache.padding[:, None, None, : cache.used]
        return self._pass(x, positions, mask, last_mask, cache, first, attention_mask)

    def _step(self, x: Tensor, positions: Tensor, mask: Tensor, columns: Columns) -> Tensor:
        return self._pass(x, positions, mask, mask, columns)

    def _pass(
        self,
        x: Tensor,
        positions: Tensor,
        mask: Tensor | None,  # [B, 1, T, S] of all tokens
        last_mask: Tensor | None,  # [B, 1, 1, S] of each row's last
        columns: Columns,
        causal: bool = False,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        rows = len(x)
        angles = self._angles(positions)
        x = x.to(self.dtype, copy=True).flatten(0, 1)  # [B·T, D], added to in place
        for layer in self.layers[:-1]:
            q, keys, values = layer.project(x, rows, angles, columns)
            layer.rest(x, self._attend(q, keys, values, mask, causal))
        layer = self.layers[-1]
        q, keys, values = layer.project(x, rows, angles, columns)
        x, q = _last(x.unflatten(0, (rows, -1)), attention_mask)[:, 0], _last(q, attention_mask)  # [B, D]
        layer.rest(x, self._attend(q, keys, values, last_mask, False))
        return self.head(self.norm(x)).float()

    def _angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [B or 1, T, 1, hd], the sines of first halves negative: what `rotated` needs."""
        cos, sin = (table.transpose(1, 2) for table in self.rotary(positions))
        sin[..., : sin.shape[-1] // 2].neg_()
        return cos, sin

    def _attend(self, q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        """Queries [B, T, heads, hd] over keys and values [B, KV, S, hd] → [B·T, D]."""
        rows, time, _, head_dim = q.shape
        if time == 1:  # the query heads of a group have the same keys, as so many positions would
            grouped = q.view(rows, keys.shape[1], -1, head_dim)  # [B, KV, heads/KV, hd]
            out = self.attend(grouped, keys, values, mask)
            return out.reshape(rows, -1)  # some kernels lay it out as [B, heads/KV, KV, hd]
        out = self.attend(q.transpose(1, 2), keys, values, mask, causal)  # [B, heads, T, hd]
        return out.transpose(1, 2).reshape(rows * time, -1)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`ops.rotate` in few operators: x [B, T, heads, hd] by `_angles`; the halves are swapped, with sines signed."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)


class FastLayer:
    """One block: `project` is computed for every token, `rest` only for tokens that a later layer reads."""

    def __init__(self, block: nn.Module, dtype: torch.dtype) -> None:
        assert isinstance(block, Block)
        attention = block.self_attn
        self.number, self.head_dim = attention.layer, attention.head_dim
        self.heads, self.kv_heads = attention.heads, attention.kv_heads
        self.qkv = _product(dtype, attention.q_proj, attention.k_proj, attention.v_proj)
        self.o_proj = _product(dtype, attention.o_proj)
        self.head_norms = FastHeadNorms(attention) if isinstance(attention.q_norm, RMSNorm) else None
        self.input_norm, self.post_norm = FastNorm(block.input_layernorm), FastNorm(block.post_attention_layernorm)
        self.mlp = _fast_mlp(block.mlp, dtype)

    def project(
        self, x: Tensor, rows: int, angles: tuple[Tensor, Tensor], columns: Columns
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x [B·T, D] → queries [B, T, heads, hd]; all keys and values, these tokens' included, [B, KV, S, hd]."""
        heads = self.qkv(self.input_norm(x)).view(rows, -1, self.heads + 2 * self.kv_heads, self.head_dim)
        qk, v = heads.split((self.heads + self.kv_heads, self.kv_heads), dim=2)
        qk = qk if self.head_norms is None else self.head_norms(qk)
        q, k = rotated(qk, *angles).split((self.heads, self.kv_heads), dim=2)
        return q, *columns.write(self.number, k.transpose(1, 2), v.transpose(1, 2))

    def rest(self, x: Tensor, attended: Tensor) -> None:
        """The rest of the block, in x [N, D]; attended [N, D]."""
        x.add_(self.o_proj(attended))
        x.add_(self.mlp(self.post_norm(x)))


class FastNorm:
    """RMS norm in four operators where torch needs eight: √(mean(x²) + eps) is hypot(|x|, √(D·eps)) / √D."""

    def __init__(self, norm: nn.Module) -> None:
        assert isinstance(norm, RMSNorm)
        self.norm = norm
        width = len(norm.weight)
        self.weight = norm.weight.detach() * width**0.5
        self.least = norm.weight.new_tensor((width * norm.eps) ** 0.5)

    def __call__(self, x: Tensor) -> Tensor:
        """x / sqrt(mean(x²) + eps) · weight; x [..., D]."""
        if x.dtype != torch.float32 or x.device.type != "cpu":
            return self.norm(x)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return x.div(torch.hypot(length, self.least)).mul_(self.weight)


class FastHeadNorms:
    """The norms of all query and key heads at once, where FastNorm computes."""

    def __init__(self, attention: Attention) -> None:
        self.q_norm, self.k_norm = FastNorm(attention.q_norm), FastNorm(attention.k_norm)
        self.heads = attention.heads, attention.kv_heads
        norms = zip((self.q_norm, self.k_norm), self.heads, strict=True)
        self.weight = torch.cat([norm.weight.expand(heads, -1) for norm, heads in norms])  # [heads + KV, hd]

    def __call__(self, qk: Tensor) -> Tensor:
        """[B, T, heads + KV, hd] → the same shape."""
        if qk.dtype != torch.float32 or qk.device.type != "cpu":
            q, k = qk.split(self.heads, dim=2)
            return torch.cat((self.q_norm(q), self.k_norm(k)), dim=2)
        length = torch.linalg.vector_norm(qk, dim=-1, keepdim=True)
        return qk.div(torch.hypot(length, self.q_norm.least)).mul_(self.weight)


def _last(x: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Each row's last token: [B, T, ...] → [B, 1, ...]."""
    if attention_mask is None:
        return x[:, -1:]
    return x[torch.arange(len(x), device=x.device), attention_mask.sum(dim=1) - 1][:, None]


class FastFeedForward:
    """SwiGLU with gate and up in one matrix: [N, D] → [N, D]."""

    def __init__(self, feed: nn.Module, dtype: torch.dtype) -> None:
        assert isinstance(feed, FeedForward)
        self.gate_up = _product(dtype, feed.gate_proj, feed.up_proj)
        self.down = _product(dtype, feed.down_proj)

    def __call__(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate).mul_(up))


class FastExperts:
    """Few tokens are not sorted: one on a CPU meets its own experts; several meet all, the share of others being 0."""

    def __init__(self, moe: MoEFeedForward, dtype: torch.dtype) -> None:
        self.router = moe.gate
        self.reads_choice = moe.gate.weight.device.type == "cpu"  # elsewhere the host would have to wait for it
        self.experts = [FastFeedForward(expert, dtype) for expert in moe.experts]
        self.shared_experts = [FastFeedForward(expert, dtype) for expert in moe.shared_experts]

    def __call__(self, x: Tensor) -> Tensor:
        """[N, D] → [N, D]."""
        _, weights, chosen = self.router(x.to(self.router.weight.dtype))
        out = torch.zeros_like(x)
        if len(x) > FEW:
            self._sorted(x, out, weights, chosen)
        elif len(x) == 1 and self.reads_choice:
            for number, weight in zip(chosen[0].tolist(), weights[0].tolist(), strict=True):
                out.add_(self.experts[number](x), alpha=weight)
        else:
            share = weights.new_zeros(len(x), len(self.experts)).scatter(1, chosen, weights).to(x.dtype)
            for expert, weight in zip(self.experts, share.unbind(1), strict=True):
                out.addcmul_(expert(x), weight[:, None])
        for expert in self.shared_experts:
            out.add_(expert(x))
        return out

    def _sorted(self, x: Tensor, out: Tensor, weights: Tensor, chosen: Tensor) -> None:
        """One pass per expert over its own tokens."""
        for number, expert in enumerate(self.experts):
            token, pick = (chosen == number).nonzero(as_tuple=True)
            out.index_add_(0, token, expert(x[token]) * weights[token, pick, None].to(x.dtype))


def _fast_mlp(mlp: nn.Module, dtype: torch.dtype) -> FastFeedForward | FastExperts:
    return FastExperts(mlp, dtype) if isinstance(mlp, MoEFeedForward) else FastFeedForward(mlp, dtype)


def _product(dtype: torch.dtype, *linears: nn.Linear) -> Product:
    """x [N, in] → the outputs of the Linears side by side [N, out]: by one packed matrix, or by calling them."""
    if exactly_linear(*linears):
        return product(torch.cat([linear.weight.detach() for linear in linears]).to(dtype))
    own = next(linears[0].parameters()).dtype
    return lambda x: torch.cat([linear(x.to(own)) for linear in linears], dim=-1).to(dtype)
