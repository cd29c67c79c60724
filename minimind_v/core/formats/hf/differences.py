"""The keys by which a transformers folder computes otherwise than a published model: such a folder is refused."""

from __future__ import annotations

from collections.abc import Mapping
from math import isclose
from pathlib import Path
from typing import Any

from minimind_v.core.config.generation import V2026
from minimind_v.core.data.tokenizer import Tokenizer
from minimind_v.core.errors import WeightsError
from minimind_v.core.files import object_in
from minimind_v.core.formats.hf.lfm2_names import MODEL_TYPE, SIGLIP2


def refuse_other_classes(folder: Path, config: dict[str, Any]) -> None:
    """Raises WeightsError for a LLaVA or an LFM2-VL that mmv does not compute, naming the keys of `config.json`."""
    name, conditions = ("an LFM2-VL", _lfm2) if config["model_type"] == MODEL_TYPE else ("a LLaVA", _llava)
    if different := [key for key, holds in conditions(folder, config).items() if not holds]:
        raise WeightsError(
            f"{folder}: {name} model of another kind (different {', '.join(different)}); "
            f"mmv reads only the folders that `mmv convert --to hf` writes"
        )


def refuse_other_settings(folder: Path, config: dict[str, Any]) -> None:
    """Raises WeightsError for a published folder whose `config.json` asks for what mmv does not compute."""
    if different := [key for key, holds in _published(config).items() if not holds]:
        raise WeightsError(
            f"{folder}: config.json changes what the published model computes ({', '.join(different)}), and mmv "
            f"computes only that — download the folder again"
        )


def _published(config: dict[str, Any]) -> dict[str, bool]:
    """Of a folder whose code is not run. YaRN is in it where `inference_rope_scaling` is on."""
    scaled = config.get("inference_rope_scaling")
    return {
        "inference_rope_scaling": not scaled,
        "scoring_func": config.get("scoring_func") in (None, "softmax"),
        "norm_topk_prob": config.get("norm_topk_prob") is not False,
        **_decoder(config if scaled is None else {**config, "rope_scaling": None}),
    }


def _llava(folder: Path, config: dict[str, Any]) -> dict[str, bool]:
    text = object_in(config, "text_config")
    return {
        "projector_hidden_act": config.get("projector_hidden_act", "gelu") == "linear",
        "vision_feature_layer": config.get("vision_feature_layer", -2) == -1,
        "vision_feature_select_strategy": config.get("vision_feature_select_strategy", "default") == "default",
        "multimodal_projector_bias": config.get("multimodal_projector_bias", True) is True,
        "text_config.model_type": text.get("model_type", "llama") in ("llama", "granitemoeshared"),
        "tie_word_embeddings": bool(config.get("tie_word_embeddings") or text.get("tie_word_embeddings")),
        "vision_config.model_type": object_in(config, "vision_config").get("model_type") == "clip_vision_model",
        **(_multipliers(text) if text.get("model_type") == "granitemoeshared" else {}),
        **_decoder(text, "text_config."),
    }


def _lfm2(folder: Path, config: dict[str, Any]) -> dict[str, bool]:
    text = object_in(config, "text_config")
    is_moe = text.get("model_type") == "qwen3_moe"
    has_tokenizer = (folder / "tokenizer.json").is_file()
    image_token = Tokenizer.load(folder, preset=V2026.preset).placeholder_id if has_tokenizer else None
    return {
        "downsample_factor": config.get("downsample_factor", 2) == 1,
        "projector_hidden_act": config.get("projector_hidden_act", "gelu") == "gelu",
        "projector_use_layernorm": config.get("projector_use_layernorm", True) is True,
        "projector_bias": config.get("projector_bias", True) is True,
        "tie_word_embeddings": bool(config.get("tie_word_embeddings", True)),
        "image_token_id": image_token in (None, config.get("image_token_id")),
        "text_config.model_type": is_moe or text.get("model_type") == "qwen3",
        "text_config.norm_topk_prob": not is_moe or text.get("norm_topk_prob") is True,
        "text_config.mlp_only_layers": not text.get("mlp_only_layers") and text.get("decoder_sparse_step", 1) == 1,
        "vision_config.model_type": object_in(config, "vision_config").get("model_type") == SIGLIP2,
        **_decoder(text, "text_config."),
    }


def _decoder(text: Mapping[str, Any], prefix: str = "") -> dict[str, bool]:
    """Of any language model."""
    conditions = {
        "attention_bias": not text.get("attention_bias"),
        "mlp_bias": not text.get("mlp_bias"),
        "hidden_act": text.get("hidden_act", "silu") == "silu",
        "use_sliding_window": not text.get("use_sliding_window"),
        "layer_types": _all_full(text.get("layer_types")),
        "partial_rotary_factor": text.get("partial_rotary_factor") in (None, 1),
        **{name: _is_plain_rope(text.get(name)) for name in ("rope_parameters", "rope_scaling")},
    }
    return {prefix + name: holds for name, holds in conditions.items()}


def _all_full(kinds: Any) -> bool:
    """Whether all layers attend to all positions before them."""
    return kinds is None or (isinstance(kinds, list) and all(kind == "full_attention" for kind in kinds))


def _is_plain_rope(rope: Any) -> bool:
    """Whether positions are rotated by theta alone, and all numbers of a head are."""
    if rope is None:
        return True
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        return False
    kind = rope.get("rope_type", rope.get("type"))
    return kind in (None, "default") and rope.get("partial_rotary_factor") in (None, 1)


def _multipliers(text: Mapping[str, Any]) -> dict[str, bool]:
    """Of GraniteMoeShared: with these it computes as Llama does."""
    conditions = {name: text.get(name, 1.0) == 1.0 for name in (
        "embedding_multiplier", "residual_multiplier", "logits_scaling")}  # fmt: skip
    try:
        width = text["hidden_size"] // text["num_attention_heads"]
        conditions["attention_multiplier"] = isclose(text.get("attention_multiplier") or 1.0, width**-0.5, rel_tol=1e-6)
    except (KeyError, TypeError, ZeroDivisionError, OverflowError):
        conditions["attention_multiplier"] = False
    return {f"text_config.{name}": holds for name, holds in conditions.items()}
