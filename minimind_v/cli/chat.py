"""`mmv chat`: ask a model about images, once or in a conversation."""

from __future__ import annotations

import contextlib
import io
import locale
import os
import shlex
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minimind_v.cli import options
from minimind_v.cli.command import Command, advanced
from minimind_v.cli.terminal import Terminal
from minimind_v.core.errors import MmvError, UsageError, open_all, shorten
from minimind_v.core.hub.sources import PICTURE_ENDINGS
from minimind_v.core.wording import plural

if TYPE_CHECKING:
    import numpy as np

    from minimind_v.core.data.picture_names import Picture
    from minimind_v.core.generate.session import Session

HELP = "/image FILE adds an image to the next question, /new starts over, /quit ends; Ctrl-C stops an answer"
NO_IMAGE = "no image: the model answers from the text alone"


class ChatCommand(Command):
    """A command with one question; of several --model the last one counts."""

    once = ()

    def too_many(self, values: dict[str, Any], extra: Sequence[str]) -> str:
        questions = [str(values.get("prompt") or ""), *extra]
        if values.get("image") and any(Path(word).suffix.lower() in PICTURE_ENDINGS for word in questions[:-1]):
            options = [word for picture in [*values["image"], *questions[:-1]] for word in ("--image", picture)]
            return f"each image needs its own --image: {shlex.join(['mmv', 'chat', *options, questions[-1]])}"
        return f"put the question in quotes: {shlex.join(['mmv', 'chat', ' '.join(questions)])}"


def chat(
    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="The question. Without one, a conversation starts.")
    ] = None,
    image: Annotated[
        list[str] | None, typer.Option(metavar="FILE", help="An image file; may be given several times.")
    ] = None,
    model: options.Model = None,
    vision_model: options.VisionOfModel = None,
    tokenizer: options.TokenizerOfModel = None,
    temperature: Annotated[
        float, typer.Option(help="Randomness of the answer; 0: always the most likely token.")
    ] = 0.65,
    top_p: Annotated[float, advanced(help="Draw from the most likely tokens with this share of probability.")] = 0.85,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 512,
    greedy: Annotated[bool, typer.Option("--greedy", help="The same as --temperature 0.")] = False,
    seed: Annotated[int | None, advanced(help="Seed of the random choices.")] = None,
    think: Annotated[
        bool, typer.Option("--think", help="Let the model reason before it answers; models of 2026 only.")
    ] = False,
    device: options.Device = "auto",
    json: options.Json = False,
) -> None:
    """Ask about images. The answer goes to stdout; reasoning and everything else go to stderr."""
    terminal = Terminal()
    prompt = prompt and _as_text(prompt)
    interactive = sys.stdin is not None and sys.stdin.isatty()
    if prompt is None and not interactive:
        prompt = _piped()
    if prompt is None and (json or not interactive):
        raise typer.BadParameter(
            "the question is missing: mmv chat --image dog.jpg 'What is this?'", param_hint="PROMPT"
        )
    from minimind_v.core.generate.settings import Sampling

    sampling = Sampling(0.0 if greedy else temperature, top_p, seed)
    pictures, loaded = open_all(
        lambda: _read(image or [], prompt),
        lambda: options.load(model, vision_model, tokenizer, device, terminal.say),
    )
    from minimind_v.core.generate.session import Session

    session = Session(loaded.model, loaded.tokenizer, sampling, think=think)
    if prompt is not None:
        _once(terminal, session, prompt, pictures, max_new_tokens, json)
        return
    terminal.say(f"{loaded.checkpoint.path} — {HELP}")
    conversation = Conversation(terminal, session, max_new_tokens)
    if pictures:
        conversation.add(pictures)
    conversation.run()


def _piped() -> str | None:
    """The question on stdin, if there is one."""
    try:
        _take_as_text("strict")
        return sys.stdin.read().strip() or None if sys.stdin else None
    except UnicodeDecodeError:
        raise UsageError("the question on stdin is not UTF-8 text") from None


def _take_as_text(errors: str) -> None:
    """Read stdin as UTF-8 where the locale is plain ASCII."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        ascii_only = sys.stdin.encoding.lower() in ("ascii", "us-ascii", "ansi_x3.4-1968", "646")
        sys.stdin.reconfigure(encoding="utf-8" if ascii_only else None, errors=errors)


def _as_text(word: str) -> str:
    """A word of the command line as UTF-8, whatever the locale is, else in the locale's encoding."""
    for encoding in ("utf-8", locale.getencoding()):
        with contextlib.suppress(UnicodeError):
            return os.fsencode(word).decode(encoding)
    return word


def _read(images: Sequence[str], prompt: str | None) -> list[Picture]:
    """The images of the command line, read before the model. Raises UsageError or MissingInput."""
    from minimind_v.core.data.picture_names import check_marks, pictures_in, read_pictures, split_names

    named = [split_names(image) for image in images]
    if not all(named):
        raise UsageError("--image is empty — name a file")
    names = [name for group in named for name in group]
    pictures = read_pictures(names)
    if prompt is not None and (asked := pictures_in(prompt)):
        options = [word for name in (*names, *asked) for word in ("--image", name)]
        command = shlex.join(["mmv", "chat", *options, "What is in the image?"])
        raise UsageError(f"{prompt!r} is an image file, not a question — {command}")
    if prompt is not None:
        check_marks(prompt, len(pictures))
    return pictures


