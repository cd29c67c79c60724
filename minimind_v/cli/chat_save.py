"""A conversation as a file: Markdown, JSON or a page."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minimind_v.core.errors import UsageError, nearest
from minimind_v.core.pages.talk import Exchange, talk_page

if TYPE_CHECKING:
    import numpy as np

    from minimind_v.core.generate.settings import Sampling


@dataclass(frozen=True)
class Talk:
    """What a file has of a conversation."""

    model: str
    system: str | None
    sampling: Sampling
    exchanges: Sequence[Exchange]


def write_of(path: Path) -> Callable[[Talk], str]:
    """The function that makes the text of a file with this ending. Raises UsageError for another ending."""
    ending = path.suffix.lower()
    if ending not in WRITERS:
        raise UsageError(
            f"{path} must end with one of {', '.join(WRITERS)}{nearest(ending, WRITERS)} — for example /save talk.html"
        )
    return WRITERS[ending]


def as_address(pixels: np.ndarray) -> str:
    """Pixels [3, S, S] as a data URI of a PNG."""
    from minimind_v.core.data.images import encode_png
    from minimind_v.core.rows.cells import data_uri

    return data_uri(encode_png(pixels), "png")


def _markdown(talk: Talk) -> str:
    blocks = [f"# {talk.model}"] + ([f"> {talk.system}"] if talk.system is not None else [])
    for exchange in talk.exchanges:
        blocks += [f"![]({_link(name)})" for name, _ in exchange.images]
        blocks.append(f"**{exchange.question}**")
        if exchange.reasoning:
            blocks.append("\n".join(f"> {line}" for line in exchange.reasoning.splitlines()))
        blocks.append(exchange.answer)
    return "\n\n".join(blocks) + "\n"


def _link(name: str) -> str:
    return f"<{name}>" if set(name) & set(" ()") else name


def _json(talk: Talk) -> str:
    messages: list[dict[str, Any]] = [] if talk.system is None else [{"role": "system", "content": talk.system}]
    for exchange in talk.exchanges:
        images = [name for name, _ in exchange.images]
        messages.append({"role": "user", "content": exchange.question} | ({"images": images} if images else {}))
        reasoning = {"reasoning_content": exchange.reasoning} if exchange.reasoning else {}
        messages.append({"role": "assistant", "content": exchange.answer} | reasoning)
    value = {"model": talk.model, "sampling": asdict(talk.sampling), "messages": messages}
    return json.dumps(value, ensure_ascii=False, indent=1) + "\n"


def _page(talk: Talk) -> str:
    return talk_page(talk.model, talk.system, talk.exchanges)


WRITERS: dict[str, Callable[[Talk], str]] = {".md": _markdown, ".json": _json, ".html": _page}
