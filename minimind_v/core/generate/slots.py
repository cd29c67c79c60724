"""Rows that a GPU decodes together: one cache with a slot for each, and the next tokens drawn where the logits are.

A step is a fixed sequence of kernels for a power of two of slots and columns. The host sends a few numbers of each row,
and receives a token of each. Slots, columns and recordings stay when rows leave: the next answers use them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from minimind_v.core.config.schema import TextConfig
from minimind_v.core.cuda_graph import CudaGraphs
from minimind_v.core.generate.sampling import Sampling, draw_tokens
from minimind_v.core.model.kv_cache import KVCache

SPAN = 256  # the fewest columns of a step
MOST_ROWS = 64  # that one step decodes on a GPU
CLOSE = 0.02  # of the logits: a replay that differs more is wrong

# The number of a layer, queries [B, T, heads, hd], keys and values [B, KV, T, hd] → what is attended to [B·T, D]
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
Decode = Callable[[Tensor, Tensor, Attend], Tensor]  # x [B, 1, D] at positions [B, 1] → logits [B, V]


class Numbers(NamedTuple):
    """What a step needs of a row: its latest token and that one's position, and how the next token is drawn."""

    token: int = 0
    position: int = 0
    point: float = 0.0  # a random number
    sampling: Sampling = Sampling(temperature=0.0)

    def column(self) -> tuple[float, ...]:
        """All numbers, those of sampling in the order of `draw_tokens`."""
        how = self.sampling
        limits = how.temperature, how.top_p, how.top_k, how.min_p, how.repetition_penalty
        return self.token, self.position, self.point, *limits


class Slots:
    """The caches of rows that are decoded together, in the order in which they are counted."""

    def __init__(
        self,
        config: TextConfig,
        device: torch.device,
        dtype: torch.dtype,
        embed: Callable[[Tensor], Tensor],
        attend: Callable[..., Tensor],
    ) -> None:
        """`embed` and `attend` are those of the model: its embedding, and `ops.attention`."""
        self.config, self.device, self.dtype, self.embed, self.attend = config, device, dtype, embed, attend
        self.rows: list[object] = []
        warn = partial(warnings.warn, category=RuntimeWarning, stacklevel=8)
        self.graphs = CudaGraphs(device, "answers are decoded", warn, CLOSE)
        self._allocate(1, SPAN)

    def _allocate(self, rows: int, span: int) -> None:
        """Other tensors, of zeros, for so many rows and columns; or an error, and all stays as it is."""
        device, vocabulary = self.device, self.config.vocab_size
        cache = KVCache(self.config, rows, span, device, self.dtype)
        in_text = torch.zeros(rows, vocabulary, device=device, dtype=torch.bool)
        logits = torch.zeros(rows, vocabulary, device=device)
        tokens = torch.zeros(rows, device=device, dtype=torch.int64)
        numbers = torch.zeros(len(Numbers().column()), rows, device=device, dtype=torch.float64)
        sent = torch.zeros_like(numbers, device="cpu", pin_memory=device.type == "cuda")
        columns = torch.arange(span, device=device)
        self.cache, self.in_text, self.logits, self.tokens = cache, in_text, logits, tokens
        self.numbers, self._sent, self._columns = numbers, sent, columns
        self.graphs.clear()

    @property
    def room(self) -> tuple[int, int]:
        """Slots, and columns of each."""
        return self.cache.keys.shape[1], self.cache.max_length

    def enter(self, row: object, cache: KVCache, text_ids: Sequence[int], most: int) -> None:
        """Give a row the next slot, with what its own cache holds; it will have `most` columns.

        Raises torch's errors if memory is full; nothing has changed then.
        """
        slot, (rows, span) = len(self.rows), self.room
        if slot == rows or most > span:
            kept, in_text = self.cache, self.in_text
            self._allocate(power_of_two(slot + 1, rows), power_of_two(most, span))
            self.cache.keys[:, :rows, :, :span], self.cache.values[:, :rows, :, :span] = kept.keys, kept.values
            self.in_text[:rows] = in_text
        for tensor, own in ((self.cache.keys, cache.keys), (self.cache.values, cache.values)):
            # Zeros behind, since a hidden column has no share of a value, and 0 · NaN is NaN.
            tensor[:, slot].zero_()[:, :, : cache.used] = own[:, 0, :, : cache.used]
        self.in_text[slot].zero_()[torch.tensor(text_ids, dtype=torch.int64, device=self.device)] = True
        self.rows.append(row)

    @torch.inference_mode()
    def leave(self, row: object) -> None:
        """Take a row's slot back; the last row moves there."""
        slot, last = self.rows.index(row), len(self.rows) - 1
        for tensor in (self.cache.keys, self.cache.values):
            tensor[:, slot] = tensor[:, last]
        self.in_text[slot] = self.in_text[last]
        self.rows[slot] = self.rows[last]
        self.rows.pop()

    def step(self, decode: Decode, numbers: Sequence[Numbers]) -> list[int]:
        """The next token of each row, given the numbers of each in the order of `rows`.

        A step that was interrupted may be done again. `logits` [B, V] stay until the next step. `decode` must be the
        same at every call.
        """
        rows = power_of_two(len(self.rows), 1)
        span = power_of_two(max(row.position for row in numbers) + 1, SPAN)
        samples = any(row.sampling.temperature or row.sampling.repetition_penalty != 1 for row in numbers)
        idle = [Numbers()] * (rows - len(numbers))
        columns = [row.column() for row in (*numbers, *idle)]
        self._sent[:, :rows] = torch.tensor(columns, dtype=torch.float64).T
        self.numbers.copy_(self._sent, non_blocking=True)
        work = partial(self._work, decode, rows, span, samples)
        if rows > MOST_ROWS:
            work()
        else:
            self.graphs.run((rows, span, samples), work, [self.logits[:rows]])
        return self.tokens[: len(numbers)].tolist()

    def _work(self, decode: Decode, rows: int, span: int, samples: bool) -> None:
        ids, positions = self.numbers[:2, :rows, None].long()  # [B, 1] each
        hidden = self._columns[:span] > positions  # [B, S]
        bias = torch.zeros_like(hidden, dtype=self.dtype).masked_fill_(hidden, -torch.inf)[:, None, None]
        columns = positions[..., None, None]  # [B, 1, 1, 1]

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            """q [B, 1, heads, hd]; k and v [B, KV, 1, hd] → [B, D]."""
            keys, values = (tensor[layer, :rows, :, :span] for tensor in (self.cache.keys, self.cache.values))
            for stored, new in ((keys, k), (values, v)):
                stored.scatter_(2, columns.expand_as(new), new)
            # The query heads of a group have the same keys, as so many positions would.
            q = q.view(rows, k.shape[1], -1, q.shape[-1])  # [B, KV, heads/KV, hd]
            return self.attend(q, keys, values, bias).reshape(rows, -1)

        logits = decode(self.embed(ids), positions, attend)  # [B, V]
        self.logits[:rows] = logits
        if samples:
            in_text = self.in_text[:rows].scatter_(1, ids, True)
            self.tokens[:rows] = draw_tokens(logits, in_text, *self.numbers[2:, :rows])
        else:
            self.tokens[:rows] = logits.argmax(dim=-1)


def power_of_two(least: int, begin: int) -> int:
    """`begin`, doubled until it is no less."""
    while begin < least:
        begin *= 2
    return begin
