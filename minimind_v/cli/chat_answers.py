"""How `mmv chat` shows answers: as they come, token by token with rivals, and two beside each other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import exp, log
from typing import TYPE_CHECKING

from rich.cells import cell_len, set_cell_size
from rich.table import Table
from rich.text import Text

from minimind_v.cli.terminal import Terminal

if TYPE_CHECKING:
    from minimind_v.core.data.tokenizer import Tokenizer
    from minimind_v.core.generate.engine import Event

RIVALS = 5  # likeliest tokens that /top shows
SIDE_BY_SIDE = 60  # columns of a terminal that holds two answers beside each other
NO_IMAGE = "no image: the model answers from the text alone"
FEW_BITS = 1.0  # by which an answer is not said to depend on its images


def show_answer(terminal: Terminal, answer: Iterable[str], think: bool) -> None:
    """Write an answer as it comes: its reasoning dimmed to stderr, its text to stdout."""
    from minimind_v.core.generate.detokenize import split_stream

    text, thought = terminal.streams()
    before = False
    try:
        for reasoning, piece in split_stream(answer, think):
            if before and not reasoning:
                thought.add("\n\n")
            before = reasoning
            (thought if reasoning else text).add(piece)
    finally:  # also where the user stops it
        thought.rest()
        text.rest()
    terminal.result("")


def split(text: str, think: bool) -> tuple[str, str]:
    """The reasoning and the answer in a generated text; without `think` all of it is the answer."""
    from minimind_v.core.data.thinking import split_answer

    return split_answer(text) if think else ("", text)


def show_rivals(terminal: Terminal, trace: Sequence[Event], tokenizer: Tokenizer) -> None:
    """Write each token of an answer with its probability, and the likeliest tokens in its place."""
    names = {id: repr(tokenizer.decode([id]) or tokenizer.backend.id_to_token(id)) for id in _ids(trace)}
    width = max((cell_len(names[event.token]) for event in trace if event.token is not None), default=0)
    for event in trace:
        if event.token is not None and event.logprob is not None:
            rivals = "  ".join(f"{names[id]} {_percent(value)}" for id, value in event.likeliest)
            name = set_cell_size(names[event.token], width)  # Chinese characters are two columns wide
            terminal.say(f"{name} {_percent(event.logprob):>6}  likeliest: {rivals}")


def show_beside(terminal: Terminal, titles: tuple[str, str], answers: tuple[str, str]) -> None:
    """Write two answers: in two columns on a wide terminal, else below each other."""
    if terminal.err.is_terminal and terminal.err.color_system and terminal.err.width >= SIDE_BY_SIDE:
        table = Table(*titles, expand=True)
        table.add_row(*(Text(answer) for answer in answers))
        terminal.err.print(table, soft_wrap=False)
        return
    for title, answer in zip(titles, answers, strict=True):
        terminal.say(f"{title}: {answer}")


def describe_need(with_images: Sequence[Event], blank: Sequence[Event]) -> str:
    """How much likelier an answer is with its images than with grey ones; both traces are of the same tokens."""
    bits, blank_bits = (-sum(event.logprob or 0.0 for event in trace) / log(2) for trace in (with_images, blank))
    more = blank_bits - bits
    surprise = f"the answer has {bits:.1f} bits of surprise with the images, {blank_bits:.1f} with grey ones"
    if more > FEW_BITS:
        return f"{surprise}: the model uses the images"
    if more < -FEW_BITS:
        return f"{surprise}: the images make it less likely"
    return f"{surprise}: the model would answer so without the images"


def _ids(trace: Sequence[Event]) -> set[int]:
    likeliest = {id for event in trace for id, _ in event.likeliest}
    return likeliest | {event.token for event in trace if event.token is not None}


def _percent(logprob: float) -> str:
    """A log-probability as a percentage."""
    probability = exp(logprob)
    return f"{probability:.1%}" if probability >= 0.0005 else "<0.1%"
