"""`mmv data stats` and `mmv data preview`: what a set of rows is like, and what a model gets of a row."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from minimind_v.cli import options
from minimind_v.cli.terminal import Terminal
from minimind_v.core.errors import UsageError, open_all
from minimind_v.core.hub.sources import TOKENIZER_DIR
from minimind_v.core.wording import plural

if TYPE_CHECKING:
    from minimind_v.core.config.schema import RunConfig
    from minimind_v.core.data.prompt import PromptEncoder
    from minimind_v.core.model.vision.spec import VisionSpec
    from minimind_v.core.rows.row import RowStore


class StageName(str, Enum):
    """The two stages."""

    pretrain = "pretrain"
    sft = "sft"


File = Annotated[
    Path, typer.Argument(help="Rows: JSONL, JSON, CSV, parquet or tar, or a folder of such files (docs/data.md).")
]
Stage = Annotated[
    StageName | None,
    typer.Option(help="Whose lengths and batches count. [default: as the file's name begins, else sft]"),
]


def stats(
    file: File,
    split: options.Split = None,
    images: options.Images = None,
    tokenizer: options.TokenizerDir = TOKENIZER_DIR,
    vision_model: options.VisionOfRows = None,
    stage: Stage = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Look at so many rows. [default: a sample of 10000]")] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page with pictures, too.")] = None,
    json: options.Json = False,
) -> None:
    """Count rows, turns, tokens and languages, and foretell padding, truncation, updates and time of a stage."""
    from minimind_v.core.curate.lines import stats_lines
    from minimind_v.core.curate.stats import look_at
    from minimind_v.core.pages.frame import check_page, write_page
    from minimind_v.core.pages.stats import stats_page
    from minimind_v.core.train.speed import time_of

    terminal = Terminal()
    if html:
        check_page(html)
    recipe, store, encoder, _ = open_data(terminal, file, split, images, tokenizer, vision_model, stage)
    with terminal.progress("rows") as progress:
        report = look_at(store, encoder, recipe, time_of, limit, progress)
    if html:
        write_page(html, stats_page(report))
        terminal.say(f"the page is in {html}")
    if json:
        terminal.json(report)
        return
    for line in stats_lines(report):
        terminal.pieces(line)


def preview(
    file: File,
    split: options.Split = None,
    images: options.Images = None,
    tokenizer: options.TokenizerDir = TOKENIZER_DIR,
    vision_model: options.VisionOfRows = None,
    stage: Stage = None,
    rows: Annotated[int, typer.Option(min=1, help="How many rows.")] = 12,
    seed: Annotated[int, typer.Option(min=0, help="Which rows are drawn.")] = 0,
    start: Annotated[int | None, typer.Option(min=1, metavar="ROW", help="Rows from this one on, none drawn.")] = None,
    html: Annotated[Path, typer.Option(metavar="FILE", help="Where the page goes.")] = Path("preview.html"),
    json: options.Json = False,
) -> None:
    """Show rows as the model gets them: pictures after the crop, text as tokens, what is learnt and what is cut off."""
    from minimind_v.core.curate.lines import row_lines
    from minimind_v.core.curate.preview import Previewer, as_json
    from minimind_v.core.pages.frame import check_page, write_page
    from minimind_v.core.pages.preview import preview_page

    terminal = Terminal()
    check_page(html)
    recipe, store, encoder, spec = open_data(terminal, file, split, images, tokenizer, vision_model, stage)
    previewer = Previewer(store, encoder, spec, recipe)
    chosen = previewer.choose(rows, seed, start)
    if not chosen:
        raise UsageError(f"--start {start}: {file} ends before, it has {plural(len(store), 'row')}")
    views = [previewer.view(index) for index in chosen]
    write_page(html, preview_page(views, spec, recipe, str(file)))
    if json:
        terminal.json({"file": str(file), "stage": recipe.stage, "html": str(html), "rows": [*map(as_json, views)]})
    else:
        for view in views:
            for line in row_lines(view):
                terminal.pieces(line)
    terminal.say(f"the page, with the pictures, is in {html}")


def open_data(
    terminal: Terminal,
    file: Path,
    split: str | None,
    images: Path | None,
    tokenizer: Path,
    vision_model: Path | None,
    stage: StageName | None,
    against: Path | None = None,
) -> tuple[RunConfig, RowStore, PromptEncoder, VisionSpec]:
    """The recipe that would read these rows, the rows, and what prepares them.

    Without a vision model they are counted as the published one would take them. Raises MissingInput that names all
    that is missing, `against`, the held-out rows, among it.
    """
    from minimind_v.core.config.load import build_config
    from minimind_v.core.data.prompt import PromptEncoder
    from minimind_v.core.data.tokenizer import Tokenizer
    from minimind_v.core.model.vision.spec import read_vision_spec
    from minimind_v.core.rows.pictures import find_pictures
    from minimind_v.core.rows.stores import find_rows, open_rows

    if stage is None:
        stage = next((known for known in StageName if file.name.startswith(known.value)), None)
        if stage is None:
            stage = StageName.sft
            terminal.say("the file's name tells no stage: looked at as sft reads it (--stage pretrain for the other)")
    given = {"data": file, "split": split, "images": images, "tokenizer": tokenizer, "vision_model": vision_model}
    recipe = build_config(stage.value, options=given)
    _, _, words, spec, _ = open_all(
        lambda: find_rows(file),
        lambda: find_pictures(recipe.data.images),
        lambda: Tokenizer.load(tokenizer, recipe.data.layout),
        lambda: read_vision_spec(recipe.vision_model, standard=vision_model is None),
        lambda: against and find_rows(against),
    )
    store = open_rows(file, recipe.data.images, split, terminal.say)
    if not (recipe.vision_model / "config.json").is_file():
        terminal.say(
            f"no vision model in {recipe.vision_model}: taking the pictures of the presets, "
            f"{spec.image_size} × {spec.image_size} and {spec.tokens_per_image} tokens each"
        )
    return recipe, store, PromptEncoder(words, spec.tokens_per_image), spec
