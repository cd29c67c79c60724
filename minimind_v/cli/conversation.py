"""The conversation of `mmv chat`: its questions, answers and images."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

from minimind_v.cli.chat_answers import NO_IMAGE, RIVALS, describe_need, show_answer, show_beside, show_rivals, split
from minimind_v.cli.chat_images import Display, check_count, read_image
from minimind_v.cli.terminal import Terminal
from minimind_v.cli.typed_line import LineReader
from minimind_v.core.errors import UsageError, shorten
from minimind_v.core.wording import plural

if TYPE_CHECKING:
    import numpy as np

    from minimind_v.core.data.picture_names import Picture
    from minimind_v.core.generate.session import Session

HELP = "/image FILE adds an image, /new starts over, /help shows all commands, /quit ends; Ctrl-C stops an answer"
MOST_SHOWN = 4  # images of one line that are drawn
NONE = "none"  # the value that removes a system prompt, a seed, or the images of the next question


@dataclass(frozen=True)
class Question:
    """A question that was asked, with its images."""

    text: str
    images: list[tuple[str, np.ndarray]]
    answer: str
    reasoning: str


class Conversation:
    """A conversation at a terminal. It reports at every change which images it has.

    Images are encoded as soon as they are named, while the question is still being typed.
    """

    def __init__(
        self,
        terminal: Terminal,
        session: Session,
        limit: int,
        lines: LineReader,
        model: str = "",
        display: Display | None = None,
    ) -> None:
        """`limit` is the longest answer in tokens; `model` is the name in what /save writes."""
        self.terminal, self.session, self.limit, self.lines = terminal, session, limit, lines
        self.model, self.display = model, display
        self.asked: list[Question] = []
        self.waiting: list[tuple[str, np.ndarray]] = []  # images of the next question
        self.warned = False  # about the missing image
        self.shows_rivals = False

    # --- images -------------------------------------------------------------------------------------------------------

    def image(self, text: str) -> None:
        """Add the images that a text names, or take those of the next question away; without a text, report all."""
        from minimind_v.core.data.picture_names import files_of, split_names

        if not text:
            self.terminal.say(f"{HELP}\n{self.contents()}")
            return
        if text == NONE:
            self.waiting = []
            self.terminal.say(self.contents())
            return
        names = [file for name in split_names(text) for file in files_of(name) or [name]]
        self.read(names)

    def read(self, names: list[str]) -> None:
        """Read images, and add them to the next question."""
        from minimind_v.core.data.picture_names import read_pictures

        check_count(len(names), self.session.engine.context // self.session.prompts.tokens_per_image)
        self.add(read_pictures(names, lambda name: read_image(name, stdin=False)))

    def add(self, pictures: list[Picture]) -> None:
        """Add images to the next question: all of them, or none if one cannot be decoded."""
        images = [(picture.name, self.session.encode(picture)) for picture in pictures]
        self.waiting += images
        self.show(pictures, [pixels for _, pixels in images])
        self.terminal.say(self.contents())

    def show(self, pictures: list[Picture], pixels: list[np.ndarray]) -> None:
        """Show images where the terminal can."""
        from minimind_v.core.data.images import decode

        if self.display is not None:
            for picture, received in list(zip(pictures, pixels, strict=True))[:MOST_SHOWN]:
                self.display.show(decode(picture.data, picture.name), received)

    def contents(self) -> str:
        """The images of the conversation, as text."""
        lists = []
        if self.waiting:
            lists.append(f"for the next question: {_listed([name for name, _ in self.waiting])}")
        if shown := self.shown():
            lists.append(f"in the conversation: {_listed(shown)}")
        return "; ".join(lists) or "no image in the conversation"

    def shown(self) -> list[str]:
        """The names of the images that the model has in the conversation; others went with their questions."""
        names = [name for question in self.asked for name, _ in question.images]
        return names[len(names) - len(self.session.images) :]

    # --- questions ----------------------------------------------------------------------------------------------------

    def ask(self, question: str, images: list[tuple[str, np.ndarray]], instead: bool = False) -> None:
        """Ask, `instead` of the latest question. If the model does not read the question, all stays as it was."""
        try:
            question.encode()
        except UnicodeEncodeError:
            raise UsageError("the question is not UTF-8 text") from None
        if not (images or self.session.images or self.warned):
            self.terminal.say(f"{NO_IMAGE} (add one with /image FILE)")
            self.warned = True
        latest, pieces = self.session.latest, list[str]()
        answer = self.session.ask(question, [pixels for _, pixels in images], self.limit, instead)
        if self.session.dropped_turns:
            count = plural(self.session.dropped_turns, "question")
            self.terminal.say(f"the conversation is too long: the model forgets its beginning ({count})")
        try:
            with closing(answer):
                show_answer(self.terminal, _kept(answer, pieces), self.session.think)
        finally:
            if self.session.latest is not latest:
                self._note(question, images, "".join(pieces), instead)
        if self.shows_rivals:
            self.show_rivals()

    def _note(self, question: str, images: list[tuple[str, np.ndarray]], text: str, instead: bool) -> None:
        """Note a question that the model has read, and its answer as far as it came."""
        if instead:
            self.asked.pop()
        else:
            self.waiting = []
        reasoning, answer = split(text, self.session.think)
        self.asked.append(Question(question, images, answer, reasoning))

    def again(self, _: str) -> None:
        """Answer the latest question once more."""
        before = self.latest()
        self.ask(before.text, before.images, instead=True)
        if not self.session.sampling.temperature and self.asked[-1].answer == before.answer:
            self.terminal.say("temperature 0 gives the same answer each time — /params temperature 0.7 draws others")

    def edit(self, _: str) -> None:
        """Change the latest question, whose answer is dropped; its images stay."""
        before = self.latest()
        if not self.lines.edits:
            self.terminal.say(f"the latest question: {before.text} — type it anew, or nothing to keep it")
        try:
            question = self.lines.read("edit> ", before.text).strip()
        except (KeyboardInterrupt, EOFError):
            question = ""
        if question:
            self.ask(question, before.images, instead=True)
        else:
            self.terminal.say("the question stays as it is")

    def blank(self, _: str) -> None:
        """Answer the latest question with grey images, and compare."""
        before = self.latest()
        if not self.session.images:
            raise UsageError("the conversation has no image — add one with /image FILE")
        with closing(self.session.answer_blank()) as answer:
            _, blank = split("".join(answer), self.session.think)
        show_beside(self.terminal, ("with the images", "with grey images"), (before.answer, blank))
        self.terminal.say(describe_need(self.session.trace(), self.session.trace(blank=True)))

    def show_rivals(self) -> None:
        show_rivals(self.terminal, self.session.trace(RIVALS), self.session.engine.tokenizer)

    def latest(self) -> Question:
        if not self.asked:
            raise UsageError("no question was asked yet")
        return self.asked[-1]

    # --- settings -----------------------------------------------------------------------------------------------------

    def new(self, _: str) -> None:
        """Start a new conversation without images."""
        self._restart(self.session.system)

    def system(self, text: str) -> None:
        """Start a new conversation with a system prompt; without text, report the present one."""
        if text:
            self._restart(None if text == NONE else text)
        present = self.session.system
        standard = self.session.prompts.layout.system_prompt
        default = f"that of the model: {standard}" if standard else "none"
        self.terminal.say(f"system prompt: {default if present is None else present}")

    def _restart(self, system: str | None) -> None:
        dropped = [*self.shown(), *(name for name, _ in self.waiting)]
        self.session.restart(system)
        self.asked, self.waiting = [], []
        again = f"; removed: {_listed(dropped)} — add one again with /image FILE" if dropped else ""
        self.terminal.say(f"a new conversation without images{again}")


def _kept(pieces: Generator[str], kept: list[str]) -> Generator[str]:
    """The same pieces, each also added to a list."""
    for piece in pieces:
        kept.append(piece)
        yield piece


def _listed(names: list[str]) -> str:
    return ", ".join(shorten(name, 120) for name in names)
