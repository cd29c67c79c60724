"""The lines that are typed in a conversation of `mmv chat`: questions, image files, and commands with their values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from minimind_v.cli.chat_answers import RIVALS
from minimind_v.cli.chat_save import Talk, as_address, write_of
from minimind_v.cli.conversation import NONE, Conversation
from minimind_v.cli.typed_line import confirm
from minimind_v.core.errors import MmvError, UsageError, nearest, shorten
from minimind_v.core.files import write_text
from minimind_v.core.generate.settings import check_most
from minimind_v.core.pages.talk import Exchange

PROMPT = "you> "


class Leave(Exception):
    """The user ends the conversation."""


def run(conversation: Conversation) -> None:
    """Read lines until the user ends the conversation."""
    interrupted = False
    while True:
        try:
            line = conversation.lines.read(PROMPT)
        except KeyboardInterrupt:
            if interrupted:
                conversation.terminal.say("")
                return
            interrupted = True
            conversation.terminal.say("\nCtrl-C again ends the conversation")
            continue
        except EOFError:
            conversation.terminal.say("")
            return
        interrupted = False
        try:
            take(conversation, line)
        except Leave:
            return
        except KeyboardInterrupt:
            conversation.terminal.result("")
        except MmvError as error:
            conversation.terminal.warn(str(error), always=True)


def take(conversation: Conversation, line: str) -> None:
    """Carry out one line: a command, image names, or a question. Raises MmvError, and Leave at the end."""
    from minimind_v.core.data.picture_names import SHOWN, split_line

    word, rest = (*line.split(maxsplit=1), "", "")[:2]
    if word in COMMANDS:
        COMMANDS[word].carry_out(conversation, rest.strip())
        return
    names, question = split_line(line)
    if question.startswith("/"):
        word = question.split()[0]
        if "/" in word[1:]:
            raise UsageError(f"{shorten(word, SHOWN)} is neither an image file nor a command — /help shows all")
        raise UsageError(f"unknown command {word}{nearest(word, COMMANDS)} — /help shows all")
    if names:
        conversation.read(names)
    if question:
        conversation.ask(question, conversation.waiting)


# --- commands ---------------------------------------------------------------------------------------------------------


def top(conversation: Conversation, text: str) -> None:
    """Show the rivals of each token, or stop it."""
    conversation.shows_rivals = _switch(text, conversation.shows_rivals)
    if not conversation.shows_rivals:
        conversation.terminal.say("/top is off")
    elif conversation.asked:
        conversation.show_rivals()
    else:
        conversation.terminal.say(
            f"/top is on: each token of an answer is shown with the {RIVALS} likeliest tokens in its place"
        )


def params(conversation: Conversation, text: str) -> None:
    """Report the settings of sampling, or set one."""
    session = conversation.session
    values = {field.name: getattr(session.sampling, field.name) for field in fields(session.sampling)}
    values |= {"max_new_tokens": conversation.limit}
    name, value = (*text.replace("=", " ").split(maxsplit=1), "", "")[:2]
    name = name.lstrip("-").replace("-", "_")
    if name and name not in values:
        raise UsageError(f"unknown setting {name}{nearest(name, values)} — one of {', '.join(values)}")
    if value:
        number = _number(name, value)
        if name == "max_new_tokens":
            check_most(number)
            conversation.limit = number
        else:
            session.sampling = replace(session.sampling, **{name: number})
        values[name] = number
    for shown in [name] if name else values:
        conversation.terminal.say(f"{shown} {NONE if values[shown] is None else values[shown]}")


def think(conversation: Conversation, text: str) -> None:
    """Let the model reason before it answers, or stop it."""
    try:
        conversation.session.think = _switch(text, conversation.session.think)
    except UsageError as error:
        raise UsageError(str(error).partition(" — ")[0]) from None
    conversation.terminal.say(f"/think is {'on' if conversation.session.think else 'off'}")


def save(conversation: Conversation, text: str) -> None:
    """Write the conversation to a file; one that exists is replaced only after a yes."""
    path = Path(text.strip("'\"")).expanduser()
    if not text:
        raise UsageError("/save needs a file name — for example /save talk.html")
    make_text = write_of(path)
    conversation.latest()
    if path.is_dir():
        raise UsageError(f"{path} is a folder — name a file")
    if path.exists() and not confirm(f"{path} exists — replace it?"):
        conversation.terminal.say("not saved")
        return
    exchanges = [
        Exchange(
            asked.text, asked.answer, asked.reasoning, [(name, as_address(pixels)) for name, pixels in asked.images]
        )
        for asked in conversation.asked
    ]
    session = conversation.session
    write_text(path, make_text(Talk(conversation.model, session.system, session.sampling, exchanges)))
    conversation.terminal.say(f"saved {path}")


def show_help(conversation: Conversation, _: str) -> None:
    """List the commands."""
    width = max(len(f"{name} {command.arguments}") for name, command in COMMANDS.items())
    lines = [f"{f'{name} {command.arguments}':<{width}}  {command.help}" for name, command in COMMANDS.items()]
    conversation.terminal.say(
        "\n".join([*lines, "Ctrl-C stops an answer; twice at the prompt, or Ctrl-D, it ends the conversation"])
    )


def leave(conversation: Conversation, _: str) -> None:
    """End the conversation."""
    raise Leave


@dataclass(frozen=True)
class TypedCommand:
    """A command of the conversation."""

    arguments: str
    help: str
    carry_out: Callable[[Conversation, str], None]


COMMANDS = {
    "/image": TypedCommand(
        "FILE|ADDRESS|DIR|PATTERN|none", "adds images to the next question, or removes them", Conversation.image
    ),
    "/new": TypedCommand("", "starts over, without images", Conversation.new),
    "/system": TypedCommand("TEXT|none", "starts over with this system prompt", Conversation.system),
    "/again": TypedCommand("", "answers the latest question once more", Conversation.again),
    "/edit": TypedCommand("", "changes the latest question and answers it; its images stay", Conversation.edit),
    "/blank": TypedCommand("", "answers it with grey images: does the model need them?", Conversation.blank),
    "/top": TypedCommand("on|off", f"shows the {RIVALS} likeliest tokens in the place of each token", top),
    "/params": TypedCommand("NAME VALUE", "shows or sets temperature, top_p, seed and the others", params),
    "/think": TypedCommand("on|off", "lets the model reason before it answers", think),
    "/save": TypedCommand("FILE", "writes the conversation as .md, .json or .html", save),
    "/help": TypedCommand("", "shows this", show_help),
    "/quit": TypedCommand("", "ends the conversation", leave),
    "/exit": TypedCommand("", "ends it, too", leave),
}


def _switch(text: str, present: bool) -> bool:
    """On or off; the other one without a text. Raises UsageError for any other text."""
    if text not in ("", "on", "off"):
        raise UsageError(f"on or off, not {text!r}")
    return text == "on" if text else not present


def _number(name: str, text: str) -> Any:
    """The value of a setting. Raises UsageError for a text that is no such number."""
    if name == "seed" and text == NONE:
        return None
    kind = int if name in ("seed", "top_k", "max_new_tokens") else float
    try:
        return kind(text)
    except ValueError:
        raise UsageError(f"{name} is a {'whole ' * (kind is int)}number, not {text!r}") from None
