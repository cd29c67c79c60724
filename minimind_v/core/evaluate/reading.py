"""Texts that a model reads side by side, piece by piece: what several have in common is read once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from minimind_v.core.data.prompt import Tokens
from minimind_v.core.device import autocast, resolve_dtype
from minimind_v.core.model.kv_cache import KVCache
from minimind_v.core.model.vlm import VLM

Ids = Sequence[int]


class Reading:
    """Rows of a batch, with the keys and values of what each has read. For inference mode."""

    def __init__(self, model: VLM, dtype: str, cache: KVCache) -> None:
        self.model, self.dtype, self.cache = model, dtype, cache

    @classmethod
    def begin(cls, model: VLM, dtype: str, beginnings: Sequence[Tokens], images: Sequence[Tensor]) -> Reading:
        """Read the beginning of each row; `images` are the features [P, width] of all their images in reading order."""
        kind = torch.bfloat16 if resolve_dtype(model.device, dtype) == "bfloat16" else model.lm_head.weight.dtype
        longest = max(map(len, beginnings))
        cache = KVCache(model.config, len(beginnings), longest, model.device, kind)
        reading = cls(model, dtype, cache)
        if longest:
            ids = _padded([tokens.input_ids for tokens in beginnings]).to(model.device)  # [B, T]
            mask = _padded([tokens.image_mask for tokens in beginnings]).bool().to(model.device)
            with autocast(model.device, dtype):
                x = model.embed(ids, torch.stack(list(images)).to(model.device) if images else None, mask)
                model.model(x, None, cache, ids.new_empty(0))  # its output is not needed
            reading.keep([len(tokens) for tokens in beginnings], longest)
        return reading

    def select(self, rows: Sequence[int], room: int) -> Reading:
        """These rows, which may repeat, with room for so many further columns."""
        cache = self.cache.select(torch.tensor(rows, device=self.model.device), self.cache.used + room)
        return Reading(self.model, self.dtype, cache)

    def read(self, pieces: Sequence[Ids], last: bool = False) -> Tensor:
        """Read a piece of each row → logits [S, V] in fp32 behind each token of all pieces, or `last` of each only."""
        ids = _padded(pieces).to(self.model.device)  # [B, T]
        positions = [
            row * ids.shape[1] + token
            for row, piece in enumerate(pieces)
            for token in range(len(piece) - 1 if last else 0, len(piece))
        ]
        with autocast(self.model.device, self.dtype):
            x = self.model.model.embed_tokens(ids)
            hidden, _ = self.model.model(x, None, self.cache, torch.tensor(positions, device=ids.device))  # [S, D]
            logits = self.model.lm_head(hidden)
        self.keep(list(map(len, pieces)), ids.shape[1])
        return logits.float()

    def keep(self, counts: Sequence[int], width: int) -> None:
        """Of the newest `width` tokens of each row, forget all but its first `counts`."""
        self.cache.hide(counts, width)


def _padded(rows: Sequence[Ids]) -> Tensor:
    return pad_sequence([torch.tensor(row, dtype=torch.long) for row in rows], batch_first=True)
