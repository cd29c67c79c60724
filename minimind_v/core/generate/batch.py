"""Answer many questions at once: each step reads every weight once for all answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from minimind_v.core.data.processor import Images, Processor
from minimind_v.core.data.prompt import Tokens
from minimind_v.core.data.tokenizer import Tokenizer
from minimind_v.core.errors import UsageError
from minimind_v.core.generate.engine import generate_rows
from minimind_v.core.generate.prompt_cache import ready
from minimind_v.core.generate.sampling import GREEDY, Sampler, Sampling
from minimind_v.core.generate.session import CONTEXT
from minimind_v.core.model.vlm import VLM


@dataclass(frozen=True)
class Question:
    """A text and its images."""

    text: str
    images: Images = ()


@dataclass(frozen=True)
class Prompt:
    """A question, encoded."""

    tokens: Tokens
    images: list[np.ndarray]  # uint8 [3, S, S] each


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
    All images are read before the first answer begins. Raises what `Session.ask` does, for the first question that
    cannot be asked.
    """
    model.eval()
    processor = Processor(tokenizer, model.spec)
    context = min(CONTEXT, model.config.max_position_embeddings)
    prompts = [_encode(question, processor, context) for question in questions]
    by_length = sorted(range(len(prompts)), key=lambda number: len(prompts[number].tokens))
    answers = [""] * len(prompts)
    for start in range(0, len(prompts), at_once):
        numbers = by_length[start : start + at_once]  # of about the same length: little padding
        samplers = [
            Sampler(sampling if sampling.seed is None else replace(sampling, seed=(sampling.seed + number) % 2**63))
            for number in numbers
        ]
        limits = [min(max_new_tokens, context - len(prompts[number].tokens)) for number in numbers]
        group = [prompts[number] for number in numbers]
        ids_of_group = _answer(model, processor, tokenizer.eos_id, group, samplers, limits)
        for number, ids in zip(numbers, ids_of_group, strict=True):
            answers[number] = tokenizer.decode(ids)
    return answers


def _encode(question: Question, processor: Processor, context: int) -> Prompt:
    text, images = processor.question(question.text, question.images)
    tokens = processor.prompts.prompt([{"role": "user", "content": text}])
    if len(tokens) >= context:
        raise UsageError(f"the question {text[:40]!r} … is longer than {context} tokens — shorten it")
    return Prompt(tokens, images)


def _answer(
    model: VLM, processor: Processor, eos_id: int, prompts: list[Prompt], samplers: list[Sampler], limits: list[int]
) -> list[list[int]]:
    """The ids of each answer."""
    prompt_cache, device = ready(model), model.device
    inputs = {name: tensor.to(device) for name, tensor in processor.pad([p.tokens for p in prompts]).items()}  # [B, T]
    cache = prompt_cache.decoder.new_cache(len(prompts), inputs["input_ids"].shape[1] + max(limits))
    features = prompt_cache.features(model, [image for prompt in prompts for image in prompt.images])
    steps = generate_rows(
        model,
        cache,
        inputs["input_ids"],
        samplers,
        eos_id,
        limits,
        inputs["attention_mask"],
        features,
        inputs["image_mask"],
    )
    answers: list[list[int]] = [[] for _ in prompts]
    for step in steps:
        for row, token in step:
            answers[row].append(token)
    return answers
