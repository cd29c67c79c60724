"""The key-value cache: keys and values of the earlier tokens."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy

import torch
from torch import Tensor

from minimind_v.core.config.schema import TextConfig


class KVCache:
    """Keys and values of every layer, allocated once: [L, B, KV, max_length, hd].

    All rows write to the same columns, behind everything that is stored: one slice, and no scattered copies. Where a
    shorter row has no token, its columns are padding that nothing attends to; a token's position counts only the
    real tokens before it, so right-padded prompts of different lengths can be continued together.
    """

    def __init__(
        self, config: TextConfig, batch: int, max_length: int, device: torch.device | str, dtype: torch.dtype
    ) -> None:
        shape = (config.num_hidden_layers, batch, config.num_key_value_heads, max_length, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.used = 0  # columns, on the host: slicing by it costs no device synchronisation
        self.padding: Tensor | None = None  # [B, max_length], true where a row has no token; None: in no row

    @property
    def max_length(self) -> int:
        return self.keys.shape[3]

    @property
    def lengths(self) -> Tensor:
        """Real tokens of each row [B]."""
        columns = torch.full((self.keys.shape[1],), self.used, device=self.keys.device)
        return columns if self.padding is None else columns - self.padding[:, : self.used].sum(dim=1)

    def rewind(self, length: int) -> None:
        """Remove all tokens from `length` on. For caches without padding."""
        self.used = length

    def hide(self, counts: Sequence[int], time: int) -> None:
        """Turn the newest `time` columns of each row into padding, except the first `counts` of them."""
        if min(counts) < time:
            if self.padding is None:
                self.padding = self._no_padding()
            hidden = torch.arange(time) >= torch.tensor(counts)[:, None]  # [B, T]
            self.padding[:, self.used - time : self.used] |= hidden.to(self.padding.device)

    def select(self, rows: Tensor, max_length: int) -> KVCache:
        """A cache of these rows [N], which may repeat, with room for `max_length` columns."""
        new = copy(self)
        for name in ("keys", "values"):
            stored = getattr(self, name)[:, :, :, : self.used]
            tensor = stored.new_empty((len(stored), len(rows), stored.shape[2], max_length, stored.shape[4]))
            for layer, rows_of_layer in zip(tensor, stored, strict=True):
                layer[:, :, : self.used] = rows_of_layer[rows]
            setattr(new, name, tensor)
        if self.padding is not None:
            new.padding = new._no_padding()
            new.padding[:, : self.used] = self.padding[rows, : self.used]
        return new

    def extend(self, time: int, attention_mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Make room for a chunk of so many columns; attention_mask [B, T] is 0 where a row has padding.

        Returns the chunk's positions [B, T] (of one row where all are alike) and the mask that attention to all
        columns needs [B or 1, 1, T, S]; None where the chunk is the first, which is causal, or nothing is hidden.
        """
        start, end = self.used, self.used + time
        if end > self.max_length:
            raise ValueError(f"the KV cache holds {self.max_length} tokens, but {end} are needed")
        columns = torch.arange(start, end, device=self.keys.device)  # [T]
        positions = columns[None] if self.padding is None else self.lengths[:, None] + (columns - start)
        self.used = end
        if attention_mask is not None and not attention_mask.all():
            if self.padding is None:
                self.padding = self._no_padding()
            self.padding[:, start:end] = ~attention_mask.bool()
        if start == 0 or (time == 1 and self.padding is None):
            return positions, None
        mask = (torch.arange(end, device=self.keys.device) <= columns[:, None])[None, None]  # [1, 1, T, S]
        return positions, mask if self.padding is None else mask & ~self.padding[:, None, None, :end]

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store the newest chunk's [B, KV, T, hd]; returns all that is stored, [B, KV, S, hd]."""
        time = keys.shape[2]
        stored = self.keys[layer], self.values[layer]
        for target, chunk in zip(stored, (keys, values), strict=True):
            target.narrow(2, self.used - time, time).copy_(chunk)
        return stored[0].narrow(2, 0, self.used), stored[1].narrow(2, 0, self.used)

    def _no_padding(self) -> Tensor:
        return torch.zeros((self.keys.shape[1], self.max_length), dtype=torch.bool, device=self.keys.device)
