"""What the pipeline needs from outside: one table of what lives where, and how to bring it here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

# Where each stage looks, relative to the working folder; every command has an option to look elsewhere.
TOKENIZER_DIR = Path("model")
VISION_DIR = Path("model/vision_model/clip-vit-base-patch16")
DATASET_DIR = Path("dataset")
OUT_DIR = Path("out")


@dataclass(frozen=True)
class Source:
    """A part of a hub repository and the folder that it belongs in."""

    repo: str
    files: tuple[str, ...]
    folder: Path
    kind: str = "model"

    def command(self, folder: Path | None = None) -> str:
        """The command line that brings it, with the client that huggingface_hub installs."""
        kind = ("--repo-type", "dataset") if self.kind == "dataset" else ()
        return " ".join(["hf download", self.repo, *self.files, *kind, "--local-dir", str(folder or self.folder)])


SOURCES = {
    "clip": Source(
        "openai/clip-vit-base-patch16", ("config.json", "preprocessor_config.json", "pytorch_model.bin"), VISION_DIR
    ),
    "tokenizer": Source("jingyaogong/MiniMind2-Small-V", ("tokenizer.json", "tokenizer_config.json"), TOKENIZER_DIR),
    "lm": Source("jingyaogong/MiniMind2-V-PyTorch", ("lm_512.pth",), OUT_DIR),
    "dataset": Source("jingyaogong/minimind-v_dataset", (), DATASET_DIR, "dataset"),
}


def how_to_get(what: str, folder: Path | None = None) -> str:
    """The next step for someone who lacks `what`."""
    return f"get it with `{SOURCES[what].command(folder)}`"
