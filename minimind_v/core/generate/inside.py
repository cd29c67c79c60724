"""What happens inside the language model: attention weights, the states behind each layer, and the words in them.

The model keeps no attention weights, since nothing else needs them. Here they are computed once more, from the queries
and keys of each layer, as softmax(q kᵀ / √hd) in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from minimind_v.core.curate.token_text import TokenReader
from minimind_v.core.data.tokenizer import Tokenizer
from minimind_v.core.model import ops
from minimind_v.core.model.decoder import Attention, AttentionContext, Block
from minimind_v.core.model.vlm import VLM

SPARE = 8  # so many times more nearest tokens than words are searched: several may spell one word


@dataclass(frozen=True)
class Inside:
    """One pass over a text of T tokens, seen from N of its positions."""

    logits: Tensor  # [N, V] at these positions
    attention: Tensor  # [N, L, H, T], the attention weights of these positions in each layer and head
    rollout: Tensor  # [N, T]
    states: Tensor  # [L, T, D], the output of each layer before the final norm


@torch.inference_mode()
def trace_pass(model: VLM, x: Tensor, positions: Tensor) -> Inside:
    """Run embeddings x [1, T, D] through the language model, and keep what `positions` [N] attend to.

    `rollout` is the attention rollout of Abnar & Zuidema (2020): the mean over heads, mixed half and half with the
    residual connection and multiplied through all layers. It ignores values and feed-forward layers.
    """
    context = model.model.context(x)
    attention, states, heads = [], [], []
    for layer in model.model.layers:
        assert isinstance(layer, Block)
        q, k = queries_and_keys(layer.self_attn, layer.input_layernorm(x), context)
        attention.append(attention_weights(q[0, :, positions], k[0], positions))  # [H, N, T]
        heads.append((q[0], k[0]))
        x, _ = layer(x, context)
        states.append(x[0])
    rollout = F.one_hot(positions, x.shape[1]).float()  # [N, T]
    for q, k in reversed(heads):
        rollout = (rollout + rollout @ _mean_over_heads(q, k)) / 2
    logits = model.lm_head(model.model.norm(x[0, positions])).float()
    return Inside(logits, torch.stack(attention).permute(2, 0, 1, 3), rollout, torch.stack(states))


def queries_and_keys(attention: Attention, x: Tensor, context: AttentionContext) -> tuple[Tensor, Tensor]:
    """The rotated queries [B, H, T, hd] and keys [B, KV, T, hd] of a layer's normed input x [B, T, D]."""
    q, k = (
        norm(linear(x).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2))
        for linear, norm in ((attention.q_proj, attention.q_norm), (attention.k_proj, attention.k_norm))
    )
    return ops.rotate(q, context.cos, context.sin), ops.rotate(k, context.cos, context.sin)


def attention_weights(q: Tensor, k: Tensor, positions: Tensor) -> Tensor:
    """softmax(q kᵀ / √hd) of queries q [H, N, hd] at positions [N], over keys k [KV, T, hd] → [H, N, T].

    A query attends to the keys up to its own position.
    """
    k = k.repeat_interleave(len(q) // len(k), dim=0)  # several query heads to one key head
    scores = q.float() @ k.float().mT * q.shape[-1] ** -0.5  # [H, N, T]
    later = torch.arange(k.shape[1], device=k.device) > positions[:, None]  # [N, T]
    return scores.masked_fill(later, float("-inf")).softmax(dim=-1)


def _mean_over_heads(q: Tensor, k: Tensor) -> Tensor:
    """The mean attention weights [T, T] of all positions; head by head, since all heads together take much memory."""
    positions, group = torch.arange(q.shape[1], device=q.device), len(q) // len(k)
    total = torch.zeros(q.shape[1], q.shape[1], device=q.device)
    for head in range(len(q)):
        total += attention_weights(q[head, None], k[head // group, None], positions)[0]
    return total / len(q)


# --- words ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Word:
    """A token as text, and a number that belongs to it."""

    text: str
    value: float


class Vocabulary:
    """The tokens of a model as words."""

    def __init__(self, model: VLM, tokenizer: Tokenizer) -> None:
        self.model, self.reader = model, TokenReader(tokenizer)
        added = tokenizer.backend.get_added_tokens_decoder()
        texts = [None if token in added else self.reader.text(token) for token in range(tokenizer.vocab_size)]
        is_word = [text is not None and any(map(str.isalnum, text)) for text in texts]
        self._word_ids = torch.tensor([token for token, word in enumerate(is_word) if word], device=model.device)

    def name(self, token: int) -> str:
        """A token as text; the bytes of an incomplete character in hex."""
        return self.reader.name(token)

    def likeliest(self, probabilities: Tensor, count: int, without: int | None = None) -> list[Word]:
        """The likeliest tokens of probabilities [V], likeliest first, and their probabilities."""
        values, tokens = probabilities.topk(min(count + 1, len(probabilities)))
        pairs = zip(tokens.tolist(), values.tolist(), strict=True)
        return [Word(self.name(token), value) for token, value in pairs if token != without][:count]

    @torch.inference_mode()
    def nearest(self, embeddings: Tensor, count: int) -> list[list[Word]]:
        """The words whose embeddings are nearest to each of embeddings [P, D], and their cosines.

        Only tokens with a letter or a digit are words: no added tokens, no bytes of incomplete characters. Tokens
        that differ in spaces and capitals only count as one word.
        """
        if not len(self._word_ids):
            return [[] for _ in embeddings]
        table = F.normalize(self.model.model.embed_tokens.weight[self._word_ids].float(), dim=-1)  # [W, D]
        cosines = F.normalize(embeddings.float(), dim=-1) @ table.T  # [P, W]
        values, indices = cosines.topk(min(SPARE * count, len(table)))
        nearest = []
        for row_values, row in zip(values.tolist(), self._word_ids[indices].tolist(), strict=True):
            by_text: dict[str, Word] = {}
            for value, token in zip(row_values, row, strict=True):
                text = self.name(token).strip()
                by_text.setdefault(text.casefold(), Word(text, value))
            nearest.append([*by_text.values()][:count])
        return nearest

    @torch.inference_mode()
    def lens(self, states: Tensor) -> list[list[Word]]:
        """The likeliest token of each layer's state [L, P, D] through the final norm and the head → [P][L].

        This is the logit lens (nostalgebraist, 2020): what the model would say next if it ended at that layer.
        """
        columns = []
        for state in states:
            values, tokens = self.model.lm_head(self.model.model.norm(state)).float().softmax(dim=-1).max(dim=-1)
            pairs = zip(tokens.tolist(), values.tolist(), strict=True)
            columns.append([Word(self.name(token), value) for token, value in pairs])
        return [list(column) for column in zip(*columns, strict=True)]
