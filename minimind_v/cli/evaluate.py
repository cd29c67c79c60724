"""`mmv eval`: how good a model is on rows that it has not seen."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minimind_v.cli import options
from minimind_v.cli.terminal import Terminal
from minimind_v.core.config.schema import DTYPES, one_of
from minimind_v.core.errors import open_all

if TYPE_CHECKING:
    from minimind_v.core.evaluate.run import Scores

FIRST = 200  # rows that are scored where none are named


def evaluate(
    model: options.Model = None,
    data: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help=f"Held-out rows: a file or folder. [default: {FIRST} rows of the sft data]"),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Which split of a folder. [default: test, validation or held_out, as said]"),
    ] = None,
    images: options.Images = None,
    vision_model: options.VisionOfModel = None,
    tokenizer: options.TokenizerOfModel = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many rows.")] = None,
    blind: Annotated[
        bool, typer.Option("--blind", help="Score again with a blank picture: what the picture is worth.")
    ] = False,
    task: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="What to measure: loss, exact or a task of your own. [default: both]"),
    ] = None,
    max_length: Annotated[int, typer.Option(min=1, help="Tokens per row, pictures included.")] = 1536,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows at a time.")] = 8,
    device: options.Device = "auto",
    dtype: Annotated[str, typer.Option(help=", ".join(DTYPES))] = "auto",
    json: options.Json = False,
) -> None:
    """Held-out loss and, where rows have short answers, the share that is right to the letter."""
    from minimind_v.core.config.load import build_config, images_beside
    from minimind_v.core.rows.pictures import find_pictures
    from minimind_v.core.rows.splits import SCORE
    from minimind_v.core.rows.stores import find_rows, open_rows

    one_of("dtype", dtype, DTYPES)
    terminal = Terminal()
    if data is None:
        found_data = build_config("sft").data
        data, images, limit = found_data.file, images or found_data.images, limit or FIRST
        terminal.warn(
            f"scoring rows of {data}, which the model may have been trained on: name held-out ones with --data"
        )
    images = images or images_beside(data)
    _, _, loaded = open_all(
        lambda: find_rows(data),
        lambda: find_pictures(images),
        lambda: options.load(model, vision_model, tokenizer, device, terminal.say),
    )
    from minimind_v.core.data.dataset import RowDataset
    from minimind_v.core.data.feature_cache import FeatureEncoder, open_feature_cache
    from minimind_v.core.data.prompt import PromptEncoder
    from minimind_v.core.evaluate.run import evaluate as score
    from minimind_v.core.rows.row import describe_notes, describe_text_rows

    rows = open_rows(data, images, split, terminal.say, SCORE)
    spec, words = loaded.model.spec, loaded.tokenizer
    terminal.say(str(loaded.receipt))
    memory, encoder = None, loaded.model.vision_encoder
    features = loaded.checkpoint.path.parent / "features"
    if encoder and features.is_dir():  # where the run that made these weights has left them
        eye = FeatureEncoder(encoder, loaded.model.device, dtype)
        memory = open_feature_cache("exact", features, eye, len(rows), terminal.say, terminal.warn)
    prompts, found = PromptEncoder(words, spec.tokens_per_image), {}
    for name in ("seeing", "blind") if blind else ("seeing",):
        dataset = RowDataset(rows, prompts, spec.image_size, max_length, blank=name == "blind")
        with terminal.progress(f"eval {name}") as progress:
            found[name] = score(
                loaded.model, dataset, words.pad_id, words.eos_id, batch_size,
                limit=limit, progress=progress, dtype=dtype, task=task, memory=memory if name == "seeing" else None,
            )  # fmt: skip
    seeing = found["seeing"]
    for row in seeing.broken[:5]:
        terminal.warn(f"row skipped: {row}")
    if seeing.text_rows:
        terminal.say(describe_text_rows(seeing.text_rows, seeing.rows))
    for line in describe_notes(seeing.notes, seeing.rows):
        terminal.say(line)
    report = _report(loaded.checkpoint.path, data, rows.split, found)
    if json:
        terminal.json(report)
    else:
        terminal.table({name: f"{value:.4f}" if isinstance(value, float) else value for name, value in report.items()})


def _report(model: Path, data: Path, split: str, found: dict[str, Scores]) -> dict[str, Any]:
    seeing = found["seeing"]
    report: dict[str, Any] = {
        "model": str(model), "data": str(data), **({"split": split} if split else {}),
        "rows": seeing.rows, "broken_rows": len(seeing.broken), "text_rows": seeing.text_rows,
        "supervised_tokens": seeing.supervised_tokens,
    }  # fmt: skip
    for name, scores in found.items():
        counts = {key: value for key, value in scores.metrics.items() if isinstance(value, int)}
        if name == "seeing":
            report |= counts
        suffix = "" if name == "seeing" else "_blind"
        report |= {key + suffix: value for key, value in scores.metrics.items() if key not in counts}
    return report | {"seconds": sum(scores.seconds for scores in found.values())}
