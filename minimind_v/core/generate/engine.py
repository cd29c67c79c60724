"""The engine: it answers requests side by side; each joins at the next step and leaves when it ends.

    engine = Engine(model, tokenizer)
    prompt = engine.prompt([{"role": "user", "content": "<image>\\nWhat is this?"}], ["dog.jpg"])
    for event in engine.stream(Request(prompt, Sampler(GREEDY))):
        print(event.text, end="")

A server calls `submit` and `Answer.cancel` from any thread, and `run` in a thread of its own. On a CPU a request gets
the same bits in any company and whatever is kept from earlier ones, so a seed decides its answer. An engine for a
single row is faster; its last bits may differ from those of the others.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from threading import Condition, Lock
from threading import Event as Flag
from typing import Any, Literal

import numpy as np

from minimind_v.core.data.processor import Image, Processor
from minimind_v.core.data.prompt import Tokens
from minimind_v.core.data.tokenizer import Tokenizer
from minimind_v.core.errors import UsageError
from minimind_v.core.generate.detokenize import TextStream
from minimind_v.core.generate.rows import Draw, Drawn, Row, Rows
from minimind_v.core.generate.settings import check_most
from minimind_v.core.generate.slots import MOST_ROWS
from minimind_v.core.model.kernels.cpu_linear import FEW
from minimind_v.core.model.vlm import VLM
from minimind_v.core.wording import plural

CONTEXT = 4096  # tokens of a conversation; the published models were trained on at most 1536
IDLE = 0.1  # seconds after which an idle engine sees that it must stop

End = Literal["stop", "length", "cancelled", "error"]


class PromptTooLong(UsageError):
    """A question that is longer than the context."""


@dataclass(frozen=True)
class Prompt:
    """The tokens before an answer, and their images."""

    tokens: Tokens
    images: Sequence[np.ndarray] = ()  # uint8 [3, S, S] each
    dropped_turns: int = 0  # the earliest ones, for which the context has no room


@dataclass(frozen=True)
class Request:
    """A prompt, and how it is answered."""

    prompt: Prompt
    draw: Draw  # a `Sampler` of its own, which holds its seed
    max_new_tokens: int = 512  # fewer where the context ends before
    stop: Sequence[str] = ()  # strings before the first of which the text ends
    logprobs: int | None = None  # likeliest tokens that each event names; 0: the probability of its own token only


@dataclass(frozen=True)
class Event:
    """A token of an answer, or its end."""

    token: int | None  # None: the end
    text: str  # what is complete with it: whole characters, and no beginning of a stop string
    logprob: float | None = None  # of the token, before temperature and limits, with `Request.logprobs`
    likeliest: tuple[tuple[int, float], ...] = ()  # tokens and their log-probabilities
    end: End | None = None  # the end token or a stop string · no room for more · `Answer.cancel` · an error
    error: Exception | None = None


class Answer:
    """A request that was submitted."""

    def __init__(self, request: Request, deliver: Callable[[Event], None], row: Row, tokenizer: Tokenizer) -> None:
        self.request, self.row, self.is_cancelled, self.has_ended = request, row, False, False
        self._deliver, self._eos_id, self._text = deliver, tokenizer.eos_id, TextStream(tokenizer, request.stop)

    def cancel(self) -> None:
        """End the answer before the next step. From any thread; an answer that has ended stays as it is."""
        self.is_cancelled = True

    def take(self, drawn: Drawn) -> None:
        """Deliver what a step gave."""
        if drawn.error is not None:
            self.end("error", drawn.error)
        elif drawn.token == self._eos_id:
            self.end("stop")
        else:
            text = self._text.add(drawn.token)
            self._deliver(Event(drawn.token, text, *_logprobs(drawn, self.request.logprobs)))
            if self._text.stopped:
                self.end("stop")
            elif len(self.row.drawn) == self.row.max_new_tokens:
                self.end("length")

    def end(self, reason: End, error: Exception | None = None) -> None:
        """Deliver the last event."""
        self.has_ended = True
        self._deliver(Event(None, self._text.rest(), end=reason, error=error))


class Engine:
    """A model that answers up to `most_rows` requests side by side (None: 16, on a GPU 64); more wait."""

    def __init__(self, model: VLM, tokenizer: Tokenizer, context: int = CONTEXT, most_rows: int | None = None) -> None:
        self.model, self.tokenizer = model.eval(), tokenizer
        self.processor = Processor(tokenizer, model.spec)
        self.context = min(context, model.config.max_position_embeddings)
        self.most_rows = most_rows or (MOST_ROWS if model.device.type == "cuda" else FEW)
        self._rows, self._answers = Rows(model, in_company=self.most_rows > 1), dict[Row, Answer]()
        self._waiting: deque[Answer] = deque()
        self._submitted, self._stepping = Condition(), Lock()

    def prompt(
        self, messages: Any, images: Sequence[Image] = (), max_new_tokens: int = 512, think: bool = False
    ) -> Prompt:
        """The prompt of a conversation whose last message is answered; `think`: beginning with reasoning.

        Messages have a role and a content, in which an `<image>` mark stands for each image, in order.
        Raises RowError, UsageError or MissingInput for malformed messages, for images that cannot be read or do not
        match the marks, and for a last question that is longer than the context. From any thread.
        """
        turns = self.processor.prompts.turns(messages, think)
        if (marks := sum(turn.images for turn in turns)) != len(images):
            raise UsageError(f"the messages have {plural(marks, '<image> mark')} for {plural(len(images), 'image')}")
        return self.crop(turns, [self.processor.pixels(image) for image in images], max_new_tokens)

    def crop(self, turns: Sequence[Tokens], images: Sequence[np.ndarray], max_new_tokens: int) -> Prompt:
        """The prompt of an opening and turns, without the earliest turns where the context is too small.

        A quarter of the context, or `max_new_tokens`, stays free for the answer. Raises UsageError where the last turn
        does not fit, or for an answer of no tokens.
        """
        check_most(max_new_tokens)
        room, dropped = self.context - min(max_new_tokens, self.context // 4), 0
        opening, *later = turns
        while dropped < len(later) - 1 and len(opening) + sum(map(len, later[dropped:])) > room:
            dropped += 1
        tokens = Tokens()
        for turn in (opening, *later[dropped:]):
            tokens += turn
        if len(tokens) >= self.context:
            raise PromptTooLong(f"the question is longer than {self.context} tokens — shorten it, or send fewer images")
        first = opening.images + sum(turn.images for turn in later[:dropped])
        return Prompt(tokens, [*images[: opening.images], *images[first:]], dropped)

    def submit(self, request: Request, deliver: Callable[[Event], None]) -> Answer:
        """Let a request join at the next step. From any thread; `deliver` is called in the thread that steps.

        The last event has an `end`. Raises ValueError for a prompt whose images do not match its tokens.
        """
        tokens, images = request.prompt.tokens, request.prompt.images
        room = max(1, min(request.max_new_tokens, self.context - len(tokens)))
        row = Row(tokens.input_ids, request.draw, room, tokens.image_mask, images)
        answer = Answer(request, deliver, row, self.tokenizer)
        with self._submitted:
            self._waiting.append(answer)
            self._submitted.notify_all()
        return answer

    def step(self) -> bool:
        """Decode a token of each answer, and read a bounded piece of a new prompt; returns whether more is to do."""
        with self._stepping:
            self._remove_cancelled()
            while self._waiting and len(self._answers) < self.most_rows:
                self._join(self._waiting.popleft())
            for drawn in self._rows.step():
                answer = self._answers[drawn.row]
                try:
                    answer.take(drawn)
                except Exception as error:  # of this answer, or of its receiver
                    self._end(answer, "error", error)
                if answer.has_ended:
                    self._leave(answer)
            return bool(self._answers or self._waiting)

    def run(self, stop: Flag) -> None:
        """Step until `stop` is set; wait while nothing is to do."""
        while not stop.is_set():
            if not self.step():
                with self._submitted:
                    self._submitted.wait_for(lambda: self._waiting, IDLE)

    def stream(self, request: Request) -> Generator[Event]:
        """Submit a request and yield its events; steps whatever else is submitted meanwhile. Raises its error."""
        events: deque[Event] = deque()
        answer = self.submit(request, events.append)
        try:
            while True:
                while not events:
                    self.step()
                event = events.popleft()
                if event.error is not None:
                    raise event.error
                yield event
                if event.end is not None:
                    return
        finally:
            answer.cancel()
            with self._stepping:
                self._remove_cancelled()

    def _join(self, answer: Answer) -> None:
        try:
            self._rows.add(answer.row)
            self._answers[answer.row] = answer
        except Exception as error:  # no memory for its keys and values
            self._end(answer, "error", error)

    def _leave(self, answer: Answer) -> None:
        self._rows.remove(answer.row)
        del self._answers[answer.row]

    def _remove_cancelled(self) -> None:
        for answer in [answer for answer in self._answers.values() if answer.is_cancelled]:
            self._leave(answer)
            self._end(answer, "cancelled")
        with self._submitted:
            cancelled = [answer for answer in self._waiting if answer.is_cancelled]
            for answer in cancelled:
                self._waiting.remove(answer)
        for answer in cancelled:
            self._end(answer, "cancelled")

    def _end(self, answer: Answer, reason: End, error: Exception | None = None) -> None:
        with suppress(Exception):  # a receiver that fails misses its answer, the others do not
            answer.end(reason, error)


def _logprobs(drawn: Drawn, count: int | None) -> tuple[float | None, tuple[tuple[int, float], ...]]:
    """The log-probability of the token, and those of the likeliest tokens."""
    if count is None or drawn.logits is None:
        return None, ()
    logprobs = drawn.logits.log_softmax(dim=-1)  # [V]
    values, ids = logprobs.topk(min(count, len(logprobs)))
    return float(logprobs[drawn.token]), tuple(zip(ids.tolist(), values.tolist(), strict=True))
