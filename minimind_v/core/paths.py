"""The standard folders, relative to the working folder, and the standard model size."""

from __future__ import annotations

import os
from pathlib import Path

# The inputs of the stages. Every command has an option for another folder.
TOKENIZER_DIR = Path("model")
VISION_DIR = Path("model/vision_model/clip-vit-base-patch16")
TOKENIZER_3V_DIR = Path("model/minimind-3v")  # of minimind-3v, beside those of 2025
VISION_3V_DIR = Path("model/vision_model/siglip2-base-p32-256-ve")
DATASET_DIR = Path("dataset")
SAMPLE_DIR = DATASET_DIR / "sample"  # of `mmv download --sample`: the names of the whole files, the first rows only
BENCHMARK_DIR = DATASET_DIR / "benchmarks"  # of `mmv download --task`
OUT_DIR = Path("out")
DEMO_DIR = Path("demo")  # of `mmv demo`: it has all the others inside
DEMO_3V_DIR = Path("demo-3v")  # of `mmv demo --generation 3v`

STANDARD_PRESET = "small"
PRESET_DEMO, PRESET_DEMO_3V = "demo", "demo-3v"  # the presets of the two demos, which no hub has


def state_dir() -> Path:
    """The user's folder for what `mmv` keeps between its commands."""
    if os.name == "nt":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData/Local") / "mmv"
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state") / "mmv"
