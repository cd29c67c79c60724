"""A conversation with a model: it keeps earlier turns, encodes each further question, and yields the answer as text."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from minimind_v.core.data.images import blank_pixels
from minimind_v.core.data.processor import Image, Images
from minimind_v.core.data.prompt import Tokens
from minimind_v.core.data.thinking import split_answer
from minimind_v.core.data.tokenizer import Tokenizer
from minimind_v.core.errors import UsageError
from minimind_v.core.generate.engine import CONTEXT, Engine, Event, Prompt, Request
from minimind_v.core.generate.prompt_cache import ready
from minimind_v.core.generate.sampling import Sampler, Sampling
from minimind_v.core.generate.settings import check_system
from minimind_v.core.model.vlm import VLM


@dataclass(frozen=True)
class Latest:
    """The latest question that was read, as tokens, and the ids of its answer without the end."""

    prompt: Prompt
    ids: Sequence[int]
    turns: Sequence[Tokens]  # before it
    images: Sequence[np.ndarray]  # before it
    max_new_tokens: int


class Session:
    """Keeps the tokens and images of all earlier turns; the engine keeps what it computed for them."""

    def __init__(
        self,
        model: VLM,
        tokenizer: Tokenizer,
        sampling: Sampling,
        context: int = CONTEXT,
        think: bool = False,
        system: str | None = None,
    ) -> None:
        """With `think` each answer begins with reasoning, up to `</think>`, which later turns do not contain.

        `system` is the system prompt; None is that of the chat layout. Raises UsageError where the chat layout has no
        reasoning, and for a system prompt with an image mark.
        """
        self.engine = Engine(model, tokenizer, context, most_rows=1)
        self.prompts = self.engine.processor.prompts
        self.think, self.sampling = think, sampling
        self.new_tokens = 0  # of the latest answer
        self.dropped_turns = 0  # for which the latest question left no room
        self.restart(system)

    @property
    def think(self) -> bool:
        """Whether the next answers begin with reasoning. Raises UsageError where the chat layout has none."""
        return self._think

    @think.setter
    def think(self, think: bool) -> None:
        self._start = len(self.prompts.answer_start(think))  # tokens of a prompt that begin its answer
        self._think = think

    @property
    def sampling(self) -> Sampling:
        """How the next answers are drawn. A seed begins anew when it is set."""
        return self._sampling

    @sampling.setter
    def sampling(self, sampling: Sampling) -> None:
        self._sampling, self.sampler = sampling, Sampler(sampling)

    def restart(self, system: str | None = None) -> None:
        """Forget the conversation. Raises UsageError for a system prompt with an image mark."""
        check_system(system)
        self.system = system
        self.turns: list[Tokens] = []  # the opening, and each question with its answer
        self.images: list[np.ndarray] = []
        self.latest: Latest | None = None

    def ask(
        self, question: str, images: Images = (), max_new_tokens: int = 512, instead: bool = False
    ) -> Generator[str]:
        """Ask, with images, and get the answer piece by piece; `instead`: in place of the latest question.

        A question without `<image>` marks gets one for each image, in front. Where the conversation is longer than the
        context, its earliest turns are forgotten: `dropped_turns` counts them. The conversation changes when the model
        has read the question; `latest` is another object then. Raises MissingInput, UsageError or RowError where images
        do not fit the marks or cannot be read, and where the question alone is too long.
        """
        text, pixels = self.engine.processor.question(question, images)
        before, earlier = self.turns, self.images
        if instead:
            latest = self._latest()
            before, earlier = list(latest.turns), list(latest.images)
        turns = self._encode(text, before)
        prompt = self.engine.crop(turns, [*earlier, *pixels], max_new_tokens)
        self.dropped_turns = prompt.dropped_turns
        return self._answer(turns, Latest(prompt, (), before, earlier, max_new_tokens))

    def encode(self, image: Image) -> np.ndarray:
        """Open an image and encode it before its question comes, whose answer then begins sooner.

        Returns the image as `ask` takes it. Raises MissingInput, UsageError or RowError where it cannot be read.
        """
        pixels = self.engine.processor.pixels(image)
        ready(self.engine.model).embed(self.engine.model, pixels)
        return pixels

    def trace(self, likeliest: int = 0, blank: bool = False) -> list[Event]:
        """The tokens of the latest answer with their log-probabilities, and those of so many likeliest tokens.

        `blank`: as if all images were grey. The conversation does not change. Raises UsageError before any question.
        """
        latest = self._latest()
        request = Request(self._prompt(blank), _Recorded(latest.ids), len(latest.ids), logprobs=likeliest)
        return [event for event in self.engine.stream(request) if event.token is not None] if latest.ids else []

    def answer_blank(self) -> Generator[str]:
        """Answer the latest question as if all images were grey, piece by piece. The conversation does not change.

        Raises UsageError before any question.
        """
        request = Request(self._prompt(blank=True), Sampler(self.sampling), self._latest().max_new_tokens)
        return (event.text for event in self.engine.stream(request) if event.text)

    def _latest(self) -> Latest:
        if self.latest is None:
            raise UsageError("no question was asked yet")
        return self.latest

    def _prompt(self, blank: bool) -> Prompt:
        """The prompt of the latest question."""
        prompt = self._latest().prompt
        grey = blank_pixels(self.engine.model.spec.image_size)
        return replace(prompt, images=[grey] * len(prompt.images)) if blank else prompt

    def _encode(self, question: str, before: list[Tokens]) -> list[Tokens]:
        if before:
            return [*before, self.prompts.follow_up(question, self.think)]
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return self.prompts.turns([*system, {"role": "user", "content": question}], self.think)

    def _answer(self, turns: list[Tokens], latest: Latest) -> Generator[str]:
        ids: list[int] = []
        ended, prompt = False, latest.prompt
        try:
            for event in self.engine.stream(Request(prompt, self.sampler, latest.max_new_tokens)):
                if event.token is not None:
                    ids.append(event.token)
                if event.text:
                    yield event.text
            ended = True
        finally:  # however the answer ended, even inside a layer: the next question follows a closed turn
            if ids or ended:  # else the question itself was not read: as if it had never been asked
                opening, *later = turns
                self.turns = [opening, *later[prompt.dropped_turns : -1], self._closed(turns[-1], ids)]
                self.images = list(prompt.images)
                self.latest = replace(latest, ids=ids)
            self.new_tokens = len(ids)

    def _closed(self, turn: Tokens, ids: list[int]) -> Tokens:
        """A question and its answer as later prompts have them."""
        if self.think:  # without reasoning
            _, answer = split_answer(self.engine.tokenizer.decode(ids))
            closed = turn.cut(len(turn) - self._start, self.prompts.tokens_per_image)
            closed += self.prompts.answer(answer)
            return closed
        closed = turn.cut(len(turn), self.prompts.tokens_per_image)
        closed += Tokens([*ids], [True] * len(ids), [False] * len(ids))
        closed += self.prompts.answer_end()
        return closed


class _Recorded:
    """Draws tokens that were drawn before."""

    def __init__(self, ids: Sequence[int]) -> None:
        self._ids = iter(ids)

    def __call__(self, logits: Tensor, text_ids: Sequence[int]) -> int:
        return next(self._ids)
