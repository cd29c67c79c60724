"""A conversation with a model: it keeps earlier turns, encodes each further question, and yields the answer as text."""

from __future__ import annotations

from collections.abc import Generator

import numpy as np

from minimind_v.core.data.processor import Image, Images
from minimind_v.core.data.prompt import Tokens
from minimind_v.core.data.thinking import split_answer
from minimind_v.core.data.tokenizer import Tokenizer
from minimind_v.core.generate.engine import CONTEXT, Engine, Prompt, Request
from minimind_v.core.generate.prompt_cache import ready
from minimind_v.core.generate.sampling import Sampler, Sampling
from minimind_v.core.model.vlm import VLM


class Session:
    """Keeps the tokens and images of all earlier turns; the engine keeps what it computed for them."""

    def __init__(
        self, model: VLM, tokenizer: Tokenizer, sampling: Sampling, context: int = CONTEXT, think: bool = False
    ) -> None:
        """With `think` each answer begins with reasoning, up to `</think>`, which later turns do not contain.

        Raises UsageError where the chat layout has no reasoning.
        """
        self.engine = Engine(model, tokenizer, context, most_rows=1)
        self.prompts = self.engine.processor.prompts
        self.think = think
        self._start = len(self.prompts.answer_start(think))  # tokens of a prompt that begin its answer
        self.sampler = Sampler(sampling)
        self.new_tokens = 0  # of the latest answer
        self.dropped_turns = 0  # for which the latest question left no room
        self.restart()

    def restart(self) -> None:
        """Forget the conversation."""
        self.turns: list[Tokens] = []  # the opening, and each question with its answer
        self.images: list[np.ndarray] = []
        self.questions = 0  # number of questions so far

    def ask(self, question: str, images: Images = (), max_new_tokens: int = 512) -> Generator[str]:
        """Ask, with images, and get the answer piece by piece.

        A question without `<image>` marks gets one for each image, in front. Where the conversation is longer than the
        context, its earliest turns are forgotten: `dropped_turns` counts them. Raises MissingInput, UsageError or
        RowError where images do not fit the marks or cannot be read, and where the question alone is too long.
        """
        text, pixels = self.engine.processor.question(question, images)
        turns = self._encode(text)
        prompt = self.engine.crop(turns, [*self.images, *pixels], max_new_tokens)
        self.dropped_turns = prompt.dropped_turns
        return self._answer([turns[0], *turns[1 + prompt.dropped_turns :]], prompt, max_new_tokens)

    def encode(self, image: Image) -> np.ndarray:
        """Open an image and encode it before its question comes, whose answer then begins sooner.

        Returns the image as `ask` takes it. Raises MissingInput, UsageError or RowError where it cannot be read.
        """
        pixels = self.engine.processor.pixels(image)
        ready(self.engine.model).embed(self.engine.model, pixels)
        return pixels

    def _encode(self, question: str) -> list[Tokens]:
        if not self.turns:
            return self.prompts.turns([{"role": "user", "content": question}], self.think)
        return [*self.turns, self.prompts.follow_up(question, self.think)]

    def _answer(self, turns: list[Tokens], prompt: Prompt, max_new_tokens: int) -> Generator[str]:
        ids: list[int] = []
        ended = False
        try:
            for event in self.engine.stream(Request(prompt, self.sampler, max_new_tokens)):
                if event.token is not None:
                    ids.append(event.token)
                if event.text:
                    yield event.text
            ended = True
        finally:  # however the answer ended, even inside a layer: the next question follows a closed turn
            if ids or ended:  # else the question itself was not read: as if it had never been asked
                self.turns = [*turns[:-1], self._closed(turns[-1], ids)]
                self.images = list(prompt.images)
                self.questions += 1
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
