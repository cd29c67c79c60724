"""Write the model card of an exported folder: the model, its training as far as known, and its use."""

from __future__ import annotations

from pathlib import Path
from string import Template
from typing import Any

from minimind_v.core.files import read_asset
from minimind_v.core.formats.companions import run_settings, trouble_of_run
from minimind_v.core.formats.description import shaped_sizes
from minimind_v.core.formats.hf.form import Form
from minimind_v.core.formats.load import ModelParts
from minimind_v.core.formats.request import ExportRequest
from minimind_v.core.monitor.metrics import read_lines


def write_card(folder: Path, source: ModelParts, order: ExportRequest, form: Form) -> None:
    """Write `README.md` into an exported folder."""
    config, spec = source.checkpoint.config, source.tower.spec
    sizes = {
        "layers × width": f"{config.num_hidden_layers} × {config.hidden_size}",
        "attention heads, key-value heads": f"{config.num_attention_heads}, {config.num_key_value_heads}",
        "vocabulary": f"{config.vocab_size:,}{', and the image token' if form.adds_image_token else ''}",
        "image": f"{spec.image_size}² pixels, {spec.tokens_per_image} tokens",
        "stored as": order.dtype or "in the training's own precision",
    }
    if config.use_moe:
        sizes["experts"] = (
            f"{config.n_routed_experts}, {config.num_experts_per_tok} per token, and {config.n_shared_experts} shared"
        )
    card = Template(read_asset("minimind_v.core.formats.hf", "card.txt")).substitute(
        name=order.model.stem,
        tag=form.tag,
        encoder=source.checkpoint.generation.vision_encoder,
        projector=form.projects,
        language_model="a language model with a mixture of experts" if config.use_moe else form.language_model,
        millions=f"{source.checkpoint.parameters / 1e6:.1f}",
        sizes=_table(sizes),
        training=_training(source, order),
        requirements=form.requirements,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def _table(rows: dict[str, Any]) -> str:
    return "\n".join(("| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())))


def _training(source: ModelParts, order: ExportRequest) -> str:
    """The training of the run beside the weights, if there is one. Files by name only: folders move."""
    run = order.model.with_suffix("")
    settings, last = run_settings(run), [{}, *read_lines(run / "metrics.jsonl")][-1]
    if trouble_of_run(run, shaped_sizes(source.checkpoint.config)):
        settings, last = {}, {}
    rows: dict[str, Any] = {"stage": source.checkpoint.stage}
    for name, key in {
        "data": "data.file", "started from": "init", "vision model": "vision_model", "trained": "freeze",
        "learning rate": "lr", "seed": "seed",
    }.items():  # fmt: skip
        if (value := settings.get(key)) is not None:
            rows[name] = Path(value).name if isinstance(value, str) else value
    if isinstance(lr := rows.pop("learning rate", None), float):
        rows["peak learning rate"] = f"{source.checkpoint.generation.cosine.peak(lr):.3g}"
    for name, key in {
        "steps": "step", "rows trained on": "samples", "supervised tokens": "supervised_tokens", "last loss": "loss",
    }.items():  # fmt: skip
        if isinstance(last.get(key), int | float):
            rows[name] = f"{last[key]:,}" if isinstance(last[key], int) else f"{last[key]:.3f}"
    unknown = "Nothing more is known about its training.\n\n" if len(rows) == 1 else ""
    return f"\n## Training\n\n{unknown}{_table(rows)}\n"
