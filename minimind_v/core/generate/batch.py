"""Answer many questions at once: each step reads every weight once for all answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from minimind_v.core.data.processor import Images
from minimind_v.core.data.tokenizer import Tokenizer
from minimind_v.core.generate.engine import Engine, Event, Request
from minimind_v.core.generate.sampling import GREEDY, Sampler, Sampling
from minimind_v.core.model.vlm import VLM


@dataclass(frozen=True)
class Question:
    """A text and its images."""

    text: str
    images: Images = ()


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
    engine = Engine(model, tokenizer, most_rows=at_once)
    prompts = []
    for question in questions:
        text, pixels = engine.processor.question(question.text, question.images)
        prompts.append(engine.prompt([{"role": "user", "content": text}], pixels, max_new_tokens))
    events: list[list[Event]] = [[] for _ in prompts]
    for number, prompt in enumerate(prompts):
        seed = None if sampling.seed is None else (sampling.seed + number) % 2**63
        request = Request(prompt, Sampler(replace(sampling, seed=seed)), max_new_tokens)
        engine.submit(request, events[number].append)
    while engine.step():
        pass
    for answer in events:
        if (error := answer[-1].error) is not None:
            raise error
    return ["".join(event.text for event in answer) for answer in events]
