"""The images of `mmv chat`: where they come from, and how a terminal shows them."""

from __future__ import annotations

import logging
import os
import re
import select
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console

from minimind_v.core.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

    from minimind_v.core.data.picture_names import Picture

STDIN = "-"
COLUMNS, ROWS = 64, 16  # of a terminal, which an image takes at most
PIXELS = 640  # of a side, which a terminal receives at most
GAP = 16  # pixels between an image and the one that the model receives
ATTRIBUTES = re.compile(rb"\x1b\[\?[0-9;]*c")  # a terminal's answer to the query for its attributes
SOON, PATIENCE = 0.05, 0.5  # seconds: an answer of a terminal nearby, and of one far away


@dataclass(frozen=True)
class ImageNames:
    """The images that a command line names."""

    names: list[str]
    each: bool  # each gets an answer of its own, since a folder or a pattern is among them


def named(texts: Sequence[str]) -> ImageNames:
    """The images of `--image`, folders and patterns replaced by their files.

    Raises UsageError for an empty name, MissingInput for a folder or a pattern without files.
    """
    from minimind_v.core.data.picture_names import files_of, split_names

    groups = [split_names(text) for text in texts]
    if not all(groups):
        raise UsageError("--image is empty — name a file")
    names = [name for group in groups for name in group]
    if names.count(STDIN) > 1:
        raise UsageError(f"--image {STDIN} was given twice, and stdin holds one image file")
    files = [[STDIN] if name == STDIN else files_of(name) for name in names]
    each = any(inside is not None and name != STDIN for name, inside in zip(names, files, strict=True))
    return ImageNames([file for name, inside in zip(names, files, strict=True) for file in inside or [name]], each)


def check_count(count: int, most: int) -> None:
    """Raises UsageError for more images than a conversation holds."""
    if count > most:
        raise UsageError(
            f"{count} images are too many for one conversation, which holds {most} — name fewer of them, or ask about "
            "each: mmv chat --image FOLDER 'What is it?'"
        )


def read_image(name: str, stdin: bool = True) -> Picture:
    """Read a file, a web address or, where `stdin` is true, `-`. Raises MissingInput or UsageError."""
    from minimind_v.core.data.picture_names import SHOWN, Picture, read_picture
    from minimind_v.core.errors import shorten
    from minimind_v.core.hub import web

    if name == STDIN and stdin:
        return Picture("stdin", _stdin(web.MOST_BYTES))
    if web.is_web(name):
        return Picture(shorten(name, SHOWN), web.fetch(name))
    return read_picture(name)


def _stdin(most_bytes: int) -> bytes:
    if sys.stdin is None or sys.stdin.isatty():
        raise UsageError(
            f"--image {STDIN} reads an image file from a pipe: cat dog.jpg | mmv chat --image - 'What is it?'"
        )
    content = sys.stdin.buffer.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise UsageError(f"the image file on stdin has more than {most_bytes >> 20} MB")
    return content


class Display:
    """Shows images in the finest form that the terminal has: kitty's or Sixel graphics, else half blocks."""

    def __init__(self, console: Console, renderable: Callable[..., Any]) -> None:
        """`renderable` makes what rich prints from an image and its width and height."""
        self.console, self.renderable = console, renderable

    def show(self, image: Image, pixels: np.ndarray) -> None:
        """Show an image and, to its right, the pixels [3, S, S] that the model receives."""
        both = self.renderable(beside(image, pixels), width="auto", height="auto")
        self.console.print(both, width=min(COLUMNS, self.console.width - 1), height=min(ROWS, self.console.height - 2))


def beside(image: Image, pixels: np.ndarray) -> Image:
    """An image, and the pixels [3, S, S] that the model receives at the same height, side by side."""
    from PIL import Image as Pillow

    scale = PIXELS / max(image.size)
    image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    own = Pillow.fromarray(pixels.transpose(1, 2, 0)).resize((image.height, image.height), Pillow.Resampling.NEAREST)
    both = Pillow.new("RGBA", (image.width + GAP + own.width, image.height))
    both.paste(image, (0, 0))
    both.paste(own, (image.width + GAP, 0))
    return both


def find_display(console: Console) -> Display | None:
    """What the terminal of stdin and stdout can show; None where it shows no colours, or is none.

    The terminal is asked for its abilities and answers on stdin, so this must come before the first line is read.
    """
    if os.name == "nt" or console.no_color or console.color_system not in ("256", "truecolor"):
        return None
    if not _answers_soon():
        return None
    logging.getLogger("textual_image").addHandler(logging.NullHandler())  # else its warnings go to the terminal
    from PIL import Image as Pillow
    from textual_image import renderable

    console.measure(
        renderable.Image(Pillow.new("RGB", (1, 1)))
    )  # now, not amid a typed line, it asks for the cell's size
    return Display(console, renderable.Image)


def _answers_soon() -> bool:
    """Whether stdin and stdout are a terminal that answers a query so soon that no later query is left unanswered.

    The library waits a tenth of a second; an answer behind that would become a part of the first question. What the
    user has typed already would be taken for an answer.
    """
    import termios
    import tty

    stdin, stdout = sys.__stdin__, sys.__stdout__
    if stdin is None or stdout is None or not (stdin.isatty() and stdout.isatty()):
        return False
    if select.select([stdin], [], [], 0)[0]:
        return False
    handle, start, answer = stdin.fileno(), time.monotonic(), b""
    mode = termios.tcgetattr(handle)
    tty.setcbreak(handle, termios.TCSANOW)
    try:
        stdout.write("\x1b[c")  # primary device attributes: every terminal has them
        stdout.flush()
        while not ATTRIBUTES.search(answer) and select.select([stdin], [], [], PATIENCE)[0]:
            answer += os.read(handle, 1024)
    finally:
        termios.tcsetattr(handle, termios.TCSANOW, mode)
    return bool(ATTRIBUTES.fullmatch(answer)) and time.monotonic() - start < SOON
