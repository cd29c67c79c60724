"""Write llama.cpp's two files: the language model, and CLIP with the projector."""

from __future__ import annotations

from pathlib import Path

from minimind_v.core.config.presets import name_preset
from minimind_v.core.config.schema import CLIP_VISION, LINEAR
from minimind_v.core.files import disk_errors, write_text
from minimind_v.core.formats.gguf import language, vision
from minimind_v.core.formats.gguf.file import MADE_BY, QUANTIZATIONS, SOURCE, STAGE, Writer, check_quantization
from minimind_v.core.formats.gguf.read import MMPROJ, MODEL, MODELFILE
from minimind_v.core.formats.gguf.tokenizer import modelfile, write_tokenizer
from minimind_v.core.formats.load import LoadedModel
from minimind_v.core.formats.request import ExportRequest, check_target
from minimind_v.core.model.projector import PREFIX
from minimind_v.core.version import __version__

DEFAULT = "f16"
TOWERS, PROJECTORS = (CLIP_VISION,), (LINEAR,)  # that llama.cpp can hold


def make(order: ExportRequest, folder: Path) -> LoadedModel:
    """Write the model of `order` into an empty folder, and return the loaded source. Raises RunError for no room."""
    loaded = order.load()
    check_target("gguf", order.model, loaded.config, TOWERS, PROJECTORS)
    order.refuse_layout(loaded.tokenizer.layout, loaded.checkpoint.generation)
    with disk_errors(folder.parent):
        write(loaded, folder, order)
    return loaded


def write(loaded: LoadedModel, folder: Path, order: ExportRequest) -> None:
    """Write `model.gguf`, `mmproj.gguf` and Ollama's `Modelfile` into an empty folder.

    `order.quantize` is the type of the language model's matrices, one of QUANTIZATIONS. Raises UsageError for another,
    MissingInput without the `gguf` package, WeightsError for a model that llama.cpp cannot compute.
    """
    quantize = order.quantize or DEFAULT
    check_quantization(quantize)
    config, encoder = loaded.model.config, loaded.model.vision_encoder
    assert encoder is not None, "`load` gives every model its tower"
    tensors = loaded.model.state_dict()
    name = f"MiniMind-V {name_preset(config) or config.hidden_size}"

    model = Writer(folder / MODEL, language.architecture(config), quantize)
    _describe(model, "model", name, loaded)
    language.write_keys(model, config)
    write_tokenizer(model, loaded.tokenizer, config.vocab_size)
    language.write_tensors(model, config, tensors)
    model.close()

    mmproj = Writer(folder / MMPROJ, "clip", QUANTIZATIONS[quantize])
    _describe(mmproj, "mmproj", f"{name}: CLIP and the projector", loaded)
    vision.write_keys(mmproj, encoder, config.hidden_size)
    vision.write_tensors(mmproj, encoder, {key: value for key, value in tensors.items() if key.startswith(PREFIX)})
    mmproj.close()

    write_text(folder / MODELFILE, modelfile(MODEL, MMPROJ))


def _describe(writer: Writer, type: str, name: str, loaded: LoadedModel) -> None:
    writer.file.add_type(type)
    writer.file.add_name(name)
    writer.file.add_string(MADE_BY, f"mmv {__version__}")
    writer.file.add_string(STAGE, loaded.checkpoint.stage)
    writer.file.add_string(SOURCE, loaded.checkpoint.path.name)
