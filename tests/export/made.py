"""Exported folders, and the models that they were made of, small enough to be made for every test."""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path

import torch
from PIL import Image
from torch import nn

from minimind_v.core.config.schema import TextConfig
from minimind_v.core.demo import world
from minimind_v.core.formats.checkpoint import export_tensors, write_checkpoint
from minimind_v.core.formats.hf import write as hf
from minimind_v.core.formats.load import LoadedModel, read_model_parts
from minimind_v.core.formats.request import ExportRequest
from minimind_v.core.model.vision.encoder import read_vision_spec
from minimind_v.core.model.vlm import VLM
from tests.cli.harness import ASSETS, EYE, _folder

TINY = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 600}
CONFIGS = {
    "dense": TextConfig(**TINY),
    "odd": TextConfig(
        hidden_size=96, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=3, intermediate_size=100,
        vocab_size=777, rope_theta=5e4, rms_norm_eps=1e-6, max_position_embeddings=4096,
    ),  # more tokens than the tokenizer has, and no published size
    "moe": TextConfig(**TINY, use_moe=True),
    "moe, odd": TextConfig(
        **TINY | {"vocab_size": 640}, use_moe=True, n_routed_experts=5, num_experts_per_tok=3, n_shared_experts=2,
        intermediate_size=40, aux_loss_alpha=0.2,
    ),
    "moe, none shared": TextConfig(**TINY, use_moe=True, n_shared_experts=0),
}  # fmt: skip


@cache
def weights(kind: str) -> Path:
    """A weights file whose answers differ: a fresh model says nearly the same of everything."""
    config = CONFIGS[kind]
    torch.manual_seed(1)
    model = VLM(config, read_vision_spec(EYE), placeholder_id=5)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, 0.0, parameter.shape[-1] ** -0.5)
    path = _folder() / kind.replace(", ", "_") / "sft_vlm_64.pth"
    write_checkpoint(path, export_tensors(model), config, "sft")
    return path


def order(kind: str = "dense", **how: object) -> ExportRequest:
    return ExportRequest(weights(kind), EYE, ASSETS, **how)  # type: ignore[arg-type]


def source(kind: str = "dense") -> LoadedModel:
    return _source(kind)


@cache
def _source(kind: str) -> LoadedModel:
    return order(kind).load()


def exported(kind: str = "dense", dtype: str | None = None) -> Path:
    """The folder for transformers, written and not verified."""
    return _exported(kind, dtype)


@cache
def _exported(kind: str, dtype: str | None) -> Path:
    folder = _folder() / f"{weights(kind).parent.name}-{dtype}"
    folder.mkdir()
    request = order(kind, dtype=dtype)
    hf.write(read_model_parts(request.model, request.vision_model, request.tokenizer), folder, request)
    return folder


def opened(kind: str = "dense"):
    """Processor and model as stock transformers opens them."""
    return _opened(kind)


@cache
def _opened(kind: str):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = exported(kind)
    return AutoProcessor.from_pretrained(folder), AutoModelForImageTextToText.from_pretrained(folder).eval()


@cache
def jpeg(number: int) -> bytes:
    rng = random.Random(number)
    return world.jpeg(world.draw(world.make_scene(rng), rng))


def picture(number: int) -> Image.Image:
    import io

    return Image.open(io.BytesIO(jpeg(number)))
