"""What a task asks a model and what the model gives, as plain data."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np

from minimind_v.core.rows.row import IMAGE_MARK

Messages = tuple[tuple[str, str], ...]  # role and content each, an `<image>` mark per image; the last is a question
SEEN, BLANK, SWAPPED, NONE = VARIANTS = ("seen", "blank", "swapped", "none")  # images of a question
Method = Literal["answer", "likelihood", "supervised", "first"]


@dataclass(frozen=True)
class Ask:
    """A prompt, and what the model does with it.

    `answer`: the likeliest answer, of up to `most_tokens`, token by token.
    `likelihood`: the log-probability of each candidate with its end token, and its tokens. `supervised`: the same of
    all tokens that training supervises, which include the text behind the end token. `first`: the log-probability of
    each candidate's first token.
    """

    messages: Messages
    method: Method = "answer"
    candidates: tuple[str, ...] = ()
    most_tokens: int = 16
    images: tuple[str, ...] = ()  # digests of the images, in the order of the marks

    @cached_property
    def key(self) -> str:
        """A name by its content: equal asks are answered once."""
        content = [self.messages, self.method, self.candidates, self.most_tokens, self.images]
        return hashlib.blake2b(json.dumps(content).encode("utf-8", "surrogatepass"), digest_size=12).hexdigest()

    def showing(self, images: tuple[str, ...]) -> Ask:
        """The same with these images; without any, the marks go as well."""
        if images:
            return replace(self, images=images)
        messages = tuple((role, _without_marks(content)) for role, content in self.messages)
        return replace(self, messages=messages, images=())


@dataclass(frozen=True)
class Reply:
    """What a model gave: a text, or for each candidate a log-probability and a number of tokens.

    A text has these two as well, without its end; an empty text has none.
    """

    text: str = ""
    logprobs: tuple[float, ...] = ()
    tokens: tuple[int, ...] = ()

    @property
    def probability(self) -> float | None:
        """How probable the model's text was; None where that is not known."""
        return math.exp(min(self.logprobs[0], 0.0)) if self.logprobs else None


def perplexity(loss: Any) -> Any:
    """The perplexity of a loss in nats per token, or of an array of losses; it is finite for any loss."""
    return np.exp(np.minimum(loss, 50.0))


def _without_marks(content: str) -> str:
    return content.replace(f"{IMAGE_MARK}\n", "").replace(f"\n{IMAGE_MARK}", "").replace(IMAGE_MARK, "")
