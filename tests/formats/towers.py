"""The demo's vision tower in every layout that a vision folder has."""

import json
import shutil

import torch
from safetensors.torch import load_file, save_file

from tests.cli.harness import EYE
from tests.export.made import exported


def whole_clip(folder):
    """As CLIP itself is published: both halves in one file that torch saved."""
    tensors = {f"vision_model.{name.removeprefix('vision_model.')}": tensor for name, tensor in tower_tensors().items()}
    tensors |= {"text_model.embeddings.token_embedding.weight": torch.ones(9, 4), "logit_scale": torch.tensor(1.0),
                "vision_model.embeddings.position_ids": torch.arange(65)[None]}  # fmt: skip
    torch.save(tensors, folder / "pytorch_model.bin")
    vision = json.loads((EYE / "config.json").read_text())
    settings = {"model_type": "clip", "vision_config": vision, "text_config": {"hidden_size": 4}}
    (folder / "config.json").write_text(json.dumps(settings))


def shards(folder):
    names = sorted(tower_tensors())
    files = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, held in files.items():
        save_file({name: tower_tensors()[name] for name in held}, folder / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, held in files.items() for name in held}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    shutil.copy(EYE / "config.json", folder)


def llava(folder):
    for path in exported().iterdir():
        shutil.copy(path, folder)


def tower_tensors():
    return load_file(EYE / "model.safetensors")


LAYOUTS = (whole_clip, shards, llava)
