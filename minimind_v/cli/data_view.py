"""`mmv data stats` and `mmv data preview`: statistics of rows, and rows as the model reads them."""

from __future__ import annotations

import contextlib
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minimind_v.cli import options
from minimind_v.cli.command import Table, advanced
from minimind_v.cli.run_options import Stage
from minimind_v.cli.terminal import Terminal
from minimind_v.core.errors import MissingInput, MmvError, UsageError, open_all
from minimind_v.core.wording import plural

if TYPE_CHECKING:
    from minimind_v.core.config.generation import Generation
    from minimind_v.core.config.schema import RunConfig
    from minimind_v.core.data.prompt import PromptEncoder
    from minimind_v.core.data.tokenizer import Tokenizer
    from minimind_v.core.model.vision.spec import VisionSpec
    from minimind_v.core.rows.row import RowStore


File = Annotated[
    Path,
    typer.Argument(
        metavar="FILE", help="Rows: JSONL, JSON, CSV, parquet or tar, or a folder of such files (docs/data.md)."
    ),
]
# Options of the commands that read rows as a stage of training does: the settings of `open_data`.
ROW_OPTIONS: Table = {
    "split": (options.Split, None),
    "images": (options.Images, None),
    "preset": (options.PresetOfRows, None),
    "tokenizer": (options.TokenizerOfRows, None),
    "vision_model": (options.VisionOfRows, None),
    "stage": (
        Annotated[
            Stage | None,
            advanced("--stage", help="Read the rows as this stage does. [default: by the file's name, else sft]"),
        ],
        None,
    ),
}


def stats(
    file: File,
    settings: dict[str, Any],
    limit: Annotated[
        int | None, typer.Option(min=1, help="Count only the first rows. [default: a sample of 10000]")
    ] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write a page with images.")] = None,
    json: options.Json = False,
) -> None:
    """Count rows, turns, tokens and languages; predict padding, truncation, steps and time of a stage."""
    from minimind_v.cli.data_lines import stats_lines
    from minimind_v.core.curate.stats import describe_rows
    from minimind_v.core.pages.frame import check_page, write_page
    from minimind_v.core.pages.stats import stats_page
    from minimind_v.core.train.forecast import time_of

    terminal = Terminal()
    if html:
        check_page(html)
    recipe, store, encoder, _ = open_data(terminal, file, settings)
    with terminal.progress("rows") as progress:
        report = describe_rows(store, encoder, recipe, time_of, limit, progress)
    if html:
        write_page(html, stats_page(report))
        terminal.say(f"page: {html}")
    if json:
        terminal.json(report)
        return
    for line in stats_lines(report):
        terminal.pieces(line)


def preview(
    file: File,
    settings: dict[str, Any],
    rows: Annotated[int, typer.Option(min=1, help="Number of rows.")] = 12,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the choice of rows.")] = 0,
    start: Annotated[int | None, typer.Option(min=1, metavar="ROW", help="Show the rows from this one on.")] = None,
    html: Annotated[Path, typer.Option(metavar="FILE", help="The page to write.")] = Path("preview.html"),
    json: options.Json = False,
) -> None:
    """Show rows as the model receives them: images, tokens, supervised and truncated text."""
    from minimind_v.cli.data_lines import row_lines
    from minimind_v.core.curate.preview import Previewer, as_json
    from minimind_v.core.pages.frame import check_page, write_page
    from minimind_v.core.pages.preview import preview_page

    terminal = Terminal()
    check_page(html)
    recipe, store, encoder, spec = open_data(terminal, file, settings)
    previewer = Previewer(store, encoder, spec, recipe)
    chosen = previewer.choose(rows, seed, start)
    if not chosen:
        raise UsageError(f"--start {start}: {file} has only {plural(len(store), 'row')}")
    views = [previewer.view(index) for index in chosen]
    write_page(html, preview_page(views, spec, recipe, str(file)))
    if json:
        terminal.json({"file": str(file), "stage": recipe.stage, "html": str(html), "rows": [*map(as_json, views)]})
    else:
        for view in views:
            for line in row_lines(view):
                terminal.pieces(line)
    terminal.say(f"page with images: {html}")


def open_data(
    terminal: Terminal, file: Path, settings: dict[str, Any], against: Path | None = None
) -> tuple[RunConfig, RowStore, PromptEncoder, VisionSpec]:
    """The recipe of the stage, the rows, the prompt encoder and the vision spec; `settings` are of ROW_OPTIONS.

    Without a vision model, rows are counted for the encoder of the presets. Raises one MissingInput that names every
    missing file, the held-out rows `against` included; WeightsError for a mix of generations, as training does.
    """
    from minimind_v.core.config.load import build_config
    from minimind_v.core.data.prompt import PromptEncoder
    from minimind_v.core.formats.generations import open_spec
    from minimind_v.core.model.projector import projected
    from minimind_v.core.rows.pictures import find_pictures
    from minimind_v.core.rows.stores import find_rows, open_rows

    stage = settings["stage"] or next((name for name in Stage if file.name.startswith(name.value)), None)
    if stage is None:
        stage = Stage.sft
        terminal.say("reading as sft data (--stage pretrain for the other stage)")
    generation = _generation_of(settings["preset"], settings["tokenizer"])
    given = settings | {"data": file, "preset": settings["preset"] or generation.preset, "stage": None}
    recipe = build_config(stage.value, options=given)
    tower = None if settings["vision_model"] else generation.towers[0]
    _, _, tokens, spec, _ = open_all(
        lambda: find_rows(file),
        lambda: find_pictures(recipe.data.images),
        lambda: _open_tokenizer(recipe.data.tokenizer, generation),
        lambda: projected(open_spec(recipe.vision_model, generation, None, tower), recipe.projector),
        lambda: against and find_rows(against),
    )
    store = open_rows(file, recipe.data.images, settings["split"], terminal.say)
    if not (recipe.vision_model / "config.json").is_file():
        terminal.say(
            f"no vision model in {recipe.vision_model}: counting images as the presets do, "
            f"{spec.image_size} × {spec.image_size}, {spec.tokens_per_image} tokens per image"
        )
    return recipe, store, PromptEncoder(tokens, spec.tokens_per_image), spec


def _open_tokenizer(folder: Path, generation: Generation) -> Tokenizer:
    """The tokenizer in a folder. Raises MissingInput, which also names that of a demo in the working folder."""
    from minimind_v.core.formats.generations import open_tokenizer
    from minimind_v.core.paths import DEMO_3V_DIR, DEMO_DIR

    try:
        return open_tokenizer(folder, None, generation, None)
    except MissingInput as error:
        demo = next((demo for demo in (DEMO_DIR, DEMO_3V_DIR) if (demo / folder).is_dir()), None)
        if folder != generation.tokenizer or demo is None:
            raise
        options = shlex.join(["--tokenizer", str(demo / folder), "--vision-model", str(demo / generation.vision_model)])
        raise MissingInput(f"{error}, or read rows as the demo's model does: {options}") from None


def _generation_of(preset: str | None, tokenizer: Path | None) -> Generation:
    """The generation of a preset, else of the models whose prompts a tokenizer is made for, else that of 2025."""
    from minimind_v.core.config.generation import V2025, V2026, generation_of
    from minimind_v.core.config.presets import PRESETS, check_preset
    from minimind_v.core.data.tokenizer import Tokenizer

    if preset is not None:
        check_preset(preset)
        return generation_of(PRESETS[preset])
    with contextlib.suppress(MmvError):
        if Tokenizer.load(tokenizer or V2025.tokenizer).layout == V2026.layout:
            return V2026
    return V2025
