"""Answer many questions at once: each step reads every weight once for all answers."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from minimind_v.core.data.processor import Images
from minimind_v.core.data.tokenizer import Tokenizer
from minimind_v.core.errors import MmvError
from minimind_v.core.generate.engine import Engine, Event, Prompt, Request
from minimind_v.core.generate.sampling import GREEDY, Sampler, Sampling
from minimind_v.core.model.vlm import VLM

AHEAD = 4  # answers that may wait for an earlier one, times those that are generated side by side


@dataclass(frozen=True)
class Question:
    """A text and its images."""

    text: str
    images: Images = ()


@dataclass
class BatchAnswer:
    """The answer to one of many questions, or the error in its place."""

    text: str = ""
    tokens: int = 0
    seconds: float = 0.0  # from its prompt to its end
    seconds_to_first_token: float = 0.0
    error: Exception | None = None
    has_ended: bool = False
    _start: float = field(default_factory=time.perf_counter, repr=False)

    def take(self, event: Event) -> None:
        """Receive an event of the engine."""
        self.seconds = time.perf_counter() - self._start
        if event.token is not None:
            self.tokens += 1
        if event.token is None or self.tokens == 1:
            self.seconds_to_first_token = self.seconds_to_first_token or self.seconds
        self.text += event.text
        self.error, self.has_ended = event.error, event.end is not None


def answer_each(
    engine: Engine, prompts: Iterable[Callable[[], Prompt]], sampling: Sampling = GREEDY, max_new_tokens: int = 512
) -> Iterator[BatchAnswer]:
    """Answer prompts as they are opened, `engine.most_rows` side by side; yields the answers in order.

    Few prompts are open at a time, however many there are. With a seed, prompt k draws with seed + k. A prompt that
    raises MmvError, and an answer that ends with an error, yield that error, and the others go on.
    """
    unopened, waiting, side_by_side = enumerate(prompts), deque[BatchAnswer](), engine.most_rows

    def is_free() -> bool:
        return sum(not answer.has_ended for answer in waiting) < side_by_side and len(waiting) < AHEAD * side_by_side

    while True:
        while is_free():
            number, opener = next(unopened, (0, None))
            if opener is None:
                break
            waiting.append(answer := BatchAnswer())
            seed = None if sampling.seed is None else (sampling.seed + number) % 2**63
            try:
                request = Request(opener(), Sampler(replace(sampling, seed=seed)), max_new_tokens)
                engine.submit(request, answer.take)
            except MmvError as error:
                answer.error, answer.has_ended = error, True
            engine.step()
        if not waiting:
            return
        if waiting[0].has_ended:
            yield waiting.popleft()
        else:
            engine.step()


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
    texts = []
    for answer in answer_each(engine, [partial(_same, prompt) for prompt in prompts], sampling, max_new_tokens):
        if answer.error is not None:
            raise answer.error
        texts.append(answer.text)
    return texts


def _same(prompt: Prompt) -> Prompt:
    return prompt
