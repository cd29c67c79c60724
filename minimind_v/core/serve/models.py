"""The models that a server answers with, by name: loaded when first asked for, dropped when others need the memory."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from minimind_v.core.config.generation import V2025
from minimind_v.core.config.presets import name_preset
from minimind_v.core.data.layouts import find_layout
from minimind_v.core.errors import MissingInput, MmvError, UsageError
from minimind_v.core.formats.checkpoint import Checkpoint
from minimind_v.core.formats.gguf.read import is_gguf
from minimind_v.core.formats.load import LoadedModel, load, read_model_parts
from minimind_v.core.generate.engine import CONTEXT, Engine
from minimind_v.core.hub.sources import DEMOS, WEIGHTS_ENDINGS, find_weights, weights_of_run
from minimind_v.core.model.projector import projected
from minimind_v.core.model.vision.spec import VisionSpec
from minimind_v.core.serve.errors import ApiError

Log = Callable[[str], None]


class Model:
    """A loaded model: its engine steps in a thread of its own until `close`."""

    def __init__(self, loaded: LoadedModel, log: Log) -> None:
        self.engine = Engine(loaded.model, loaded.tokenizer)
        self.description = describe(loaded.checkpoint, loaded.tokenizer.layout, self.engine.processor.spec)
        self.preset = name_preset(loaded.checkpoint.config)
        self._log, self._stop = log, threading.Event()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self.engine.run(self._stop)
            except Exception as error:  # the engine goes on with its other answers
                self._log(f"the engine failed: {type(error).__name__}: {error}")
                time.sleep(0.1)

    def end(self) -> None:
        """Let the thread end behind its present step."""
        self._stop.set()

    def close(self) -> None:
        """End the thread, and wait for it."""
        self.end()
        self._thread.join()


UNREADABLE: dict[str, Any] = {
    "thinks": False, "images": False, "context": 0, "stage": None, "parameters": None, "generation": None,
    "tokens_per_image": 0,
}  # fmt: skip


def describe(checkpoint: Checkpoint, layout: str, spec: VisionSpec) -> dict[str, Any]:
    """What a page must know of a model; `UNREADABLE` has the same keys."""
    return {
        "thinks": _has_reasoning(layout),
        "images": True,
        "context": min(CONTEXT, checkpoint.config.max_position_embeddings),
        "stage": checkpoint.stage if checkpoint.stage != "unknown" else None,
        "parameters": checkpoint.parameters,
        "generation": "2025" if checkpoint.generation is V2025 else "3v",
        "tokens_per_image": spec.tokens_per_image,
    }


def _has_reasoning(layout: str) -> bool:
    try:
        return bool(find_layout(layout).reasoning_start())
    except UsageError:
        return False


@dataclass
class Entry:
    """A name, its weights, and the model while it is loaded."""

    name: str
    path: Path
    created: int  # seconds since 1970, of the weights
    model: Model | None = None
    loading: asyncio.Task[None] | None = None
    users: int = 0  # requests that it answers now
    used: float = 0.0  # when the last of them ended
    description: dict[str, Any] | None = None
    preset: str | None = None  # the size of the model, where it has a name

    @property
    def format(self) -> str:
        """What its path is: a pth, safetensors or gguf file, or a folder for transformers or llama.cpp (gguf)."""
        if self.path.is_dir():
            return "gguf" if is_gguf(self.path) else "transformers"
        return self.path.suffix.removeprefix(".")


class Models:
    """Models by name, for the thread of an event loop; what takes long runs in other threads."""

    def __init__(
        self,
        paths: Sequence[Path],
        vision_model: Path | None = None,
        tokenizer: Path | None = None,
        device: str = "auto",
        most: int = 2,
        log: Log = lambda message: None,
    ) -> None:
        self.entries = {name: Entry(name, path, int(path.stat().st_mtime)) for name, path in named(paths).items()}
        self.vision_model, self.tokenizer, self.device, self.most, self.log = vision_model, tokenizer, device, most, log
        self._describing = asyncio.Lock()

    def find(self, name: str | None) -> Entry:
        """The entry of a name; without one, the first. Raises ApiError."""
        if name is None:
            return next(iter(self.entries.values()))
        if name not in self.entries:
            by_file = [entry for entry in self.entries.values() if entry.path.name == name]
            if len(by_file) == 1:
                return by_file[0]
            some = ", ".join(list(self.entries)[:10])
            raise ApiError(
                404, f"the model {name[:100]!r} does not exist; there are: {some}", "model", "model_not_found"
            )
        return self.entries[name]

    @asynccontextmanager
    async def lend(self, name: str | None) -> AsyncIterator[tuple[str, Model]]:
        """A model and its name; it stays loaded until the end of the block. Raises ApiError."""
        entry = self.find(name)
        entry.users += 1
        try:
            while (model := entry.model) is None:
                if entry.loading is None:
                    entry.loading = asyncio.create_task(self._load(entry))
                await asyncio.shield(entry.loading)  # another request may wait for it, too
            yield entry.name, model
        finally:
            entry.users -= 1
            entry.used = time.monotonic()
            self._drop_idle(self.most)

    async def any_demo(self) -> bool:
        """Whether a model is of the demo's size, and so may understand the demo's world."""
        await self.list()
        return any(entry.preset in DEMOS for entry in self.entries.values())

    async def list(self) -> list[dict[str, Any]]:
        """OpenAI's list of models, each with what a page must know of it."""
        async with self._describing:
            for entry in self.entries.values():
                if entry.description is None:
                    await asyncio.to_thread(self._describe, entry)
        return [
            {"id": entry.name, "object": "model", "created": entry.created, "owned_by": "mmv",
             "mmv": {"format": entry.format, "loaded": entry.model is not None, **(entry.description or {})}}
            for entry in self.entries.values()
        ]  # fmt: skip

    @property
    def loaded(self) -> int:
        """Number of loaded models."""
        return sum(entry.model is not None for entry in self.entries.values())

    def close(self) -> None:
        """End the engines of all models."""
        for entry in self.entries.values():
            if entry.model is not None:
                entry.model.close()

    async def preload(self) -> None:
        """Load the first model. Raises MissingInput, UsageError or WeightsError where it cannot be opened."""
        entry = self.find(None)
        self._keep(entry, await asyncio.to_thread(self._open, entry))

    async def _load(self, entry: Entry) -> None:
        try:
            self._drop_idle(self.most - 1)
            with self._errors(entry):
                self._keep(entry, await asyncio.to_thread(self._open, entry))
        finally:
            entry.loading = None

    def _keep(self, entry: Entry, model: Model) -> None:
        entry.model, entry.description, entry.preset = model, model.description, model.preset

    def _open(self, entry: Entry) -> Model:
        return Model(load(entry.path, self.vision_model, self.tokenizer, self.device, self.log), self.log)

    def _describe(self, entry: Entry) -> None:
        entry.description = UNREADABLE  # until it is loaded
        with suppress(ApiError), self._errors(entry):
            stored = read_model_parts(entry.path, self.vision_model, self.tokenizer)
            spec = projected(stored.tower.spec, stored.config.projector)
            entry.preset = name_preset(stored.checkpoint.config)
            entry.description = describe(stored.checkpoint, stored.tokenizer.layout, spec)

    @contextmanager
    def _errors(self, entry: Entry) -> Iterator[None]:
        """The log gets the whole error, with its paths; the client learns which model it is."""
        try:
            yield
        except Exception as error:
            reason = str(error) if isinstance(error, MmvError | OSError) else f"{type(error).__name__}: {error}"
            self.log(f"the model {entry.name} cannot be opened: {reason}")
            raise ApiError(
                503, f"the model {entry.name} cannot be opened; the server's log says why", "model", "model_unavailable"
            ) from None

    def _drop_idle(self, most: int) -> None:
        """Unload the least recently used idle models until no more than `most` are loaded."""
        while self.loaded > most:
            idle = [entry for entry in self.entries.values() if entry.model is not None and not entry.users]
            if not idle:
                return
            entry = min(idle, key=lambda entry: entry.used)
            assert entry.model is not None
            entry.model.end()
            entry.model = None
            self.log(f"the model {entry.name} is unloaded")


