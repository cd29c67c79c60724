"""llama.cpp's two files, for a checkpoint that was trained here: the language model, and what lets it see."""

from __future__ import annotations

from pathlib import Path

from minimind_v import __version__
from minimind_v.core.checkpoint.weights import PROJECTOR, name_preset
from minimind_v.core.gguf import language, vision
from minimind_v.core.gguf.store import MADE_BY, QUANTIZATIONS, Writer, check_quantization
from minimind_v.core.gguf.words import modelfile, write_words
from minimind_v.core.files import write_text
from minimind_v.core.generate.load import Loaded

MODEL, MMPROJ, MODELFILE = "model.gguf", "mmproj.gguf", "Modelfile"


def write_gguf(loaded: Loaded, folder: Path, quantize: str = "f16") -> list[Path]:
    """Write `model.gguf`, `mmproj.gguf` and Ollama's `Modelfile` into a folder that is there, and return their paths.

    `quantize` is the type of the language model's matrices, one of QUANTIZATIONS. Raises UsageError for another,
    MissingInput without the `gguf` package, WeightsError for what llama.cpp has no way to compute.
    """
    check_quantization(quantize)
    config, encoder = loaded.model.config, loaded.model.vision_encoder
    assert encoder is not None, "load_model gives every model its tower"
    tensors = loaded.model.state_dict()
    name = f"MiniMind-V {name_preset(config) or config.hidden_size}"

    words = Writer(folder / MODEL, language.architecture(config), quantize)
    _describe(words, "model", name, loaded)
    language.write_keys(words, config)
    write_words(words, loaded.tokenizer, config.vocab_size)
    language.write_tensors(words, config, tensors)
    words.close()

    eye = Writer(folder / MMPROJ, "clip", QUANTIZATIONS[quantize])
    _describe(eye, "mmproj", f"{name}: CLIP and the projector", loaded)
    vision.write_keys(eye, encoder, config.hidden_size)
    vision.write_tensors(eye, encoder, {key: value for key, value in tensors.items() if key.startswith(PROJECTOR)})
    eye.close()

    write_text(folder / MODELFILE, modelfile(MODEL, MMPROJ))
    return [folder / MODEL, folder / MMPROJ, folder / MODELFILE]


def _describe(writer: Writer, type: str, name: str, loaded: Loaded) -> None:
    writer.file.add_type(type)
    writer.file.add_name(name)
    writer.file.add_string(MADE_BY, f"mmv {__version__}")
    writer.file.add_string("minimind_v.stage", loaded.checkpoint.stage)
    writer.file.add_string("minimind_v.source", loaded.checkpoint.path.name)
