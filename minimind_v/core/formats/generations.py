"""Distinguish the two generations of models, and refuse a mix of them, which raises no shape error.

| | of 2025 | minimind-3v, of 2026 |
|---|---|---|
| heads | no norms | `self_attn.q_norm`, `self_attn.k_norm` |
| rows of `k_proj` | 128, 160 or 192 | 384 |
| projector | `vision_proj.vision_proj.0` | `vision_proj.mlp.0` of one dimension; of two in April 2026 |
| vision model | CLIP | SigLIP |
| tokenizer | `@` stands for a patch of an image | `<|image_pad|>` does |
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from minimind_v.core.config.generation import V2025, V2026, Generation, generation_of
from minimind_v.core.config.presets import name_preset
from minimind_v.core.config.schema import TextConfig, VisionSpec
from minimind_v.core.data.layouts import find_layout
from minimind_v.core.data.tokenizer import Tokenizer, usual_layout
from minimind_v.core.errors import WeightsError
from minimind_v.core.hub.sources import how_to_get
from minimind_v.core.model.vision.spec import read_vision_spec

if TYPE_CHECKING:
    from torch import Tensor

_K_PROJ = "model.layers.0.self_attn.k_proj.weight"


def has_head_norms(tensors: Mapping[str, Tensor]) -> bool:
    """Whether weights are those of minimind-3v."""
    return any(name.endswith((".self_attn.q_norm.weight", ".self_attn.k_norm.weight")) for name in tensors)


def check_weights(path: Path, tensors: Mapping[str, Tensor], described: bool, projector_fits: bool) -> None:
    """Raises WeightsError for weights of minimind-3v in a form that mmv does not compute.

    projector_fits: a projector of PROJECTORS has these tensors. Without a description, the width of keys counts too.
    """
    projector = None if projector_fits else tensors.get("vision_proj.mlp.0.weight")
    if projector is not None and projector.ndim == 2:
        form = f"in its form of April (vision_proj.mlp.0.weight is {list(projector.shape)}, for SigLIP2 NaFlex)"
    elif not described and not has_head_norms(tensors) and _is_wide(tensors):
        form = "without the norms of its heads (k_proj has 384 rows, and there is no self_attn.q_norm)"
    else:
        return
    get = how_to_get("weights", preset=V2026.preset)
    raise WeightsError(f"{path}: weights of {V2026.name} {form}; mmv supports today's form — {get}")


def _is_wide(tensors: Mapping[str, Tensor]) -> bool:
    return _K_PROJ in tensors and tuple(tensors[_K_PROJ].shape) == (384, 768)


def check_base(path: Path, weights: TextConfig, model: TextConfig) -> None:
    """Raises WeightsError where a model of one generation is to start from weights of the other."""
    theirs, ours = generation_of(weights), generation_of(model)
    if theirs is not ours:
        raise WeightsError(
            f"{path}: these weights belong to {theirs.name}, but the run trains {ours.name} — "
            f"add --preset {name_preset(weights) or theirs.preset}, or name other weights with --init"
        )


def open_spec(
    folder: Path,
    generation: Generation,
    weights: Path | None,
    standard: str | None = None,
    preset: str | None = None,
) -> VisionSpec:
    """The spec of a folder's tower, which must be of the generation of the weights or the run; else `check_tower`.

    Raises as `read_vision_spec`, with the download of `preset`, else of the generation.
    """
    spec = read_vision_spec(folder, standard, preset or generation.preset)
    check_tower(folder, spec, generation, weights)
    return spec


def open_tokenizer(
    folder: Path, layout: str | None, generation: Generation, weights: Path | None, preset: str | None = None
) -> Tokenizer:
    """The tokenizer in a folder, which must be of the generation of the weights or the run; else `check_tokenizer`.

    Raises as `Tokenizer.load`, with the download of `preset`, else of the generation. Without `layout` it has the one
    that its tokens are made for.
    """
    tokenizer = Tokenizer.load(folder, preset=preset or generation.preset)
    check_tokenizer(tokenizer, folder, generation, weights)
    return tokenizer if layout in (None, tokenizer.layout) else Tokenizer.load(folder, layout)


def check_tower(folder: Path, spec: VisionSpec, generation: Generation, weights: Path | None) -> None:
    """Raises WeightsError where a folder has the vision model of another generation than the weights or the run."""
    other = V2025 if generation is V2026 else V2026
    if spec.model_type in other.towers:
        raise WeightsError(
            _mixed(folder, "vision model", other, other.vision_encoder, generation, weights)
            + f"{generation.vision_encoder} — name another folder with --vision-model, or "
            + how_to_get("clip", preset=generation.preset)
        )


def check_tokenizer(tokenizer: Tokenizer, folder: Path, generation: Generation, weights: Path | None) -> None:
    """Raises WeightsError where a folder has the tokenizer of another generation than the weights or the run."""
    other = V2026 if usual_layout(tokenizer.backend) == V2026.layout else V2025
    if other is not generation:
        evidence = f"it has {'' if other is V2026 else 'no '}{find_layout(V2026.layout).placeholder}"
        raise WeightsError(
            _mixed(folder, "tokenizer", other, evidence, generation, weights)
            + f"the tokenizer of {generation.year} — name another folder with --tokenizer, or "
            + how_to_get("tokenizer", preset=generation.preset)
        )


def _mixed(folder: Path, name: str, other: Generation, evidence: str, ours: Generation, weights: Path | None) -> str:
    needs = f"the weights of {ours.year} in {weights} need" if weights else f"the model of {ours.year} needs"
    return f"{folder}: the {name} belongs to {other.name} ({evidence}), but {needs} "
