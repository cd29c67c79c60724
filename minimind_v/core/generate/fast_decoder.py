"""The language model for generation: the function of `model.decoder.Decoder`, laid out for few tokens at a time.

To decode one token costs the time to read every weight once, and some time per operator. So q, k and v are one matrix
here, and gate and up another; the last layer computes only what the next token depends on. The weights are copies, laid
out for products with few rows (`kernels.cpu_linear`). A wrapped Linear is called.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimind_v.core.generate.slots import MOST_ROWS, Attend, Slots
from minimind_v.core.model.decoder import Attention, Block, RMSNorm
from minimind_v.core.model.feed_forward import FeedForward
from minimind_v.core.model.kernels.accelerate import attention_for
from minimind_v.core.model.kernels.cpu_linear import FEW, SAME_BITS, Product, product
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
        self.embed = model.model.embed_tokens
        self.uses_slots = self.device.type == "cuda"
        self._free_slots: list[Slots] = []

    def new_cache(self, batch: int, max_length: int) -> KVCache:
        """An empty cache for `batch` rows of up to `max_length` tokens."""
        return KVCache(self.config, batch, max_length, self.device, self.dtype)

    def read(self, x: Tensor, cache: KVCache) -> Tensor:
        """Read x [1, T, D] behind what the cache of a row holds → logits [1, V] of the last token, in fp32."""
        causal = cache.used == 0
        positions, mask = cache.extend(x.shape[1])
        return self.decode(x, positions, partial(self._attend, [cache], [mask], causal))

    def step(self, x: Tensor, caches: Sequence[KVCache], in_company: bool = False) -> Tensor:
        """Read a token of each row, x [B, 1, D], each behind what its own cache holds → logits [B, V] in fp32.

        A row attends by itself. With `in_company` a CPU also computes the same bits for it beside any others, or none:
        rows are filled up, which costs a single one a quarter of its time.
        """
        positions = torch.cat([cache.extend(1)[0] for cache in caches])  # [B, 1]
        if in_company and (missing := -len(x) % SAME_BITS):
            x, positions = (torch.cat([t, t[:1].repeat(missing, *[1] * (t.ndim - 1))]) for t in (x, positions))
        attend = partial(self._attend, caches, [None] * len(caches), False)
        return self.decode(x, positions, attend)[: len(caches)]

    def take_slots(self) -> Slots:
        """Slots for rows that a GPU decodes together, with the recordings of earlier rows; to be given back."""
        try:
            return self._free_slots.pop()
        except IndexError:
            return Slots(self.config, self.device, self.dtype, self.embed, self.attend)

    def give_back(self, slots: Slots) -> None:
        """Keep slots that no row has."""
        self._free_slots.append(slots)

    def decode(self, x: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """x [B, T, D] at positions [B, T], of a single row where T > 1 → logits [B, V] of each row's last, in fp32."""
        rows, angles = len(x), self._angles(positions)
        x = x.to(self.dtype, copy=True).flatten(0, 1)  # [B·T, D], added to in place
        for layer in self.layers[:-1]:
            layer.rest(x, attend(layer.number, *layer.project(x, rows, angles)))
        layer = self.layers[-1]
        q, k, v = layer.project(x, rows, angles)
        x, q = x.unflatten(0, (rows, -1))[:, -1], q[:, -1:]  # the next token depends on the last one only
        layer.rest(x, attend(layer.number, q, k, v))
        return self.head(self.norm(x)).float()

    def _angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [B or 1, T, 1, hd], the sines of first halves negative: what `rotated` needs."""
        cos, sin = (table.transpose(1, 2) for table in self.rotary(positions))
        sin[..., : sin.shape[-1] // 2].neg_()
        return cos, sin

    def _attend(
        self,
        caches: Sequence[KVCache],  # of each row
        masks: Sequence[Tensor | None],  # of each row, [1, 1, T, S]; None: nothing is hidden
        causal: bool,
        layer: int,
        q: Tensor,  # [B, T or 1, heads, hd]
        k: Tensor,  # [B, KV, T, hd], and v
        v: Tensor,
    ) -> Tensor:
        """Store the keys and values; each row's queries over all that it has stored → [B·T, D]."""
        rows, time, _, head_dim = q.shape
        if time == 1:  # the query heads of a group have the same keys, as so many positions would
            q, causal = q.view(rows, k.shape[1], -1, head_dim), False  # [B, KV, heads/KV, hd]
            masks = [None if mask is None else mask[:, :, -1:] for mask in masks]  # the last layer reads the last one
        else:
            q = q.transpose(1, 2)  # [B, heads, T, hd]
        attended = [
            self.attend(row_q, *cache.write(layer, row_k, row_v), mask, causal)
            for cache, mask, row_q, row_k, row_v in zip(caches, masks, q.split(1), k.split(1), v.split(1), strict=False)
        ]
        attended += attended[:1] * (rows - len(attended))  # rows that fill up have no cache
        out = attended[0] if rows == 1 else torch.cat(attended)
        if time == 1:
            return out.reshape(rows, -1)  # some kernels lay it out as [B, heads/KV, KV, hd]
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

    def project(self, x: Tensor, rows: int, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """x [B·T, D] → queries [B, T, heads, hd]; these tokens' keys and values, [B, KV, T, hd]."""
        heads = self.qkv(self.input_norm(x)).view(rows, -1, self.heads + 2 * self.kv_heads, self.head_dim)
        qk, v = heads.split((self.heads + self.kv_heads, self.kv_heads), dim=2)
        qk = qk if self.head_norms is None else self.head_norms(qk)
        q, k = rotated(qk, *angles).split((self.heads, self.kv_heads), dim=2)
        return q, k.transpose(1, 2), v.transpose(1, 2)

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
    """Few tokens are not sorted: all meet the experts of each, on a GPU all experts; the share of the others is 0."""

    def __init__(self, moe: MoEFeedForward, dtype: torch.dtype) -> None:
        self.router = moe.gate
        self.reads_choice = moe.gate.weight.device.type == "cpu"  # elsewhere the host would have to wait for it
        self.experts = [FastFeedForward(expert, dtype) for expert in moe.experts]
        self.shared_experts = [FastFeedForward(expert, dtype) for expert in moe.shared_experts]

    def __call__(self, x: Tensor) -> Tensor:
        """[N, D] → [N, D]."""
        weights, chosen = self._route(x)
        out = torch.zeros_like(x)
        if len(x) > (FEW if self.reads_choice else MOST_ROWS):
            self._sorted(x, out, weights, chosen)
        else:
            share = weights.new_zeros(len(x), len(self.experts)).scatter(1, chosen, weights).to(x.dtype)
            for number in chosen.unique().tolist() if self.reads_choice else range(len(self.experts)):
                out.addcmul_(self.experts[number](x), share[:, number, None])
        for expert in self.shared_experts:
            out.add_(expert(x))
        return out

    def _route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and chosen experts [N, k]. Few tokens are routed one by one, for the same bits in any company."""
        x = x.to(self.router.weight.dtype)
        routed = [self.router(token) for token in (x.split(1) if self.reads_choice and len(x) <= FEW else (x,))]
        return torch.cat([weights for _, weights, _ in routed]), torch.cat([chosen for *_, chosen in routed])

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
