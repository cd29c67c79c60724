"""Write a folder that stock transformers loads: the model, its processor, tokenizer and chat template."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from minimind_v.core.config.schema import TextConfig
from minimind_v.core.files import disk_errors, in_use, read_asset
from minimind_v.core.formats.description import describe
from minimind_v.core.formats.hf.card import write_card
from minimind_v.core.formats.hf.form import Form
from minimind_v.core.formats.hf.lfm2 import LFM2
from minimind_v.core.formats.hf.llava import LLAVA
from minimind_v.core.formats.hf.names import TOWER
from minimind_v.core.formats.load import ModelParts, read_model_parts
from minimind_v.core.formats.request import ExportFacts, ExportRequest
from minimind_v.core.formats.tensor_files import cast
from minimind_v.core.hub.sources import META


def form_of(config: TextConfig) -> Form:
    """The class of transformers that holds a language model exactly."""
    return LFM2 if config.qk_norm else LLAVA


def make(order: ExportRequest, folder: Path) -> ExportFacts:
    """Write a request into an empty folder. Raises as `read_model_parts` and `write`, RunError for no room."""
    with in_use(folder):
        source = read_model_parts(order.model, order.vision_model, order.tokenizer)
        order.refuse_layout(source.tokenizer.layout, source.checkpoint.generation)
        form = form_of(source.checkpoint.config)
        form.check(order.model, source.config)
        with disk_errors(folder.parent):
            write(source, folder, order)
    return ExportFacts.of(source.checkpoint)


def write(source: ModelParts, folder: Path, order: ExportRequest) -> None:
    """Write a model into an empty folder. No `order.dtype`: weights as stored, to run in fp32.

    Raises RunError where a weight does not fit in the type.
    """
    config, dtype = source.checkpoint.config, order.dtype
    form = form_of(config)
    tensors = form.tensors(source)
    if dtype:
        tensors = {name: cast(name, tensor, dtype) for name, tensor in tensors.items()}
    else:
        tensors = {name: _halved(tensor) if name.startswith(TOWER) else tensor for name, tensor in tensors.items()}
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        folder / "model.safetensors",
        metadata={"format": "pt", META: describe(config, source.checkpoint.stage)},
    )
    contents = form.contents(source, dtype or "float32")
    files = {name: json.dumps(value, indent=2, ensure_ascii=False) + "\n" for name, value in contents.items()}
    files["tokenizer.json"] = form.tokenizer(source)
    files["chat_template.jinja"] = chat_template(form)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    write_card(folder, source, order, form)


def chat_template(form: Form) -> str:
    """The jinja template that writes standard messages in the layout of training."""
    return read_asset("minimind_v.core.formats.hf", form.template)


def _halved(tensor: Tensor) -> Tensor:
    """A tensor of the vision tower, in half precision where that is exact: most of CLIP was published so."""
    half = tensor.half()
    return half if torch.equal(half.to(tensor.dtype), tensor) else tensor
