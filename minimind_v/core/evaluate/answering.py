"""Answers of a model to many asks: what prompts have in common is read once, the rest side by side.

A prompt up to the end of its last image is read once for all asks that share it, and a prompt once for all its
candidates. A greedy answer is found by guessing: the model reads a likely answer in one pass, and where it would have
said something else, the next guess begins with that; behind the last guess it is decoded token by token.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from minimind_v.core.data.prompt import PromptEncoder, Tokens
from minimind_v.core.data.tokenizer import Tokenizer
from minimind_v.core.errors import RowError
from minimind_v.core.evaluate.ask import Ask, Messages, Reply
from minimind_v.core.evaluate.reading import Reading
from minimind_v.core.generate.engine import CONTEXT
from minimind_v.core.generate.prompt_cache import Store
from minimind_v.core.model.vlm import VLM
from minimind_v.core.wording import plural

ROWS, TOKENS = 64, 8192  # of a pass, with all that its rows have read; fixed, so that no setting changes a digit
GUESSES = 4  # passes for an answer before it is decoded token by token
SHORT = 12  # tokens of the longest answer that is guessed
FEW_PROMPTS = 4096  # prompts that are kept: many questions are asked about several images
FEATURES = 512 * 2**20  # bytes of features that are kept


class Features:
    """Features of images by digest, the latest kept; `encode` is called for an image that is not kept."""

    def __init__(self, encode: Callable[[str], Tensor], limit: int = FEATURES) -> None:
        self._encode, self._kept = encode, Store(limit)  # [P, width] each

    def __call__(self, digest: str) -> Tensor:
        if (features := self._kept.get(digest.encode())) is None:
            features = self._encode(digest)
            self._kept.add(digest.encode(), features)
        return features


class Answering:
    """A model that replies to asks. A reply depends on the asks that are given together, and on nothing else."""

    def __init__(
        self, model: VLM, tokenizer: Tokenizer, features: Features, guesses: Sequence[str], dtype: str
    ) -> None:
        """`guesses` are the true answers of all questions: what the model may say as well."""
        self.model, self.tokenizer, self.features, self.dtype = model.eval(), tokenizer, features, dtype
        self.prompts = PromptEncoder(tokenizer, model.spec.tokens_per_image)
        self._prompt = lru_cache(FEW_PROMPTS)(partial(encode_prompt, self.prompts))
        self.context = min(CONTEXT, model.config.max_position_embeddings)
        counts = Counter(guesses)
        ordered = sorted(counts, key=lambda text: (-counts[text], text))
        self._next: dict[tuple[int, ...], tuple[int, ...]] = {}  # beginning → the most frequent guess that has it
        for ids in (ids for ids in map(self._ended, ordered) if len(ids) <= SHORT):
            for end in range(1, len(ids)):
                self._next.setdefault(ids[:end], ids)

    def replies(self, groups: Sequence[Sequence[Ask]]) -> Iterator[list[Reply]]:
        """The replies to groups, one after another."""
        return map(self.reply, groups)

    @torch.inference_mode()
    def reply(self, asks: Sequence[Ask]) -> list[Reply]:
        """The replies to asks, in their order. Raises RowError for a prompt that cannot be encoded."""
        prompts = [self._prompt(ask.messages, len(ask.images)) for ask in asks]
        order = sorted(range(len(asks)), key=lambda n: (prompts[n].input_ids, asks[n].images, asks[n].key))
        replies: dict[int, Reply] = {}
        for reply in (self._answers, self._scores):
            own = [n for n in order if (asks[n].method == "answer") is (reply == self._answers)]
            for together in _side_by_side([len(prompts[n]) + self._room(asks[n], prompts[n]) for n in own]):
                numbers = [own[n] for n in together]
                replies |= zip(numbers, reply([asks[n] for n in numbers], [prompts[n] for n in numbers]), strict=True)
        return [replies[n] for n in range(len(asks))]

    def _ended(self, text: str) -> tuple[int, ...]:
        return (*self.tokenizer.encode(text).ids, self.tokenizer.eos_id)

    def _room(self, ask: Ask, prompt: Tokens) -> int:
        """The most tokens of a generated answer."""
        return max(1, min(ask.most_tokens, self.context - len(prompt))) if ask.method == "answer" else 0

    def _read(self, asks: Sequence[Ask], prompts: Sequence[Tokens], room: int) -> tuple[Reading, Tensor]:
        """The prompts of asks, with room for so many further tokens, and the logits [B, V] behind each."""
        numbers: dict[tuple[Any, ...], int] = {}  # of different beginnings, up to the end of the last image
        beginnings: list[Tokens] = []
        rows: list[int] = []  # the beginning of each prompt
        pieces: list[list[int]] = []  # the rest of it
        for ask, prompt in zip(asks, prompts, strict=True):
            end = len(prompt) - prompt.image_mask[::-1].index(True) if ask.images else 0
            number = numbers.setdefault((tuple(prompt.input_ids[:end]), ask.images), len(numbers))
            if number == len(beginnings):
                beginnings.append(prompt.cut(end, self.prompts.tokens_per_image))
            rows.append(number)
            pieces.append(prompt.input_ids[end:])
        images = [self.features(digest) for _, digests in numbers for digest in digests]
        reading = Reading.begin(self.model, self.dtype, beginnings, images)
        reading = reading.select(rows, max(map(len, pieces)) + room)
        return reading, reading.read(pieces, last=True)

    def _answers(self, asks: Sequence[Ask], prompts: Sequence[Tokens]) -> list[Reply]:
        """The greedy answers."""
        most = [self._room(ask, prompt) for ask, prompt in zip(asks, prompts, strict=True)]
        room, end = GUESSES * SHORT + max(most), self.tokenizer.eos_id
        reading, logits = self._read(asks, prompts, room)
        answers = [[token] for token in logits.argmax(dim=-1).tolist()]
        logprobs = [[value] for value in _highest(logits)]  # of the tokens of each answer
        rows = list(range(len(asks)))  # of the reading: whose answer each is
        for number in range(max(most)):
            going = [n for n in rows if answers[n][-1] != end and len(answers[n]) < most[n]]
            if not going:
                break
            if len(going) <= len(rows) // 2:  # rows that have ended cost more than a copy of the others
                reading, rows = reading.select([rows.index(n) for n in going], room), going
            guesses = [self._next.get(tuple(answers[n]), ()) if number < GUESSES else () for n in rows]
            pieces = [
                (answers[n][-1], *guess[len(answers[n]) : -1]) if n in going else answers[n][-1:]
                for n, guess in zip(rows, guesses, strict=True)
            ]
            logits = reading.read(pieces)
            likeliest, highest = iter(logits.argmax(dim=-1).tolist()), iter(_highest(logits))
            kept = []
            for n, piece in zip(rows, pieces, strict=True):
                agreed = _agreed(piece[1:], [next(likeliest) for _ in piece])
                values = [next(highest) for _ in piece]
                kept.append(len(agreed))
                if n in going:
                    answers[n] += agreed
                    logprobs[n] += values[: len(agreed)]
            reading.keep(kept, max(map(len, pieces)))
        replies = []
        for ids, values, limit in zip(answers, logprobs, most, strict=True):
            count = sum(id != end for id in ids[:limit])  # an end is the last
            total = (float(np.sum(values[:count])),) if count else ()
            replies.append(Reply(self.tokenizer.decode(ids[:count]).strip(), total, (count,) * len(total)))
        return replies

    def _scores(self, asks: Sequence[Ask], prompts: Sequence[Tokens]) -> list[Reply]:
        """The log-probabilities of candidates: of first tokens behind the prompt, of the others in further passes."""
        reading, logits = self._read(asks, prompts, 0)
        firsts = logits.log_softmax(dim=-1).cpu()  # [B, V]
        behind = self.prompts.answer_end().input_ids[1:]  # the end token
        candidates = [
            (row, (*self._ended(text), *(behind if ask.method == "supervised" else ())))
            for row, ask in enumerate(asks)
            for text in ask.candidates
        ]
        logprobs = [[float(firsts[row, ids[0]])] for row, ids in candidates]
        longer = [n for n, (row, ids) in enumerate(candidates) if asks[row].method != "first" and len(ids) > 1]
        for together in _side_by_side([len(prompts[candidates[n][0]]) + len(candidates[n][1]) for n in longer]):
            numbers = [longer[n] for n in together]
            answers = [candidates[n][1] for n in numbers]
            own = reading.select([candidates[n][0] for n in numbers], max(map(len, answers)))
            targets = torch.tensor([id for ids in answers for id in ids[1:]], device=self.model.device)
            losses = cross_entropy(own.read([ids[:-1] for ids in answers]), targets, reduction="none")  # [S]
            for n, values in zip(numbers, losses.cpu().split([len(ids) - 1 for ids in answers]), strict=True):
                logprobs[n] += (-values).tolist()
        results = iter(logprobs)
        own_results = [[next(results) for _ in ask.candidates] for ask in asks]
        return [
            Reply("", tuple(float(np.sum(own)) for own in results), tuple(map(len, results))) for results in own_results
        ]


def encode_prompt(prompts: PromptEncoder, messages: Messages, images: int) -> Tokens:
    """The tokens of a prompt. Raises RowError where it is too long, or its marks and images differ in number."""
    tokens = prompts.prompt([{"role": role, "content": content} for role, content in messages])
    if tokens.images != images:
        raise RowError(f"{plural(tokens.images, 'image mark')} for {plural(images, 'image')}", "placeholders")
    if len(tokens) >= CONTEXT // 2:
        raise RowError(f"the question is longer than {CONTEXT // 2} tokens", "too long")
    return tokens


def _highest(logits: Tensor) -> list[float]:
    """The log-probability of the likeliest token of each position; logits [S, V]."""
    highest: list[float] = (logits.amax(dim=-1) - logits.logsumexp(dim=-1)).tolist()
    return highest


def _agreed(guess: Sequence[int], likeliest: Sequence[int]) -> tuple[int, ...]:
    """The beginning of the greedy answer: the guess as far as it is right, and the token that is right behind it."""
    same = next((n for n, (token, best) in enumerate(zip(guess, likeliest, strict=False)) if token != best), len(guess))
    return tuple(likeliest[: same + 1])


def _side_by_side(sizes: Sequence[int]) -> Iterator[list[int]]:
    """The numbers of rows of these tokens, the short ones first, in passes."""
    rows: list[int] = []
    for number in sorted(range(len(sizes)), key=sizes.__getitem__):
        if rows and (len(rows) == ROWS or (len(rows) + 1) * sizes[number] > TOKENS):
            yield rows
            rows = []
        rows.append(number)
    if rows:
        yield rows