def named(paths: Sequence[Path]) -> dict[str, Path]:
    """The weights that paths stand for, by names that are unique: a folder of several stands for each of them.

    The first of a name in a folder has it without its ending; so a converted copy beside weights does not change their
    name. Where several folders have weights of a name, each name begins with as many folders as tell them apart.
    Raises MissingInput for a path without weights, UsageError for the same weights twice.
    """
    files = [file for path in paths for file in _weights_in(path)]
    if twice := [file for number, file in enumerate(files) if file in files[:number]]:
        raise UsageError(f"{twice[0]} is given twice — give each model once")
    folders: dict[str, list[Path]] = {}
    for file in files:
        folders.setdefault(_name(file), []).append(file.resolve().parent)
    names: dict[str, Path] = {}
    for file in files:
        prefix = _prefix(file.resolve().parent, folders[_name(file)])
        forms = [_name(file), file.name, *(f"{_name(file)}-{n}" for n in range(2, len(files) + 2))]
        names[next(name for form in forms if (name := prefix + form) not in names)] = file
    return names


def _prefix(folder: Path, folders: Sequence[Path]) -> str:
    """The last parts of a folder's path, as many as tell all the folders apart; empty for one folder."""
    different = len(set(folders))
    depth = next(depth for depth in count() if len({_last(path, depth) for path in folders}) == different)
    return "".join(f"{name}/" for name in _last(folder, depth))


def _last(folder: Path, depth: int) -> tuple[str, ...]:
    return folder.parts[-depth:] if depth else ()


def _weights_in(path: Path) -> list[Path]:
    """The weights at a path: a file, an exported folder, a run's folder, or each of a folder's.

    The latest of a folder come first, the others in the order of their names.
    """
    weights = weights_of_run(path)
    if weights.is_file() or _is_model(weights):
        return [weights]
    inside = sorted(weights.iterdir())
    files = [file for file in inside if file.suffix in (*WEIGHTS_ENDINGS, ".gguf") and file.is_file()]
    models = [file for file in files if not file.name.startswith(("lm_", "llm_", "mmproj", "."))]  # not a base alone
    models += [folder for folder in inside if folder.is_dir() and _is_model(folder)]
    if not models:
        raise MissingInput(f"no weights in {path} — name a file, an exported folder or a run's folder with --model")
    with suppress(MissingInput):
        latest = find_weights(path)
        models.sort(key=lambda model: _name(model) != _name(latest))
    return models


def _is_model(folder: Path) -> bool:
    return (folder / "config.json").is_file() or is_gguf(folder)


def _name(file: Path) -> str:
    return file.stem if file.suffix in (*WEIGHTS_ENDINGS, ".gguf") else file.resolve().name
