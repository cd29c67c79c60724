"""`mmv serve` and `mmv web`: answer programs and browsers, in the form of OpenAI's API."""

from __future__ import annotations

import signal
import threading
import webbrowser
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from minimind_v.cli import options
from minimind_v.cli.command import Command, advanced, output
from minimind_v.cli.terminal import Terminal, command_line
from minimind_v.core.errors import UsageError
from minimind_v.core.paths import OUT_DIR


class Log(str, Enum):
    """The form of the access log."""

    lines = "lines"
    json = "json"


class ServeCommand(Command):
    """A command that takes several models."""

    once = ("host", "port")

    def too_many(self, values: dict[str, Any], extra: Sequence[str]) -> str:
        """The message about words, which may be meant as models."""
        options = [word for model in (*(values.get("model") or ()), *extra) for word in ("--model", str(model))]
        return f"each model needs its own --model: {command_line(str(self.name), *options)}"


Models = Annotated[
    list[Path] | None,
    typer.Option(
        "--model",
        metavar="FILE|DIR",
        envvar=options.ENVIRONMENT["model"],
        help="Weights, a run's folder, an exported folder, or a folder of several; may be given several times. "
        "[default: the latest in ./out, else the demo's]",
    ),
]
Host = Annotated[
    str, typer.Option(metavar="ADDRESS", help="Address to listen at; another than this machine's needs a key.")
]
Port = Annotated[int, typer.Option(min=0, max=65535, help="Port to listen at; 0: any free one.")]
Key = Annotated[
    str | None, typer.Option(metavar="KEY", envvar="MMV_API_KEY", help="Key that requests must give. [default: none]")
]
ImageHosts = Annotated[
    list[str] | None,
    advanced(metavar="HOST", help="Host from which images are fetched; may be given several times. [default: none]"),
]
LogForm = Annotated[Log, output("--log", help="Form of the access log on stderr.")]


def serve(
    model: Models = None,
    vision_model: options.VisionOfModel = None,
    tokenizer: options.TokenizerOfModel = None,
    device: options.Device = "auto",
    host: Host = "127.0.0.1",
    port: Port = 8000,
    api_key: Key = None,
    no_page: Annotated[bool, typer.Option("--no-page", help="Serve the API only.")] = False,
    allow_image_host: ImageHosts = None,
    log: LogForm = Log.lines,
) -> int:
    """Serve models in the form of OpenAI's API, and a page to talk to them."""
    return _serve(model, vision_model, tokenizer, device, host, port, api_key, not no_page, allow_image_host or [], log,
                  browser=False)  # fmt: skip


def web(
    model: Models = None,
    vision_model: options.VisionOfModel = None,
    tokenizer: options.TokenizerOfModel = None,
    device: options.Device = "auto",
    port: Port = 8000,
    log: LogForm = Log.lines,
) -> int:
    """Serve models, and open the page in a browser."""
    return _serve(model, vision_model, tokenizer, device, "127.0.0.1", port, None, True, [], log, browser=True)


def _serve(
    model: list[Path] | None, vision_model: Path | None, tokenizer: Path | None, device: str, host: str, port: int,
    api_key: str | None, page: bool, hosts: list[str], log: Log, browser: bool,
) -> int:  # fmt: skip
    """Serve until a signal; returns the exit code."""
    terminal = Terminal()
    try:
        import starlette
        import uvicorn
    except ImportError:
        raise UsageError("the server needs two more packages — pip install 'minimind-v[serve]'") from None
    del starlette, uvicorn
    from minimind_v.core.formats.inputs import find_model

    out = options.folder("out", OUT_DIR)
    paths = model or [find_model(None, vision_model, tokenizer, terminal.say, out)]
    from minimind_v.core.serve.server import Listener, Settings, serve

    def started(address: str) -> None:
        terminal.say(f"serving at {address} — Ctrl-C ends")
        if browser:
            threading.Thread(target=webbrowser.open, args=[address], daemon=True).start()

    settings = Settings(paths, vision_model, tokenizer, device, host, port, api_key, page, hosts, log is Log.json)
    stopped = serve(settings, Listener(started, terminal.say, terminal.record))
    return 130 if stopped is signal.SIGINT else 0
