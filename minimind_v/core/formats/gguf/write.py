"""Write llama.cpp's two files: the language model, and CLIP with the projector.

llama.cpp has no form for the images of minimind-3v. Of the graphs with a SigLIP, one has a projector with a LayerNorm
(`lfm2`), but puts marks around an image and resizes it by aspect; those without marks (`mlp`, `janus_pro`, `phi4`) have
no LayerNorm, and pad an image or resize it by aspect where training squeezes it. So such a model is its language model
alone.
"""

from __future__ import annotations

from pathlib import Path

from minimind_v.core.config.presets import name_preset
from minimind_v.core.config.schema import CLIP_VISION, LINEAR, ModelConfig
from minimind_v.core.files import disk_errors, write_text
from minimind_v.core.formats.gguf import language, vision
from minimind_v.core.formats.gguf.file import (
    LANGUAGE_ONLY,
    MADE_BY,
    QUANTIZATIONS,
    SOURCE,
    STAGE,
    Writer,
    check_quantization,
)
from minimind_v.core.formats.gguf.read import MMPROJ, MODEL, MODELFILE
from minimind_v.core.formats.gguf.tokenizer import modelfile, write_tokenizer
from minimind_v.core.formats.load import LoadedModel
from minimind_v.core.formats.request import ExportRequest
from minimind_v.core.model.projector import PREFIX
from minimind_v.core.version import __version__

DEFAULT = "f16"


def holds_images(config: ModelConfig) -> bool:
    """Whether llama.cpp can hold the vision encoder and the projector of a model."""
    return (config.vision.model_type, config.projector) == (CLIP_VISION, LINEAR)


def make(order: ExportRequest, folder: Path) -> LoadedModel:
    """Write the model of `order` into an empty folder, and return the loaded source. Raises RunError for no room."""
    loaded = order.load()
    order.refuse_layout(loaded.tokenizer.layout, loaded.checkpoint.generation)
    with disk_errors(folder.parent):
        write(loaded, folder, order)
    return loaded


def write(loaded: LoadedModel, folder: Path, order: ExportRequest) -> None:
    """Write `model.gguf`, `mmproj.gguf` if llama.cpp holds the images, and Ollama's `Modelfile` into an empty folder.

    `order.quantize` is the type of the language model's matrices, one of QUANTIZATIONS. Raises UsageError for another,
    MissingInput without the `gguf` package, WeightsError for a model that llama.cpp cannot compute.
    """
    quantize, config = order.quantize or DEFAULT, loaded.model.config
    check_quantization(quantize)
    name = f"MiniMind-V {name_preset(config) or config.hidden_size}"
    model = Writer(folder / MODEL, language.architecture(config), quantize)
    _describe(model, "model", name, loaded)
    if not holds_images(loaded.config):
        model.file.add_bool(LANGUAGE_ONLY, True)
    language.write_keys(model, config)
    write_tokenizer(model, loaded.tokenizer, config.vocab_size)
    language.write_tensors(model, config, loaded.model.state_dict())
    model.close()
    files = [MODEL]
    if holds_images(loaded.config):
        _write_images(folder, loaded, name, QUANTIZATIONS[quantize])
        files.append(MMPROJ)
    write_text(folder / MODELFILE, modelfile(files, loaded.tokenizer.layout))


def _write_images(folder: Path, loaded: LoadedModel, name: str, type: str) -> None:
    encoder, tensors = loaded.model.vision_encoder, loaded.model.state_dict()
    assert encoder is not None, "`load` gives every model its tower"
    mmproj = Writer(folder / MMPROJ, "clip", type)
    _describe(mmproj, "mmproj", f"{name}: CLIP and the projector", loaded)
    vision.write_keys(mmproj, encoder, loaded.model.config.hidden_size)
    vision.write_tensors(mmproj, encoder, {key: value for key, value in tensors.items() if key.startswith(PREFIX)})
    mmproj.close()


def _describe(writer: Writer, type: str, name: str, loaded: LoadedModel) -> None:
    writer.file.add_type(type)
    writer.file.add_name(name)
    writer.file.add_string(MADE_BY, f"mmv {__version__}")
    writer.file.add_string(STAGE, loaded.checkpoint.stage)
    writer.file.add_string(SOURCE, loaded.checkpoint.path.name)
