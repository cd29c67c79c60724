"""`mmv look`: where an answer about an image comes from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minimind_v.cli import options
from minimind_v.cli.chat_images import read_image
from minimind_v.cli.command import Command, advanced
from minimind_v.cli.terminal import Terminal, command_line
from minimind_v.core.errors import UsageError, open_all

if TYPE_CHECKING:
    from minimind_v.core.data.picture_names import Picture
    from minimind_v.core.formats.load import LoadedModel
    from minimind_v.core.generate.trace import TraceSettings
    from minimind_v.core.generate.traced import Trace

EXAMPLE = "mmv look dog.jpg 'What is this?'"


class LookCommand(Command):
    """A command whose last argument is a question."""

    once = (*Command.once, "html", "answer")


def look(
    arguments: Annotated[
        list[str], typer.Argument(metavar="IMAGE... QUESTION", help="Image files or web addresses, and a question.")
    ],
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write a page that shows more of what you point at.")
    ] = None,
    model: options.Model = None,
    answer: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Look into this answer. [default: the model's own]")
    ] = None,
    swap: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE", help="Ask again with this image; one for each image. [default: mirrored]"),
    ] = None,
    occlusion: Annotated[
        bool, typer.Option("--occlusion", help="Paint every patch grey in turn: what does the answer lose?")
    ] = False,
    think: Annotated[
        bool, typer.Option("--think", help="Let the model reason before it answers; models of 2026 only.")
    ] = False,
    max_new_tokens: Annotated[int, advanced(min=1, max=1024, help="Longest answer, in tokens.")] = 128,
    vision_model: options.VisionOfModel = None,
    tokenizer: options.TokenizerOfModel = None,
    device: options.Device = "auto",
    json: options.Json = False,
) -> None:
    """Look inside an answer: what each token owes to the image, attention, and the words of each patch."""
    from minimind_v.core.data.picture_names import read_pictures

    terminal = Terminal()
    names, question = _check(arguments, swap or [], html, model)
    pictures, others, settings, loaded = open_all(
        lambda: read_pictures(names, _read),
        lambda: read_pictures(swap or [], _read),
        lambda: _settings(answer, max_new_tokens, occlusion),
        lambda: options.load(model, vision_model, tokenizer, device, terminal.say),
    )
    with terminal.progress("occlusion") if occlusion else nullcontext() as progress:
        trace = _trace(loaded, question, pictures, others, think, settings, progress)
    if html:
        from minimind_v.core.pages.microscope import write_microscope

        write_microscope(html, trace.as_json())
    if json:
        terminal.json(trace.as_json())
    else:
        from minimind_v.cli.look_view import show_trace

        show_trace(terminal, trace)
    if html:
        terminal.say(f"page: {html}")


def _read(name: str) -> Picture:
    return read_image(name, stdin=False)


def _check(
    arguments: Sequence[str], swap: Sequence[str], html: Path | None, model: Path | None
) -> tuple[list[str], str]:
    """The names of the images, and the question. Raises UsageError before anything is read."""
    from minimind_v.core.data.picture_names import check_question, pictures_in
    from minimind_v.core.outputs import keep_inputs
    from minimind_v.core.pages.frame import check_page

    *names, question = arguments
    if not names:
        raise UsageError(f"{question!r}: an image and a question are needed — {EXAMPLE}")
    texts = [name for name in names if not pictures_in(name)]
    if pictures_in(question) and len(texts) == 1:
        pictures = [word for word in arguments if word not in texts]
        raise UsageError(f"the question stands last: {command_line('look', *pictures, *texts)}")
    if pictures_in(question):
        command = command_line("look", *arguments, "What is in the image?")
        raise UsageError(f"the last argument is an image file, not a question — {command}")
    begin = next((n for n, name in enumerate(names) if n and name.isalpha() and not Path(name).exists()), None)
    if begin:
        command = command_line("look", *names[:begin], " ".join([*names[begin:], question]))
        raise UsageError(f"put the question in quotes: {command}")
    check_question(question, len(names))
    if swap and len(swap) != len(names):
        raise UsageError(f"{len(swap)} images for --swap and {len(names)} of the question — give one for each")
    if html:
        check_page(html)
        keep_inputs([html], [*map(Path, [*names, *swap]), model])
    return names, question


def _settings(answer: str | None, max_new_tokens: int, occlusion: bool) -> TraceSettings:
    from minimind_v.core.generate.trace import TraceSettings

    return TraceSettings(answer, max_new_tokens, occlusion=occlusion)


def _trace(
    loaded: LoadedModel,
    question: str,
    pictures: Sequence[Any],
    others: Sequence[Any],
    think: bool,
    settings: TraceSettings,
    progress: Callable[[int, int], None] | None,
) -> Trace:
    from minimind_v.core.generate.engine import Engine
    from minimind_v.core.generate.trace import trace_answer

    engine = Engine(loaded.model, loaded.tokenizer, most_rows=1)
    text, pixels = engine.processor.question(question, list(pictures))
    settings = replace(settings, swap=[engine.processor.pixels(picture) for picture in others])
    messages = [{"role": "user", "content": text}]
    prompt = engine.prompt(messages, pixels, settings.max_new_tokens, think)
    trace = trace_answer(engine, prompt, settings, question, progress=progress)
    return replace(trace, model=str(loaded.checkpoint.path))
