"""`mmv chat`: ask a model about images, once, once for each image, or in a conversation."""

from __future__ import annotations

import contextlib
import locale
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minimind_v.cli import options
from minimind_v.cli.chat_answers import NO_IMAGE, show_answer, split
from minimind_v.cli.chat_images import STDIN, ImageNames, check_count, find_display, named, read_image
from minimind_v.cli.command import Command, advanced, output
from minimind_v.cli.terminal import Terminal, command_line
from minimind_v.cli.typed_line import EditedLines, PlainLines, plain_terminal, take_as_text
from minimind_v.core.errors import UsageError, open_all, readable
from minimind_v.core.hub.sources import PICTURE_ENDINGS
from minimind_v.core.signals import exits_on_sigterm

if TYPE_CHECKING:
    from minimind_v.core.data.picture_names import Picture
    from minimind_v.core.formats.load import LoadedModel
    from minimind_v.core.generate.engine import Engine, Prompt
    from minimind_v.core.generate.session import Session
    from minimind_v.core.generate.settings import Sampling

MOST_IN_CONTEXT = 64  # images that any context holds
SIDE_BY_SIDE = 8  # images of a folder that are asked about together


class ChatCommand(Command):
    """A command with one question; of several --model the last one counts."""

    once = ()

    def too_many(self, values: dict[str, Any], extra: Sequence[str]) -> str:
        texts = [str(values.get("prompt") or ""), *extra]
        pictures = [text for text in texts if Path(text).suffix.lower() in PICTURE_ENDINGS]
        question = " ".join(text for text in texts if text not in pictures) or "What is in the image?"
        options = ["--model", str(values["model"])] if values.get("model") else []
        for picture in [*(values.get("image") or []), *pictures]:
            options += ["--image", str(picture)]
        advice = "each image needs its own --image" if pictures else "put the question in quotes"
        return f"{advice}: {command_line('chat', *options, question)}"


QuestionText = Annotated[
    str | None,
    typer.Argument(metavar="PROMPT", help="The question, or a text on stdin. Without both, a conversation starts."),
]
Images = Annotated[
    list[str] | None,
    typer.Option(
        metavar="FILE",
        help="An image file, a web address, or - for stdin; may be given several times. A folder or a quoted pattern "
        "('dogs/*.jpg'): one answer for each image.",
    ),
]
Temperature = Annotated[float, typer.Option(help="Randomness of the answer; 0: always the most likely token.")]
TopP = Annotated[float, advanced(help="Draw from the most likely tokens with this share of probability.")]
TopK = Annotated[int, advanced(help="Draw from so many of the most likely tokens; 0: from all.")]
MinP = Annotated[float, advanced(help="Draw from tokens with at least this share of the likeliest's probability.")]
Penalty = Annotated[float, advanced(help="Divide the odds of tokens that the text has already; 1: do not.")]
Longest = Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")]
Greedy = Annotated[bool, typer.Option("--greedy", help="The same as --temperature 0.")]
Seed = Annotated[int | None, advanced(help="Seed of the random choices.")]
Think = Annotated[bool, typer.Option("--think", help="Let the model reason before it answers; models of 2026 only.")]
System = Annotated[str | None, typer.Option(metavar="TEXT", help="System prompt. [default: that of the model]")]
Plain = Annotated[
    bool, output("--plain", help="No colours, no line editing, no images: for screen readers and scripts.")
]


def chat(
    prompt: QuestionText = None,
    image: Images = None,
    model: options.Model = None,
    vision_model: options.VisionOfModel = None,
    tokenizer: options.TokenizerOfModel = None,
    system: System = None,
    temperature: Temperature = 0.65,
    top_p: TopP = 0.85,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    repetition_penalty: Penalty = 1.0,
    max_new_tokens: Longest = 512,
    greedy: Greedy = False,
    seed: Seed = None,
    think: Think = False,
    device: options.Device = "auto",
    plain: Plain = False,
    json: options.Json = False,
) -> None:
    """Ask about images. The answer goes to stdout; reasoning and everything else go to stderr."""
    wraps, plain = not plain, plain or plain_terminal()
    terminal = Terminal(plain, wraps)
    prompt = _question(prompt, from_stdin=STDIN not in (image or []), json=json)
    from minimind_v.core.generate.settings import Sampling, check_system

    temperature = 0.0 if greedy else temperature
    sampling = Sampling(temperature, top_p, seed, top_k, min_p, repetition_penalty)
    check_system(system)
    display = None if plain or prompt is not None else find_display(terminal.out)
    (images, pictures), loaded = open_all(
        lambda: _read(image or [], prompt),
        lambda: options.load(model, vision_model, tokenizer, device, terminal.say),
    )
    if prompt is not None and images.each:
        sys.exit(_each(terminal, loaded, sampling, prompt, images.names, max_new_tokens, think, system, json))
    from minimind_v.core.generate.session import Session

    session = Session(loaded.model, loaded.tokenizer, sampling, think=think, system=system)
    if prompt is not None:
        _once(terminal, session, prompt, pictures, max_new_tokens, json)
        return
    from minimind_v.cli.conversation import HELP, Conversation
    from minimind_v.cli.typed_commands import COMMANDS, run

    name = str(loaded.checkpoint.path)
    terminal.say(f"{name} — {HELP}")
    lines = PlainLines() if plain else EditedLines(COMMANDS)
    conversation = Conversation(terminal, session, max_new_tokens, lines, name, display)
    with exits_on_sigterm():  # with the terminal as it was before
        if pictures:
            conversation.add(pictures)
        run(conversation)


