"""`mmv doctor`: installed packages, standard folders and missing files."""

from __future__ import annotations

import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

import typer

from minimind_v.cli import options
from minimind_v.cli.terminal import Terminal, command_line
from minimind_v.core.config.generation import Generation, generation_of
from minimind_v.core.config.load import build_config
from minimind_v.core.config.presets import PRESETS, check_preset, weights_name
from minimind_v.core.errors import MissingInput, MmvError
from minimind_v.core.files import size_of
from minimind_v.core.hub.sources import WEIGHTS_ENDINGS, find_weights, how_to_pretrain, sources_of
from minimind_v.core.paths import DEMO_DIR, OUT_DIR, STANDARD_PRESET

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "huggingface_hub", "pyarrow", "pillow", "numpy")


def doctor(
    preset: Annotated[
        str,
        typer.Option(
            metavar="NAME", help=f"Model size: {', '.join(PRESETS)}.", autocompletion=options.complete(PRESETS)
        ),
    ] = STANDARD_PRESET,
    json: options.Json = False,
) -> None:
    """Report installed packages, the files that a model size needs, and how to get missing files."""
    check_preset(preset)
    import torch

    from minimind_v.core.device import gpu_names

    report: dict[str, str] = {"python": platform.python_version(), "system": platform.platform()}
    for package in PACKAGES:
        try:
            report[package] = version(package)
        except PackageNotFoundError:
            report[package] = "missing"
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        report["gpu"] = f"{card.name}, {card.total_memory / 2**30:.1f} GiB, bf16 {torch.cuda.is_bf16_supported()}"
    else:
        report["gpu"] = ", ".join(gpu_names()) or "none: training runs on the CPU"
    report["cpu threads"] = str(torch.get_num_threads())
    report["free disk here"] = f"{shutil.disk_usage('.').free / 2**30:.1f} GiB"
    out = options.folder("out", OUT_DIR)
    given = {
        "preset": preset,
        "out": out,
        "data": os.environ.get(options.ENVIRONMENT["data"]) or None,
    }
    stages = {stage: build_config(stage, options=given) for stage in ("pretrain", "sft")}
    pretrain, sft = stages["pretrain"], stages["sft"]
    vision_model, tokenizer = (
        options.folder(name, standard)
        for name, standard in {"vision_model": pretrain.vision_model, "tokenizer": pretrain.data.tokenizer}.items()
    )
    get = {what: source.command(preset=preset) for what, source in sources_of(preset).items()}
    inputs: dict[str, tuple[Path, str]] = {
        "vision model": (vision_model / "config.json", get["clip"]),
        "tokenizer": (tokenizer / "tokenizer.json", get["tokenizer"]),
        "language model": (pretrain.init or OUT_DIR, get["lm"]),
        "pretrain data": (pretrain.data.file, get["dataset"]),
        "pretrained weights": (out / weights_name("pretrain", sft.model), how_to_pretrain(preset)),
        "sft data": (sft.data.file, get["dataset"]),
    }
    generation = generation_of(sft.model)
    for name, (path, command) in inputs.items():
        if not path.exists():
            report[name] = f"missing, {path} — `{command}`"
        elif trouble := _trouble(name, path, command, generation):
            report[name] = f"wrong, {trouble}"
        else:
            report[name] = f"found, {path}"
    report |= _demo()
    terminal = Terminal()
    terminal.json(report) if json else terminal.table(report)


def _trouble(name: str, path: Path, command: str, generation: Generation) -> str | None:
    """Why a file is not an input of this generation: the names of both are the same; None where it is one."""
    from minimind_v.core.formats.checkpoint import generation_at
    from minimind_v.core.formats.generations import open_spec, open_tokenizer

    theirs = generation_at(path) if path.suffix in WEIGHTS_ENDINGS else None
    if theirs is not None and theirs is not generation:
        return f"{path} has weights of {theirs.name}, not of {generation.name} — `{command}`"
    try:
        if name == "vision model":
            open_spec(path.parent, generation, None)
        if name == "tokenizer":
            open_tokenizer(path.parent, None, generation, None)
    except MmvError as error:
        return str(error)
    return None


def _demo() -> dict[str, str]:
    """The model that `mmv demo` made, if any."""
    try:
        weights = find_weights(DEMO_DIR / OUT_DIR)
    except MissingInput:
        return {}
    use = command_line("chat", "--model", weights)
    return {"demo": f"found, {weights} — `{use}`; {size_of(DEMO_DIR) / 1e6:,.0f} MB, `rm -r {DEMO_DIR}` frees them"}
