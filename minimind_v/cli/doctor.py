"""`mmv doctor`: what is installed, found and missing."""

from __future__ import annotations

import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from minimind_v.cli import options
from minimind_v.cli.terminal import Terminal, command_line
from minimind_v.core.config.load import build_config
from minimind_v.core.errors import MissingInput
from minimind_v.core.files import size_of
from minimind_v.core.hub.sources import SOURCES, find_weights
from minimind_v.core.paths import DEMO_DIR, OUT_DIR, TOKENIZER_DIR, VISION_DIR

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "huggingface_hub", "pyarrow", "pillow", "numpy")


def doctor(json: options.Json = False) -> None:
    """Tell what is installed, what the standard folders hold, and how to get what they lack."""
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
        report["gpu"] = ", ".join(gpu_names()) or "none found: training runs on the CPU"
    report["cpu threads"] = str(torch.get_num_threads())
    report["free disk here"] = f"{shutil.disk_usage('.').free / 2**30:.1f} GiB"
    stages = {stage: build_config(stage) for stage in ("pretrain", "sft")}
    wanted: dict[str, tuple[Path, str]] = {
        "vision model": (VISION_DIR / "config.json", SOURCES["clip"].command()),
        "tokenizer": (TOKENIZER_DIR / "tokenizer.json", SOURCES["tokenizer"].command()),
        "language model": (stages["pretrain"].init or OUT_DIR, SOURCES["lm"].command()),
        "pretrain data": (stages["pretrain"].data.file, SOURCES["dataset"].command()),
        "pretrained weights": (stages["sft"].init or OUT_DIR, "mmv train pretrain"),
        "sft data": (stages["sft"].data.file, SOURCES["dataset"].command()),
    }
    for name, (path, command) in wanted.items():
        report[name] = f"found, {path}" if path.exists() else f"missing, {path} — `{command}`"
    report |= _demo()
    terminal = Terminal()
    terminal.json(report) if json else terminal.table(report)


def _demo() -> dict[str, str]:
    """The demo's model, where `mmv demo` has left one."""
    try:
        weights = find_weights(DEMO_DIR / OUT_DIR)
    except MissingInput:
        return {}
    use = command_line("chat", "--model", weights)
    return {"demo": f"found, {weights} — `{use}`; {size_of(DEMO_DIR) / 1e6:,.0f} MB, `rm -r {DEMO_DIR}` frees them"}
