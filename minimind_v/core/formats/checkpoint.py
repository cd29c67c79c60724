"""Checkpoints: read weights safely, recognise the model, and load them with a receipt.

A checkpoint is a flat state_dict in half precision without `vision_encoder.*`, under the published names, as `.pth`
or `.safetensors`. A small JSON beside it, or the safetensors header, holds what tensors do not show (the number of
attention heads, the stage); without it, sizes are inferred from the tensors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors.torch import save as save_safetensors
from torch import Tensor

from minimind_v.core.config.generation import V2025, V2026, Generation, generation_of
from minimind_v.core.config.presets import name_preset
from minimind_v.core.config.schema import LINEAR, ModelConfig, TextConfig, VisionSpec
from minimind_v.core.errors import MmvError, RunError, WeightsError
from minimind_v.core.files import MOST_JSON, write_atomically, write_text
from minimind_v.core.formats.companions import RECORD, UNKNOWN, Companions, as_record, of_the_run, read_record
from minimind_v.core.formats.description import (
    EMBEDDING,
    describe,
    described_config,
    described_projector,
    described_vision,
    infer_config,
    shaped_sizes,
)
from minimind_v.core.formats.generations import check_base, check_weights, has_head_norms
from minimind_v.core.formats.gguf.read import is_gguf, read_gguf
from minimind_v.core.formats.hf.read import VISION, read_folder
from minimind_v.core.formats.tensor_files import check_numbers, read_tensors
from minimind_v.core.hub.sources import META, weights_at
from minimind_v.core.model.projector import PREFIX as PROJECTOR
from minimind_v.core.model.projector import PROJECTORS, recognise_projector
from minimind_v.core.model.vlm import VLM
from minimind_v.core.wording import plural

HEAD = "lm_head.weight"  # one matrix with the embedding
# Buffers that older versions of the published model saved and that are computed today.
_OLD_BUFFERS = re.compile(r"(\.|^)(mask|pos_cis|freqs_cos|freqs_sin|inv_freq)$")
_WRAPPERS = re.compile(r"^(module\.|_orig_mod\.)+")  # DistributedDataParallel, torch.compile
# These change what weights compute, but no shape.
_UNSHAPED = ("num_attention_heads", "num_key_value_heads", "rope_theta", "rms_norm_eps")


@dataclass(frozen=True)
class Checkpoint:
    """A weights file in memory."""

    path: Path
    tensors: dict[str, Tensor]
    config: TextConfig
    stage: str  # lm, pretrain, sft or unknown
    ignored: list[str]  # names that were left out: old buffers, the vision encoder
    guessed: bool  # true where the sizes were inferred from the tensors alone
    companions: Companions = UNKNOWN
    vision: VisionSpec | None = None  # of the tower it was trained with; None: unknown
    projector: str | None = None  # None: a text-only base, or an unknown kind

    @property
    def model_config(self) -> ModelConfig | TextConfig:
        """The described configuration: the language model's alone where tower or projector are unknown."""
        if self.vision is None or self.projector is None:
            return self.config
        return ModelConfig(self.config, self.vision, self.projector)

    @property
    def generation(self) -> Generation:
        """The generation of the language model."""
        return generation_of(self.config)

    @property
    def vision_width(self) -> int | None:
        """Width of the features its projector takes; None for a text-only base, or where nothing says it."""
        kind = PROJECTORS.get(self.projector or "")
        if kind:
            return kind.vision_width(self.tensors)
        return self.vision.width if self.vision else None

    @property
    def parameters(self) -> int:
        """Number of parameters, the tied head counted once."""
        return sum(tensor.numel() for name, tensor in self.tensors.items() if name != HEAD)


