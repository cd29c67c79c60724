"""Sample the next token from the logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from minimind_v.core.generate.settings import GREEDY, Sampling

__all__ = ["GREEDY", "Sampler", "Sampling"]

FEW = 64  # of the likeliest, in which a draw mostly ends


class Sampler:
    """Draws token ids with random numbers of its own."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self.generator = torch.Generator()
        if sampling.seed is not None:
            self.generator.manual_seed(sampling.seed)
        else:
            self.generator.seed()

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
            return _draw(probs.cumsum(dim=-1), self.generator)
        ordered, ids, mass = self._likeliest(probs)
        top_p = settings.top_p * mass[-1] if settings.top_k else settings.top_p
        end = len(ids) if settings.top_p == 1 else int((mass - ordered < top_p).sum())  # the fewest that hold p
        if settings.min_p:
            end = min(end, int((ordered >= settings.min_p * ordered[0]).sum()))
        return int(ids[_draw(mass[:end], self.generator)])

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


def _draw(mass: Tensor, generator: torch.Generator) -> int:
    """An index as likely as its step in the ascending sums `mass`."""
    point = torch.rand(1, dtype=mass.dtype, generator=generator) * mass[-1]
    return int(torch.searchsorted(mass, point, right=True).clamp(max=len(mass) - 1))
