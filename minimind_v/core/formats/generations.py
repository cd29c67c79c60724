"""How to distinguish the two generations of models; mixing them raises no shape error.

| | of 2025 | minimind-3v, of 2026 |
|---|---|---|
| heads | no norms | `self_attn.q_norm`, `self_attn.k_norm` |
| rows of `k_proj` | 128, 160 or 192 | 384 |
| projector | `vision_proj.vision_proj.0` | `vision_proj.mlp.0` of one dimension; of two in April 2026 |
| vision model | CLIP | SigLIP |
| tokenizer | `@` stands for a patch of an image | `<|image_pad|>` does |

This version trains and runs the models of 2025.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from minimind_v.core.data.tokenizer import Tokenizer
from minimind_v.core.errors import WeightsError
from minimind_v.core.files import read_json
from minimind_v.core.hub.sources import how_to_get
from minimind_v.core.model.vision.spec import TOWERS

if TYPE_CHECKING:
    from torch import Tensor

OTHER = "minimind-3v (2026)"
_PATCH = "<|image_pad|>"
_K_PROJ = "model.layers.0.self_attn.k_proj.weight"


def check_weights(path: Path, tensors: Mapping[str, Tensor], described: bool, projector_fits: bool) -> None:
    """Raises WeightsError for weights of minimind-3v. Without a description, the width of keys counts as well.

    projector_fits: a projector of PROJECTORS has these tensors, so they do not count.
    """
    projector = None if projector_fits else tensors.get("vision_proj.mlp.0.weight")
    norms = [name for name in tensors if name.endswith(".self_attn.q_norm.weight")]
    if projector is not None and projector.ndim == 2:
        form = f"{OTHER} in its form of April, whose vision_proj.mlp.0.weight is {list(projector.shape)}"
    elif norms:
        form = f"{OTHER}, which have {norms[0]}"
    elif projector is not None:
        form = f"{OTHER}, which have vision_proj.mlp.0.weight"
    elif not described and _K_PROJ in tensors and tuple(tensors[_K_PROJ].shape) == (384, 768):
        form = f"{OTHER}, whose k_proj has 384 rows"
    else:
        return
    raise WeightsError(f"{path}: weights of {form}; this version supports those of 2025 — {how_to_get('weights')}")


def check_tower(folder: Path, weights: Path | None) -> None:
    """Raises WeightsError where a folder has the vision model of minimind-3v, beside weights of 2025."""
    config = read_json(folder / "config.json") or {}
    tower = config.get("vision_config", config)
    kind = tower.get("model_type") if isinstance(tower, dict) else None
    if isinstance(kind, str) and kind.startswith("siglip") and kind not in TOWERS:
        raise WeightsError(_mixed(folder, "vision model", "SigLIP", weights, "CLIP", "--vision-model", "clip"))


def check_tokenizer(tokenizer: Tokenizer, folder: Path, weights: Path | None) -> None:
    """Raises WeightsError where a folder has the tokenizer of minimind-3v, beside weights of 2025."""
    if tokenizer.backend.token_to_id(_PATCH) is not None:
        raise WeightsError(
            _mixed(
                folder, "tokenizer", f"it has {_PATCH}", weights, "the tokenizer of 2025", "--tokenizer", "tokenizer"
            )
        )


def _mixed(folder: Path, name: str, evidence: str, weights: Path | None, ours: str, option: str, what: str) -> str:
    needs = f"the weights of 2025 in {weights} need" if weights else "the model of 2025 needs"
    return (
        f"{folder}: the {name} belongs to {OTHER} ({evidence}), but {needs} {ours} — "
        f"name another folder with {option}, or {how_to_get(what)}"
    )
