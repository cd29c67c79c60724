"""Write a folder that stock transformers loads: a LLaVA model, its processor, tokenizer and chat template.

A dense model becomes a Llama, a mixture of experts a GraniteMoeShared; both compute exactly the same as ours. The image
token is a new one after the vocabulary, so that no text of a user stands for an image.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from minimind_v.core.config.schema import CLIP_VISION, LINEAR, TextConfig, VisionSpec
from minimind_v.core.data.tokenizer import IMAGE_TOKEN, Tokenizer, with_image_token
from minimind_v.core.files import disk_errors, in_use
from minimind_v.core.formats.description import describe
from minimind_v.core.formats.hf.card import write_card
from minimind_v.core.formats.hf.names import TOWER, to_llava
from minimind_v.core.formats.load import ModelParts, read_model_parts
from minimind_v.core.formats.request import ExportFacts, ExportRequest, check_target
from minimind_v.core.formats.tensor_files import cast
from minimind_v.core.formats.vision_tower import StoredTower
from minimind_v.core.hub.sources import META

TOWERS, PROJECTORS = (CLIP_VISION,), (LINEAR,)  # that a LLaVA can hold
BICUBIC = 3  # Pillow's number


def make(order: ExportRequest, folder: Path) -> ExportFacts:
    """Write a request into an empty folder. Raises as `read_model_parts` and `write`, RunError for no room."""
    with in_use(folder):
        source = read_model_parts(order.model, order.vision_model, order.tokenizer)
        order.refuse_layout(source.tokenizer.layout)
        check_target("hf", order.model, source.config, TOWERS, PROJECTORS)
        with disk_errors(folder.parent):
            write(source, folder, order)
    return ExportFacts.of(source.checkpoint)


def write(source: ModelParts, folder: Path, order: ExportRequest) -> None:
    """Write a model into an empty folder. No `order.dtype`: weights as stored, to run in fp32.

    Raises RunError where a weight does not fit in the type.
    """
    config, spec, dtype = source.checkpoint.config, source.tower.spec, order.dtype
    tensors = to_llava(source.checkpoint.tensors, config)
    tensors |= {TOWER + name: tensor if dtype else _halved(tensor) for name, tensor in source.tower.tensors.items()}
    if dtype:
        tensors = {name: cast(name, tensor, dtype) for name, tensor in tensors.items()}
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        folder / "model.safetensors",
        metadata={"format": "pt", META: describe(config, source.checkpoint.stage)},
    )
    contents = {
        "config.json": _model_config(config, source.tower, source.tokenizer, dtype or "float32"),
        "generation_config.json": _special_ids(source.tokenizer)
        | {
            "suppress_tokens": [config.vocab_size],
            "max_new_tokens": 512,  # the image token is never generated
        },
        "processor_config.json": _processor_config(spec),
        "preprocessor_config.json": _image_processor_config(spec),
        "tokenizer_config.json": _tokenizer_config(config, source.tokenizer),
    }
    files = {name: json.dumps(value, indent=2, ensure_ascii=False) + "\n" for name, value in contents.items()}
    files["tokenizer.json"] = with_image_token(source.tokenizer.backend.to_str(), config.vocab_size)
    files["chat_template.jinja"] = chat_template()
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    write_card(folder, source, order)


def chat_template() -> str:
    """The jinja template that writes standard messages in the layout of training."""
    folder = resources.files("minimind_v.core.formats.hf")
    return folder.joinpath("assets", "chat_template.jinja").read_text(encoding="utf-8")


def _halved(tensor: Tensor) -> Tensor:
    """A tensor of the vision tower, in half precision where that is exact: most of CLIP was published so."""
    half = tensor.half()
    return half if torch.equal(half.to(tensor.dtype), tensor) else tensor


def _model_config(config: TextConfig, tower: StoredTower, tokenizer: Tokenizer, dtype: str) -> dict[str, Any]:
    ids = _special_ids(tokenizer)
    text = {
        "model_type": "granitemoeshared" if config.use_moe else "llama",
        "vocab_size": config.vocab_size + 1,  # and the image token
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.max_position_embeddings,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "rope_theta": config.rope_theta,  # for readers older than transformers 5
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        **ids,
    }
    if config.use_moe:
        text |= {
            "num_local_experts": config.n_routed_experts,
            "num_experts_per_tok": config.num_experts_per_tok,
            "shared_intermediate_size": config.n_shared_experts * config.intermediate_size,
            "router_aux_loss_coef": config.aux_loss_alpha,
            "attention_multiplier": config.head_dim**-0.5,
            "embedding_multiplier": 1.0,
            "residual_multiplier": 1.0,
            "logits_scaling": 1.0,
        }
    else:
        text |= {"mlp_bias": False}
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "dtype": dtype,
        "image_token_index": config.vocab_size,
        "image_seq_length": tower.spec.tokens_per_image,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
        "projector_hidden_act": "linear",
        "multimodal_projector_bias": True,
        "tie_word_embeddings": True,
        **ids,
        "text_config": text,
        "vision_config": {"model_type": CLIP_VISION, **asdict(tower.config)},
    }


def _special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    return {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}


def _image_processor_config(spec: VisionSpec) -> dict[str, Any]:
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": spec.image_size},
        "resample": BICUBIC,
        "do_center_crop": True,
        "crop_size": {"height": spec.image_size, "width": spec.image_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(spec.mean),
        "image_std": list(spec.std),
    }


def _processor_config(spec: VisionSpec) -> dict[str, Any]:
    return {
        "processor_class": "LlavaProcessor",
        "image_token": IMAGE_TOKEN,
        "patch_size": spec.patch_size,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,  # CLIP's class token, which "default" leaves out
    }


def _tokenizer_config(config: TextConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    bos, eos, pad = map(tokenizer.backend.id_to_token, _special_ids(tokenizer).values())
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "processor_class": "LlavaProcessor",
        "bos_token": bos,
        "eos_token": eos,
        "pad_token": pad,
        "unk_token": pad,
        "image_token": IMAGE_TOKEN,
        "extra_special_tokens": {"image_token": IMAGE_TOKEN},
        "model_max_length": config.max_position_embeddings,
        "padding_side": "left",  # of prompts in one batch
        "clean_up_tokenization_spaces": False,
    }
