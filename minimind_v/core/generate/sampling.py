"""Sample the next token from the logits."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from minimind_v.core.generate.settings import GREEDY, Sampling

__all__ = ["GREEDY", "Sampler", "Sampling"]

FEW = 64  # of the likeliest, in which a draw mostly ends
AHEAD = 32  # random numbers that are made at a time


class Sampler:
    """Draws token ids with random numbers of its own."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self.generator = torch.Generator()
        if sampling.seed is not None:
            self.generator.manual_seed(int(sampling.seed))
        else:
            self.generator.seed()
        self._points: deque[float] = deque()

    @property
    def point(self) -> float:
        """The random number of the next draw, from 0 to 1. It stays until it is spent."""
        if not self._points:
            self._points.extend(torch.rand(AHEAD, dtype=torch.float64, generator=self.generator).tolist())
        return self._points[0]

    def spend(self) -> None:
        """The random number was used: the next draw has another. At temperature 0 none is used."""
        if self.sampling.temperature:
            self._points.popleft()

    def __call__(self, logits: Tensor, text_ids: Sequence[int] = ()) -> int:
        """One id from logits [V] behind a text. Draws from what a full sort would, without sorting the unlikely.

        In the order of transformers: the penalty, the temperature, top-k, top-p of what is left, min-p.
        """
        settings = self.sampling
        if settings.repetition_penalty != 1:
            logits = _penalised(logits, text_ids, settings.repetition_penalty)
        if settings.temperature == 0:
            return int(logits.argmax())
        behind = (logits - logits.max()).cpu().double()  # so that the smallest temperature cannot overflow
        probs = (behind / settings.temperature).softmax(dim=-1)  # [V]
        if settings.top_p == 1 and not settings.top_k and not settings.min_p:
            return self._draw(probs.cumsum(dim=-1))
        ordered, ids, mass = self._likeliest(probs)
        top_p = settings.top_p * mass[-1] if settings.top_k else settings.top_p
        end = len(ids) if settings.top_p == 1 else int((mass - ordered < top_p).sum())  # the fewest that hold p
        if settings.min_p:
            end = min(end, int((ordered >= settings.min_p * ordered[0]).sum()))
        return int(ids[self._draw(mass[:end])])

    def _draw(self, mass: Tensor) -> int:
        """An index as likely as its step in the ascending sums `mass`."""
        point = self.point * float(mass[-1])
        self.spend()
        return int(torch.searchsorted(mass, point, right=True).clamp(max=len(mass) - 1))

    def _likeliest(self, probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Probabilities, ids and sums, the likeliest first: as many as top-p, top-k and min-p may need."""
        settings = self.sampling
        ordered, ids = probs.topk(min(settings.top_k or FEW, len(probs)))  # most mass is on few
        mass = ordered.cumsum(dim=-1)
        enough = settings.top_k or mass[-1] >= settings.top_p or ordered[-1] < settings.min_p * ordered[0]
        if not enough:
            values = probs.numpy()  # numpy sorts in a quarter of the time that torch takes
            ids = torch.from_numpy((-values).argsort())
            ordered = torch.from_numpy(values[ids])
            mass = ordered.cumsum(dim=-1)
        return ordered, ids, mass


def _penalised(logits: Tensor, text_ids: Sequence[int], penalty: float) -> Tensor:
    """Logits of the text's own tokens divided by the penalty where positive, else multiplied by it."""
    ids = torch.tensor(sorted(set(text_ids)), dtype=torch.int64, device=logits.device)
    own = logits[ids]
    return logits.index_copy(0, ids, torch.where(own > 0, own / penalty, own * penalty))


def draw_tokens(
    logits: Tensor,  # [B, V]
    in_text: Tensor,  # [B, V], true for tokens of the row's own text
    point: Tensor,  # [B] in fp64, a random number of each row; and its settings:
    temperature: Tensor,
    top_p: Tensor,
    top_k: Tensor,
    min_p: Tensor,
    repetition_penalty: Tensor,
) -> Tensor:
    """The tokens [B] that a `Sampler` of each row draws with these random numbers, by operators that wait for none."""
    rows = point, temperature, top_p, top_k, min_p, repetition_penalty
    point, temperature, top_p, top_k, min_p, penalty = (row[:, None] for row in rows)  # [B, 1] each
    penalty = penalty.to(logits.dtype)
    logits = torch.where(in_text, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
    behind = (logits - logits.amax(dim=-1, keepdim=True)).double()
    probs = (behind / torch.where(temperature == 0, 1.0, temperature)).softmax(dim=-1)  # [B, V]
    limited = (top_p != 1) | (top_k != 0) | (min_p != 0)
    indices = torch.arange(logits.shape[-1], device=logits.device)[None]
    ids = torch.where(limited, logits.argsort(dim=-1, descending=True, stable=True), indices)
    ordered = probs.gather(1, ids)
    mass = ordered.cumsum(dim=-1)
    most = torch.where(top_k == 0, indices.shape[1], top_k).long().clamp(max=indices.shape[1])  # [B, 1]
    share = torch.where(top_k == 0, top_p, top_p * mass.gather(1, most - 1))
    kept = (indices < most) & ((top_p == 1) | (mass - ordered < share)) & (ordered >= min_p * ordered[:, :1])
    end = kept.sum(dim=-1, keepdim=True).clamp(min=1)
    drawn = (mass <= point * mass.gather(1, end - 1)).sum(dim=-1, keepdim=True)
    drawn = torch.where(temperature == 0, logits.argmax(dim=-1, keepdim=True), ids.gather(1, drawn.minimum(end - 1)))
    return drawn[:, 0]