def _question(prompt: str | None, from_stdin: bool, json: bool) -> str | None:
    """The question of the command line, or that on stdin; None where a conversation starts. Raises UsageError."""
    interactive = sys.stdin is not None and sys.stdin.isatty()
    if prompt is not None:
        return _as_text(prompt)
    if not interactive and from_stdin:
        prompt = _piped()
    if prompt is None and (json or not interactive):
        raise typer.BadParameter(
            "the question is missing: mmv chat --image dog.jpg 'What is this?'", param_hint="PROMPT"
        )
    return prompt


def _piped() -> str | None:
    """The question on stdin, if there is one."""
    try:
        take_as_text("strict")
        return sys.stdin.read().strip() or None if sys.stdin else None
    except UnicodeDecodeError:
        raise UsageError("the question on stdin is not UTF-8 text") from None


def _as_text(word: str) -> str:
    """A word of the command line as UTF-8, whatever the locale is, else in the locale's encoding."""
    for encoding in ("utf-8", locale.getencoding()):
        with contextlib.suppress(UnicodeError):
            return os.fsencode(word).decode(encoding)
    return word


def _read(texts: Sequence[str], prompt: str | None) -> tuple[ImageNames, list[Picture]]:
    """The images of the command line, read before the model, except where each gets an answer of its own.

    Raises UsageError or MissingInput.
    """
    from minimind_v.core.data.picture_names import check_question, pictures_in, read_pictures

    images = named(texts)
    is_batch = images.each and prompt is not None
    if prompt is None:
        check_count(len(images.names), MOST_IN_CONTEXT)
    pictures = [] if is_batch else read_pictures(images.names, read_image)
    if prompt is not None and (asked := pictures_in(prompt)):
        options = [word for name in (*texts, *asked) for word in ("--image", name)]
        command = command_line("chat", *options, "What is in the image?")
        raise UsageError(f"{prompt!r} is an image file, not a question — {command}")
    if prompt is not None:
        check_question(prompt, 1 if is_batch else len(pictures))
    return images, pictures


def _once(terminal: Terminal, session: Session, prompt: str, pictures: list[Picture], limit: int, json: bool) -> None:
    if not pictures and not json:
        terminal.say(f"{NO_IMAGE} (add one with --image FILE)")
    started = time.perf_counter()
    answer = session.ask(prompt, pictures, limit)
    if not json:
        show_answer(terminal, answer, session.think)
        return
    first, pieces = None, []
    for piece in answer:
        first = first or time.perf_counter() - started
        pieces.append(piece)
    seconds = time.perf_counter() - started
    terminal.json({
        "prompt": prompt, "images": [picture.name for picture in pictures], **_texts("".join(pieces), session.think),
        "tokens": session.new_tokens, "seconds": seconds, "seconds_to_first_token": first or seconds,
    })  # fmt: skip


def _each(
    terminal: Terminal,
    loaded: LoadedModel,
    sampling: Sampling,
    prompt: str,
    names: list[str],
    limit: int,
    think: bool,
    system: str | None,
    json: bool,
) -> int:
    """Ask about each image by itself, and write each answer behind its image's name. Returns the exit code."""
    from minimind_v.core.generate.batch import answer_each
    from minimind_v.core.generate.engine import Engine

    engine = Engine(loaded.model, loaded.tokenizer, most_rows=SIDE_BY_SIDE)
    engine.processor.prompts.answer_start(think)  # a model that cannot think is refused once, and not for each image
    prompts = [_opener(engine, name, prompt, limit, think, system) for name in names]
    code = 0
    with contextlib.ExitStack() as stack:
        progress = None if _is_one_stream() else stack.enter_context(terminal.progress("images"))
        for number, answer in enumerate(answer_each(engine, prompts, sampling, limit)):
            name, error = names[number], answer.error
            if error is not None:
                code = 1
                message = readable(str(error))
                terminal.warn(message if name in message else f"{name}: {message}", always=True)
            if json and error is not None:
                terminal.json({"prompt": prompt, "images": [name], "error": message})
            elif json:
                terminal.json({
                    "prompt": prompt, "images": [name], **_texts(answer.text, think), "tokens": answer.tokens,
                    "seconds": answer.seconds, "seconds_to_first_token": answer.seconds_to_first_token,
                })  # fmt: skip
            elif error is None:
                terminal.result(f"{name}: {_texts(answer.text, think)['answer']}")
            if progress:
                progress(number + 1, len(names))
    return code


def _is_one_stream() -> bool:
    """Whether stdout and stderr are the same terminal, pipe or file: there answers show the progress themselves."""
    try:
        return sys.stdout.isatty() or os.path.sameopenfile(sys.stdout.fileno(), sys.stderr.fileno())
    except (OSError, ValueError):  # a stream that is no file
        return False


def _opener(
    engine: Engine, name: str, question: str, limit: int, think: bool, system: str | None
) -> Callable[[], Prompt]:
    """A function that reads an image and makes the prompt of a question about it."""
    opening = [] if system is None else [{"role": "system", "content": system}]

    def open_prompt() -> Prompt:
        text, pixels = engine.processor.question(question, [read_image(name)])
        return engine.prompt([*opening, {"role": "user", "content": text}], pixels, limit, think)

    return open_prompt


def _texts(text: str, think: bool) -> dict[str, str]:
    """The answer in a generated text, and its reasoning where the model was asked to reason."""
    reasoning, answer = split(text, think)
    return {"reasoning": reasoning, "answer": answer} if think else {"answer": answer}
