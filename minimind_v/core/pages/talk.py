"""The page of a conversation that `mmv chat` saves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

from minimind_v.core.pages.frame import page


@dataclass
class Exchange:
    """A question and its answer."""

    question: str
    answer: str = ""
    reasoning: str = ""
    images: list[tuple[str, str]] = field(default_factory=list)  # the name of each, and its address: a data URI


def talk_page(title: str, system: str | None, exchanges: Sequence[Exchange]) -> str:
    """The whole page, with the images in it."""
    body = [f"<h1>{escape(title)}</h1>"]
    if system is not None:
        body.append(f'<p class="system">{escape(system)}</p>')
    for exchange in exchanges:
        images = "".join(
            f'<figure><img src="{escape(source)}" alt="{escape(name)}"><figcaption>{escape(name)}</figcaption></figure>'
            for name, source in exchange.images
        )
        body.append(f'<section class="question">{images}<p>{escape(exchange.question)}</p></section>')
        answer = f"<p>{escape(exchange.answer)}</p>"
        if exchange.reasoning:
            answer = f"<details><summary>reasoning</summary><p>{escape(exchange.reasoning)}</p></details>{answer}"
        body.append(f'<section class="answer">{answer}</section>')
    return page(title, f"<main>{''.join(body)}</main>", "talk")