@dataclass
class Receipt:
    """What happened to every tensor of a load."""

    source: str
    loaded: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)  # not in the file, to be initialised
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    wrong_shape: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        counts = [f"{plural(len(self.loaded), 'tensor')} loaded"]
        for name in ("new", "missing", "unexpected", "wrong_shape", "ignored"):
            if names := getattr(self, name):
                shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
                counts.append(f"{len(names)} {name.replace('_', ' ')} ({shown})")
        return f"{self.source}: " + "; ".join(counts)


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a `.pth` or `.safetensors` file, by its contents, a folder for transformers or llama.cpp, or a run folder.

    Raises MissingInput, or WeightsError that says what is wrong with the file.
    """
    path = weights_at(path)
    if is_gguf(path):
        tensors, meta = read_gguf(path)
    elif path.is_dir():
        tensors, meta = read_folder(path)
    else:
        tensors, described = read_tensors(path)
        meta = _parse_meta(path, described[META]) if META in described else _read_beside(path)
    tensors = _unwrap(path, tensors)
    projector = described_projector(path, meta, tensors)  # what a description says outweighs a guess from shapes
    check_weights(path, tensors, bool(meta), bool(projector) or recognise_projector(tensors) not in (None, LINEAR))
    ignored = sorted(name for name in tensors if name.startswith(VISION) or _OLD_BUFFERS.search(name))
    for name in ignored:
        del tensors[name]
    for name, tensor in tensors.items():
        check_numbers(path, name, tensor)
    _tie(path, tensors)
    config = described_config(path, meta, infer_config(path, tensors))
    stage = meta.get("stage")
    stage = stage if stage and isinstance(stage, str) else _stage_of(path, tensors)
    companions = read_record(meta[RECORD], path.parent) if RECORD in meta else of_the_run(path, shaped_sizes(config))
    vision, projector = described_vision(path, meta), projector or recognise_projector(tensors)
    return Checkpoint(path, tensors, config, stage, ignored, not meta, companions, vision, projector)


def generation_at(path: Path) -> Generation | None:
    """The generation of the weights in a file, by the names of its tensors; None where it has no such weights."""
    try:
        tensors = read_tensors(path)[0]
    except (OSError, MmvError):
        return None
    if not any(name.endswith((EMBEDDING, HEAD)) for name in tensors):
        return None
    return V2026 if has_head_norms(tensors) else V2025


def _unwrap(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors without the prefixes that other programs add to their names."""
    plain: dict[str, str] = {}
    for name in tensors:
        if (twice := plain.setdefault(_WRAPPERS.sub("", name), name)) != name:
            raise WeightsError(f"{path}: contains {twice} and {name}, which mean the same tensor — remove one of them")
    return {name: tensors[wrapped] for name, wrapped in plain.items()}


def _tie(path: Path, tensors: dict[str, Tensor]) -> None:
    """The embedding is also the head: a file may have it under either name, or under both if they are equal."""
    for name, other in ((EMBEDDING, HEAD), (HEAD, EMBEDDING)):
        if name in tensors:
            tensors.setdefault(other, tensors[name])
    if EMBEDDING in tensors and not torch.equal(tensors[HEAD].float(), tensors[EMBEDDING].float()):
        shapes = " and ".join(str(list(tensors[name].shape)) for name in (HEAD, EMBEDDING))
        raise WeightsError(
            f"{path}: {HEAD} and {EMBEDDING} differ, but must be tied ({shapes}) — train with one matrix for both"
        )


def _read_beside(path: Path) -> dict[str, Any]:
    beside = path.with_suffix(".json")
    if beside.is_file() and beside.stat().st_size > MOST_JSON:
        raise WeightsError(f"{beside}: too long to describe weights — delete it and try again")
    return _parse_meta(beside, beside.read_bytes()) if beside.is_file() else {}


def _parse_meta(path: Path, text: str | bytes) -> dict[str, Any]:
    try:
        meta = json.loads(text)
    except (ValueError, RecursionError):  # neither JSON nor, perhaps, text
        raise WeightsError(f"{path}: the description of the weights is not JSON — delete it and try again") from None
    return meta if isinstance(meta, dict) and isinstance(meta.get("model"), dict) else {}


def _stage_of(path: Path, tensors: Mapping[str, Tensor]) -> str:
    if not any(name.startswith(PROJECTOR) for name in tensors):
        return "lm"
    return next((stage for stage in ("pretrain", "sft") if path.name.startswith(stage)), "unknown")


def load_into(model: VLM, checkpoint: Checkpoint, new_projector: bool = False) -> Receipt:
    """Copy a checkpoint into a model, strictly.

    With `new_projector` a text-only base may lack exactly the projector's tensors, which then keep their values.
    Raises WeightsError with the receipt and advice where another tensor is missing, unexpected or of another shape.
    """
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items() if not name.startswith(VISION)}
    config = model.model_config
    tensors, receipt = match_tensors(checkpoint, shapes, config.text, config.projector, new_projector)
    model.load_state_dict(tensors, strict=False)
    return receipt


