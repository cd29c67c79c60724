"""`mmv chat`: ask a model about pictures, once or in conversation."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minimind_v.cli import options
from minimind_v.cli.command import Command
from minimind_v.cli.terminal import Terminal
from minimind_v.core.errors import MmvError, UsageError, open_all
from minimind_v.core.hub.sources import PICTURE_ENDINGS

if TYPE_CHECKING:
    import numpy as np

    from minimind_v.core.generate.session import Session

HELP = "/image FILE adds a picture to the next question, /new starts over, /quit leaves; Ctrl-C stops an answer"


class ChatCommand(Command):
    """Takes one question, and the last of several --model."""

    once = ()

    def too_many(self, values: dict[str, Any], extra: Sequence[str]) -> str:
        words = [str(values.get("prompt") or ""), *extra]
        if values.get("image") and any(Path(word).suffix.lower() in PICTURE_ENDINGS for word in words[:-1]):
            options = [word for picture in [*values["image"], *words[:-1]] for word in ("--image", picture)]
            return f"each picture needs an --image of its own: {shlex.join(['mmv', 'chat', *options, words[-1]])}"
        return f"the question is one word for the shell, in quotes: {shlex.join(['mmv', 'chat', ' '.join(words)])}"


def chat(
    prompt: Annotated[str | None, typer.Argument(help="A question; without one, a conversation begins.")] = None,
    image: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="A picture; may be given several times.")
    ] = None,
    model: options.Model = None,
    vision_model: options.VisionOfModel = None,
    tokenizer: options.TokenizerOfModel = None,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.65,
    top_p: Annotated[float, typer.Option(help="Share of probability that is drawn from.")] = 0.85,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 512,
    greedy: Annotated[
        bool, typer.Option("--greedy", help="The likeliest token always; the same as --temperature 0.")
    ] = False,
    seed: Annotated[int | None, typer.Option(help="Makes the draw repeatable.")] = None,
    device: options.Device = "auto",
    json: options.Json = False,
) -> None:
    """Ask about pictures. The answer goes to stdout as it comes; everything else to stderr."""
    terminal = Terminal()
    someone_types = sys.stdin is not None and sys.stdin.isatty()
    if prompt is None and not someone_types:
        prompt = _piped()
    if prompt is None and (json or not someone_types):
        raise typer.BadParameter("a question is needed: mmv chat --image dog.jpg 'What is this?'", param_hint="PROMPT")
    from minimind_v.core.generate.settings import Sampling
    from minimind_v.core.inputs import check_marks, find_picture

    if prompt is not None:
        check_marks(prompt, len(image or ()))
    sampling = Sampling(0.0 if greedy else temperature, top_p, seed)
    loaded, *_ = open_all(
        lambda: options.load(model, vision_model, tokenizer, device),
        *(partial(find_picture, path) for path in image or ()),
    )
    from minimind_v.core.generate.session import Session

    session = Session(loaded.model, loaded.tokenizer, sampling)
    if prompt is not None:
        _once(terminal, session, prompt, image or [], max_new_tokens, json)
    else:
        terminal.say(f"{loaded.checkpoint.path} — {HELP}")
        _converse(terminal, session, [session.look(path) for path in image or ()], max_new_tokens)


def _piped() -> str | None:
    """The question on stdin, if there is one."""
    try:
        return sys.stdin.read().strip() or None if sys.stdin else None
    except UnicodeDecodeError:
        raise UsageError("the question on stdin is not UTF-8 text") from None


def _once(terminal: Terminal, session: Session, prompt: str, pictures: list[Path], limit: int, json: bool) -> None:
    started, first, pieces = time.perf_counter(), None, []
    for piece in session.ask(prompt, pictures, limit):
        first = first or time.perf_counter() - started
        pieces.append(piece)
        if not json:
            terminal.result(piece, end="")
    seconds = time.perf_counter() - started
    if json:
        terminal.json({
            "prompt": prompt, "images": [str(picture) for picture in pictures], "answer": "".join(pieces),
            "tokens": session.new_tokens, "seconds": seconds, "seconds_to_first_token": first or seconds,
        })  # fmt: skip
    else:
        terminal.result("")


def _converse(terminal: Terminal, session: Session, pictures: list[np.ndarray], limit: int) -> None:
    """Pictures are looked at as soon as they are named: nobody waits for that who is still typing a question."""
    while True:
        try:
            line = input("you> ").strip()
        except (EOFError, KeyboardInterrupt):
            terminal.say("")
            return
        except UnicodeDecodeError:
            terminal.warn("that is not UTF-8 text")
            continue
        word, _, rest = line.partition(" ")
        if word in ("/quit", "/exit"):
            return
        if word == "/new":
            session.restart()
            pictures = []
        elif word == "/image" and rest:
            try:
                pictures.append(session.look(Path(rest.strip())))
            except KeyboardInterrupt:
                terminal.say("")
            except MmvError as error:
                terminal.warn(str(error))
        elif word.startswith("/"):
            terminal.say(HELP)
        elif line:
            try:
                for piece in session.ask(line, pictures, limit):
                    terminal.result(piece, end="")
            except KeyboardInterrupt:
                pass
            except MmvError as error:
                terminal.warn(str(error))
            pictures = []  # after an error too: one that cannot be read would spoil every further question
            terminal.result("")
