"""Answers of a model to many asks: images encoded once, teacher-forced passes in groups of like length.

A greedy answer is found by guessing: the model reads a likely answer behind the prompt in one pass, and where it would
have said something else, the next guess begins with that. Only an answer that no guess reaches is decoded token by
token, by the engine.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from minimind_v.core.data.prompt import PromptEncoder, Tokens
from minimind_v.core.data.tokenizer import Tokenizer
from minimind_v.core.errors import RowError
from minimind_v.core.evaluate.ask import Ask, Messages, Reply
from minimind_v.core.evaluate.forward import answer_logprobs
from minimind_v.core.generate.engine import CONTEXT, Engine, Event, Prompt, Request
from minimind_v.core.generate.prompt_cache import Store
from minimind_v.core.generate.sampling import GREEDY, Sampler
from minimind_v.core.model.vlm import VLM

TOGETHER = 16  # rows of a forward pass; fixed, so that no setting changes a digit
GUESSES = 4  # passes for an answer before it is decoded
SHORT = 12  # tokens of the longest answer that is guessed
FEATURES = 512 * 2**20  # bytes of features that are kept


@dataclass(frozen=True)
class Reading:
    """A row that the model reads: a prompt and an answer behind it, whose tokens are scored."""

    prompt: Tokens
    answer: tuple[int, ...]
    images: tuple[str, ...]
    firsts: tuple[int, ...] = ()  # tokens whose log-probabilities in the answer's first place are of interest

    @property
    def order(self) -> tuple[int, list[int], tuple[int, ...], tuple[str, ...]]:
        """Rows of like length together; equal rows beside each other, so that the file's order changes nothing."""
        return len(self.prompt) + len(self.answer), self.prompt.input_ids, self.answer, self.images


