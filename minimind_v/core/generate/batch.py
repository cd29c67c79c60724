"""Many questions at once: decoding reads every weight once per step, however many answers a step carries on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from minimind_v.core.data.prompt import PromptEncoder, Tokens
from minimind_v.core.data.tokenizer import Tokenizer
from minimind_v.core.errors import UsageError
from minimind_v.core.generate.engine import generate_rows
from minimind_v.core.generate.prompt_cache import ready
from minimind_v.core.generate.sampling import GREEDY, Sampler, Sampling
from minimind_v.core.generate.session import CONTEXT, Image, open_question
from minimind_v.core.model.vision.spec import VisionSpec
from minimind_v.core.model.vlm import VLM


@dataclass(frozen=True)
class Question:
    """What is asked, and about which pictures."""

    text: str
    images: Sequence[Image] = field(default=())


def generate_many(
    model: VLM,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    sampling: Sampling = GREEDY,
    max_new_tokens: int = 512,
    at_once: int = 16,
) -> list[str]:
    """Answer each question as a conversation of its own, `at_once` side by side; answers in the order of questions.

    Greedy answers are those that a `Session` gives; with a seed, question k draws as a session with seed + k does.
    All pictures are read before the first answer is begun. Raises what `Session.ask` does, for the first question
    that cannot be asked.
    """
    model.eval()
    prompts = PromptEncoder(tokenizer, model.spec.tokens_per_image)
    context = min(CONTEXT, model.config.max_position_embeddings)
    asked = [_open(question, prompts, model.spec, context) for question in questions]
    by_length = sorted(range(len(asked)), key=lambda number: len(asked[number].tokens))
    answers = [""] * len(asked)
    for start in range(0, len(asked), at_once):
        numbers = by_length[start : start + at_once]  # of about one length: little padding
        samplers = [
            Sampler(sampling if sampling.seed is None else replace(sampling, seed=(sampling.seed + number) % 2**63))
            for number in numbers
        ]
        limits = [min(max_new_tokens, context - len(asked[number].tokens)) for number in numbers]
        for number, ids in zip(
            numbers, _together(model, tokenizer, [asked[number] for number in numbers], samplers, limits), strict=True
        ):
            answers[number] = tokenizer.decode(ids)
    return answers


@dataclass(frozen=True)
class _Asked:
    tokens: Tokens
    pictures: list[np.ndarray]


def _open(question: Question, prompts: PromptEncoder, spec: VisionSpec, context: int) -> _Asked:
    text, pictures = open_question(question.text, question.images, spec.image_size, spec.fit)
    tokens = prompts.prompt([{"role": "user", "content": text}])
    if len(tokens) >= context:
        raise UsageError(f"the question {text[:40]!r} … is longer than {context} tokens — ask for less at once")
    return _Asked(tokens, pictures)


def _together(
    model: VLM, tokenizer: Tokenizer, asked: list[_Asked], samplers: list[Sampler], limits: list[int]
) -> list[list[int]]:
    """The ids of each answer."""
    memory, device = ready(model), model.device
    longest = max(len(one.tokens) for one in asked)
    cache = memory.decoder.new_cache(len(asked), longest + max(limits))
    input_ids = _pad([one.tokens.input_ids for one in asked], tokenizer.pad_id)  # [B, T]
    attention_mask = _pad([[True] * len(one.tokens) for one in asked], False)
    image_mask = _pad([one.tokens.image_mask for one in asked], False)
    features = memory.features(model, [picture for one in asked for picture in one.pictures])
    steps = generate_rows(
        model,
        cache,
        input_ids.to(device),
        samplers,
        tokenizer.eos_id,
        limits,
        attention_mask.to(device),
        features,
        image_mask.to(device),
    )
    answers: list[list[int]] = [[] for _ in asked]
    for step in steps:
        for row, token in step:
            answers[row].append(token)
    return answers


def _pad(rows: Sequence[list], value: float) -> torch.Tensor:
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)
