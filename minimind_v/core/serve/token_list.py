"""The tokens of an answer with their log-probabilities, in step with the text that is sent."""

from __future__ import annotations

from collections import deque
from typing import Any

from minimind_v.core.curate.token_text import TokenReader
from minimind_v.core.data.tokenizer import Tokenizer
from minimind_v.core.generate.engine import Event

LOWEST = -9999.0  # the log-probability of a token that has none, as OpenAI's


class TokenList:
    """Lists a token once its text is sent, so that the tokens of a stop text, which is not sent, are not listed."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._reader, self._tokenizer = TokenReader(tokenizer), tokenizer
        self._waiting: deque[tuple[int, dict[str, Any]]] = deque()  # each with its bytes of text
        self._listed = self._sent = 0  # bytes

    def add(self, event: Event) -> list[dict[str, Any]]:
        """The tokens whose text is complete with an event, in OpenAI's form."""
        self._sent += len(event.text.encode())
        if event.token is not None and event.logprob is not None:
            likeliest = [self._named(*pair) for pair in event.likeliest]
            entry = {**self._named(event.token, event.logprob), "top_logprobs": likeliest}
            size = len(entry["bytes"]) if self._tokenizer.decode([event.token]) else 0  # a special token has no text
            self._waiting.append((size, entry))
        tokens = []
        while self._waiting and self._is_sent(self._waiting[0][0], event.end is not None):
            size, entry = self._waiting.popleft()
            self._listed += size
            tokens.append(entry)
        return tokens

    def _is_sent(self, size: int, ended: bool) -> bool:
        return self._listed < self._sent if ended else self._listed + size <= self._sent

    def _named(self, token: int, logprob: float) -> dict[str, Any]:
        data = self._reader.bytes_of(token)
        return {"token": data.decode("utf-8", "replace"), "logprob": max(logprob, LOWEST), "bytes": list(data)}