@dataclass(frozen=True)
class Scored:
    """Of each token of a reading's answer: its log-probability, and the likeliest token in its place."""

    logprobs: list[float]
    likeliest: list[int]
    firsts: tuple[float, ...] = ()


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
        self.engine = Engine(model, tokenizer)
        self.prompts: PromptEncoder = self.engine.processor.prompts
        counts = Counter(guesses)
        ordered = sorted(counts, key=lambda text: (-counts[text], text))
        self._next: dict[tuple[int, ...], tuple[int, ...]] = {}  # beginning → the most frequent guess that has it
        for ids in (ids for ids in map(self._ended, ordered) if len(ids) <= SHORT):
            for end in range(len(ids)):
                self._next.setdefault(ids[:end], ids)

    def reply(self, asks: Sequence[Ask]) -> list[Reply]:
        """The replies to asks, in their order. Raises RowError for a prompt that cannot be encoded."""
        replies: dict[Ask, Reply] = {}
        scored = [ask for ask in asks if ask.method != "answer"]
        readings = [self._readings(ask) for ask in scored]
        results = iter(self._read([reading for group in readings for reading in group]))
        for ask, group in zip(scored, readings, strict=True):
            replies[ask] = self._scored(ask, [next(results) for _ in group])
        asked = [ask for ask in asks if ask.method == "answer"]
        replies |= zip(asked, self._answers(asked), strict=True)
        return [replies[ask] for ask in asks]

    def _ended(self, text: str) -> tuple[int, ...]:
        return (*self.tokenizer.encode(text).ids, self.tokenizer.eos_id)

    def _prompt(self, ask: Ask) -> Tokens:
        return encode_prompt(self.prompts, ask.messages, len(ask.images))

    def _readings(self, ask: Ask) -> list[Reading]:
        prompt = self._prompt(ask)
        ends = [self._ended(text) for text in ask.candidates]
        if ask.method == "first":  # one pass: its position has the probability of every token
            return [Reading(prompt, ends[0][:1], ask.images, tuple(ids[0] for ids in ends))]
        return [Reading(prompt, ids, ask.images) for ids in ends]

    def _scored(self, ask: Ask, results: Sequence[Scored]) -> Reply:
        if ask.method == "first":
            return Reply("", results[0].firsts, (1,) * len(ask.candidates))
        sums = tuple(float(np.sum(result.logprobs)) for result in results)
        return Reply("", sums, tuple(len(result.logprobs) for result in results))

    def _answers(self, asks: Sequence[Ask]) -> list[Reply]:
        """The greedy answers: guessed where the answers are short, the rest decoded side by side."""
        prompts = [self._prompt(ask) for ask in asks]
        begun: list[tuple[int, ...]] = [() for _ in asks]  # what each answer begins with, for certain
        ended: dict[int, tuple[int, ...]] = {}
        for _ in range(GUESSES):
            open_asks = [n for n, ask in enumerate(asks) if n not in ended and self._guess(ask, begun[n])]
            readings = [Reading(prompts[n], self._guess(asks[n], begun[n]), asks[n].images) for n in open_asks]
            for n, reading, scored in zip(open_asks, readings, self._read(readings), strict=True):
                begun[n] = _agreed(reading.answer, scored.likeliest)
                if begun[n][-1] == self.tokenizer.eos_id:
                    ended[n] = begun[n][:-1]
        replies = {n: Reply(self.tokenizer.decode(list(ids)).strip()) for n, ids in ended.items()}
        rest = [n for n in range(len(asks)) if n not in ended]
        replies |= zip(rest, self._decode([asks[n] for n in rest], [prompts[n] for n in rest]), strict=True)
        return [replies[n] for n in range(len(asks))]

    def _guess(self, ask: Ask, begun: tuple[int, ...]) -> tuple[int, ...]:
        """The most frequent answer that begins so; empty for none."""
        return self._next.get(begun, ()) if ask.most_tokens >= SHORT else ()

    def _decode(self, asks: Sequence[Ask], prompts: Sequence[Tokens]) -> list[Reply]:
        events: list[list[Event]] = [[] for _ in asks]
        for ask, tokens, received in zip(asks, prompts, events, strict=True):
            images = [self.features(digest) for digest in ask.images]
            request = Request(Prompt(tokens, images), Sampler(GREEDY), ask.most_tokens)  # type: ignore[arg-type]
            self.engine.submit(request, received.append)
        while self.engine.step():
            pass
        for received in events:
            if (error := received[-1].error) is not None:
                raise error
        return [Reply("".join(event.text for event in received).strip()) for received in events]

    def _read(self, readings: Sequence[Reading]) -> list[Scored]:
        """Score readings in groups of like length, of a fixed number of rows."""
        order = sorted(range(len(readings)), key=lambda n: readings[n].order)
        results: dict[int, Scored] = {}
        for begin in range(0, len(order), TOGETHER):
            group = order[begin : begin + TOGETHER]
            results |= zip(group, self._forward([readings[n] for n in group]), strict=True)
        return [results[n] for n in range(len(readings))]

    @torch.inference_mode()
    def _forward(self, readings: Sequence[Reading]) -> list[Scored]:
        device = self.model.device
        rows = [[*reading.prompt.input_ids, *reading.answer[:-1]] for reading in readings]  # the last predicts nothing
        masks = [[*r.prompt.image_mask, *[False] * (len(r.answer) - 1)] for r in readings]
        ids = _padded(rows, self.tokenizer.pad_id).to(device)  # [B, T]
        image_mask = _padded(masks, False).to(device)
        attention_mask = _padded([[True] * len(row) for row in rows], False).to(device)
        positions = [
            number * ids.shape[1] + len(reading.prompt) - 1 + token
            for number, reading in enumerate(readings)
            for token in range(len(reading.answer))
        ]
        images = [self.features(digest) for reading in readings for digest in reading.images]
        features = torch.stack(images).to(device) if images else None  # [M, P, width]
        logprobs = answer_logprobs(
            self.model, ids, attention_mask, image_mask, features, torch.tensor(positions, device=device), self.dtype
        )  # [S, V]
        answers = torch.tensor([id for reading in readings for id in reading.answer])
        chosen, likeliest = logprobs.gather(1, answers[:, None])[:, 0], logprobs.argmax(dim=1)
        results, at = [], 0
        for reading in readings:
            own = slice(at, at + len(reading.answer))
            firsts = tuple(logprobs[at, list(reading.firsts)].tolist())
            results.append(Scored(chosen[own].tolist(), likeliest[own].tolist(), firsts))
            at = own.stop
        return results


def encode_prompt(prompts: PromptEncoder, messages: Messages, images: int) -> Tokens:
    """The tokens of a prompt. Raises RowError where it is too long, or its marks and images differ in number."""
    tokens = prompts.prompt([{"role": role, "content": content} for role, content in messages])
    if tokens.images != images:
        raise RowError(f"{tokens.images} image marks for {images} images", "placeholders")
    if len(tokens) >= CONTEXT // 2:
        raise RowError(f"the question is longer than {CONTEXT // 2} tokens", "too long")
    return tokens


def _agreed(guess: Sequence[int], likeliest: Sequence[int]) -> tuple[int, ...]:
    """The beginning of the greedy answer: the guess as far as it is right, and the token that is right behind it."""
    same = next((n for n, (token, best) in enumerate(zip(guess, likeliest, strict=True)) if token != best), len(guess))
    return tuple(likeliest[: same + 1])


def _padded(rows: Sequence[Sequence[int]], value: float) -> Tensor:
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)