def _once(terminal: Terminal, session: Session, prompt: str, pictures: list[Picture], limit: int, json: bool) -> None:
    from minimind_v.core.data.thinking import split_answer

    if not pictures and not json:
        terminal.say(f"{NO_IMAGE} (add one with --image FILE)")
    started = time.perf_counter()
    answer = session.ask(prompt, pictures, limit)
    if not json:
        _show(terminal, answer, session.think)
        return
    first, pieces = None, []
    for piece in answer:
        first = first or time.perf_counter() - started
        pieces.append(piece)
    seconds = time.perf_counter() - started
    reasoning, text = split_answer("".join(pieces)) if session.think else ("", "".join(pieces))
    terminal.json({
        "prompt": prompt, "images": [picture.name for picture in pictures],
        **({"reasoning": reasoning} if session.think else {}), "answer": text,
        "tokens": session.new_tokens, "seconds": seconds, "seconds_to_first_token": first or seconds,
    })  # fmt: skip


def _show(terminal: Terminal, answer: Iterable[str], think: bool) -> None:
    """Write an answer as it comes: its reasoning dimmed to stderr, its text to stdout."""
    from minimind_v.core.generate.detokenize import split_stream

    before = False
    for reasoning, piece in split_stream(answer, think):
        if before and not reasoning:
            terminal.reasoning("\n\n")
        before = reasoning
        if reasoning:
            terminal.reasoning(piece)
        else:
            terminal.result(piece, end="")
    terminal.result("")


class Conversation:
    """A conversation at a terminal. It reports at every change which images it has.

    Images are encoded as soon as they are named, while the question is still being typed.
    """

    def __init__(self, terminal: Terminal, session: Session, limit: int) -> None:
        self.terminal, self.session, self.limit = terminal, session, limit
        self.shown: list[str] = []  # names of the images that the model has read
        self.waiting: list[tuple[str, np.ndarray]] = []  # images of the next question
        self.offered: list[str] = []  # picture files that were typed as a question
        self.warned = False  # about the missing image

    def run(self) -> None:
        """Read lines until the user ends the conversation."""
        _take_as_text("surrogateescape")  # as file names are read
        while True:
            try:
                line = input("you> ")
            except (EOFError, KeyboardInterrupt):
                self.terminal.say("")
                return
            if line.strip() in ("/quit", "/exit"):
                return
            try:
                self.take(line)
            except KeyboardInterrupt:
                self.terminal.result("")
            except MmvError as error:
                self.terminal.warn(str(error))

    def take(self, line: str) -> None:
        """Carry out one line: a command, image names, or a question. Raises MmvError."""
        from minimind_v.core.data.picture_names import pictures_in, read_pictures, split_names

        offered, self.offered = self.offered, []
        word, rest = (*line.split(maxsplit=1), "", "")[:2]
        names = pictures_in(line)
        if not line.strip():
            if offered:
                self.add(read_pictures(offered))
        elif word == "/new":
            self.renew()
        elif word == "/image" and rest.strip():
            self.add(read_pictures(split_names(rest)))
        elif word == "/image":
            self.terminal.say(f"{HELP}\n{self.contents()}")
        elif names and not set(names) <= set(offered):
            self.offer([*offered, *names])
        elif word.startswith("/"):
            self.terminal.say(HELP)
        else:
            self.ask(line.strip())

    def offer(self, names: list[str]) -> None:
        """Ask what to do with a line that is the name of an image."""
        self.offered = names
        self.terminal.say(
            f"{_listed(names)}: an image, not a question — press Enter to add it to the next question, as /image does; "
            "type it again to ask it as text"
        )

    def add(self, pictures: list[Picture]) -> None:
        """Add images to the next question: all of them, or none if one cannot be decoded."""
        self.waiting += [(picture.name, self.session.encode(picture)) for picture in pictures]
        self.terminal.say(self.contents())

    def renew(self) -> None:
        """Start a new conversation without images."""
        dropped = [*self.shown, *(name for name, _ in self.waiting)]
        self.session.restart()
        self.shown, self.waiting = [], []
        again = f"; removed: {_listed(dropped)} — add one again with /image FILE" if dropped else ""
        self.terminal.say(f"a new conversation without images{again}")

    def ask(self, question: str) -> None:
        """Ask, with the waiting images. If the model did not read the question, they wait for the next one."""
        try:
            question.encode()
        except UnicodeEncodeError:
            raise UsageError("the question is not UTF-8 text") from None
        if not (self.shown or self.waiting or self.warned):
            self.terminal.say(f"{NO_IMAGE} (add one with /image FILE)")
            self.warned = True
        read = self.session.questions
        try:
            with closing(self.session.ask(question, [pixels for _, pixels in self.waiting], self.limit)) as answer:
                if self.session.dropped_turns:
                    count = plural(self.session.dropped_turns, "question")
                    self.terminal.say(f"the conversation is too long: the model forgets its beginning ({count})")
                _show(self.terminal, answer, self.session.think)
        finally:
            if self.session.questions > read:
                names = [*self.shown, *(name for name, _ in self.waiting)]
                self.shown = names[len(names) - len(self.session.images) :]  # others went with their questions
                self.waiting = []

    def contents(self) -> str:
        """The images of the conversation, as text."""
        lists = []
        if self.waiting:
            lists.append(f"for the next question: {_listed([name for name, _ in self.waiting])}")
        if self.shown:
            lists.append(f"in the conversation: {_listed(self.shown)}")
        return "; ".join(lists) or "no image in the conversation"


def _listed(names: list[str]) -> str:
    return ", ".join(shorten(name, 120) for name in names)