def match_tensors(
    checkpoint: Checkpoint,
    shapes: Mapping[str, torch.Size],
    config: TextConfig,
    projector: str,
    new_projector: bool = False,
) -> tuple[dict[str, Tensor], Receipt]:
    """The tensors of a checkpoint for a model with these shapes by name and this configuration, tied head included.

    Raises WeightsError as `load_into` does.
    """
    check_base(checkpoint.path, checkpoint.config, config)
    tensors = dict(checkpoint.tensors)
    receipt = Receipt(str(checkpoint.path), ignored=checkpoint.ignored)
    absent = [name for name in shapes if name not in tensors]
    if new_projector and absent == [name for name in shapes if name.startswith(PROJECTOR)]:
        receipt.new = absent
    else:
        receipt.missing = absent
    for name, tensor in tensors.items():
        if name not in shapes:
            receipt.unexpected.append(name)
        elif tensor.shape != shapes[name]:
            receipt.wrong_shape.append(f"{name} {list(tensor.shape)} for {list(shapes[name])}")
        else:
            receipt.loaded.append(name)
    if receipt.missing or receipt.unexpected or receipt.wrong_shape:
        raise WeightsError(f"the weights do not fit. {receipt}{_advice(checkpoint, receipt, config, projector)}")
    for name in _UNSHAPED:
        value = getattr(checkpoint.config, name)
        if not checkpoint.guessed and value != getattr(config, name):
            raise WeightsError(
                f"{checkpoint.path} was trained with {name} {value}, the model has {getattr(config, name)} — "
                f"add --set model.{name}={value}"
            )
    return tensors, receipt


def _advice(checkpoint: Checkpoint, receipt: Receipt, text: TextConfig, projector: str) -> str:
    trouble = receipt.missing + receipt.unexpected + receipt.wrong_shape
    if all(name.startswith(PROJECTOR) for name in trouble):
        return _projector_advice(checkpoint, projector)
    tokens = checkpoint.config.vocab_size
    if replace(checkpoint.config, vocab_size=text.vocab_size) == text and tokens != text.vocab_size:
        return (
            f" — they have {tokens} tokens and the model {text.vocab_size}: add --set model.vocab_size={tokens}, "
            f"otherwise rows of the embedding are lost"
        )
    preset = name_preset(checkpoint.config)
    if checkpoint.config == text:
        return ""
    if preset:
        return f" — its sizes match --preset {preset}"
    return f" — its sizes are {checkpoint.config.hidden_size} × {checkpoint.config.num_hidden_layers} layers"


def _projector_advice(checkpoint: Checkpoint, projector: str) -> str:
    """The advice where only the projector does not fit."""
    if not any(name.startswith(PROJECTOR) for name in checkpoint.tensors):
        return " — this text-only base has no projector; `mmv train pretrain` trains one"
    if checkpoint.projector is None:
        return f" — its projector is none of {', '.join(PROJECTORS)}: name the file of its own in MMV_EXTENSIONS"
    if checkpoint.projector != projector:
        return f" — it has the projector {checkpoint.projector!r}, the model {projector!r} (--set projector=NAME)"
    return f" — it needs a vision model with features of width {checkpoint.vision_width} (--vision-model)"


def export_tensors(model: VLM) -> dict[str, Tensor]:
    """The tensors of a checkpoint under their published names: half precision, no vision encoder, tied ones shared.

    Raises RunError where a weight does not fit.
    """
    cast: dict[int, Tensor] = {}
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name.startswith(VISION):
            continue
        if tensor.data_ptr() not in cast:
            cast[tensor.data_ptr()] = tensor.detach().to("cpu", torch.float16, copy=True).contiguous()
            if not bool(cast[tensor.data_ptr()].isfinite().all()):
                raise RunError(f"{name} does not fit in float16: it contains NaN or values that are too large")
        tensors[name] = cast[tensor.data_ptr()]
    return tensors


def write_checkpoint(
    path: Path,
    tensors: Mapping[str, Tensor],
    config: ModelConfig | TextConfig,
    stage: str,
    companions: Companions = UNKNOWN,
) -> None:
    """Write a `.pth` with a JSON beside it, or a `.safetensors` with the JSON in its header, atomically."""
    meta = describe(config, stage, as_record(companions, path.parent))
    if path.suffix == ".safetensors":
        # The format knows neither shared storage nor strides.
        apart = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
        data = save_safetensors(apart, metadata={"format": "pt", META: meta})
        write_atomically(path, lambda file: file.write(data))
        return

    def write(file: BinaryIO) -> None:
        torch.save(dict(tensors), file)
        file.flush()  # there is room for the weights: only now may their description change
        write_text(path.with_suffix(".json"), meta + "\n")

    write_atomically(path, write)
