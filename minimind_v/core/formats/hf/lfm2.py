"""A model of minimind-3v as transformers' LFM2-VL, with a SigLIP2 tower and a Qwen3 or Qwen3-MoE.

The tower's convolution [D, 3, p, p] is a linear layer over row, column and channel there, [D, p·p·3].
Its image processor resizes by aspect. With `max_pixels_tolerance` 0 every image is "too large", and with 0 to 1 tiles
it is split into one tile of the tower's size: squeezed, as training does it. DeepseekVLProcessor writes the same number
of image tokens for each image, and nothing around them.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from torch import Tensor

from minimind_v.core.config.schema import MLP, SIGLIP_VISION, TextConfig, VisionSpec
from minimind_v.core.formats.hf.form import Form, image_processor_config, special_ids, text_sizes, tokenizer_config
from minimind_v.core.formats.hf.lfm2_names import MODEL_TYPE, SIGLIP2, to_lfm2
from minimind_v.core.formats.hf.names import TOWER
from minimind_v.core.formats.vision_tower import PATCHES
from minimind_v.core.model.vision.preprocessing import ONE_TILE
from minimind_v.core.model.vision.spec import FILTERS

if TYPE_CHECKING:
    from minimind_v.core.formats.load import ModelParts

_PROCESSOR = "DeepseekVLProcessor"


def _tensors(source: ModelParts) -> dict[str, Tensor]:
    tensors = to_lfm2(source.checkpoint.tensors)
    for name, tensor in source.tower.tensors.items():
        tensors[TOWER + name] = tensor.permute(0, 2, 3, 1).flatten(1) if name == PATCHES else tensor
    return tensors


def _contents(source: ModelParts, dtype: str) -> dict[str, Any]:
    config, spec, tokenizer = source.checkpoint.config, source.tower.spec, source.tokenizer
    image_token = tokenizer.chat_layout.placeholder
    ids = special_ids(tokenizer)
    model_config = {
        "architectures": ["Lfm2VlForConditionalGeneration"],
        "model_type": MODEL_TYPE,
        "dtype": dtype,
        "image_token_id": tokenizer.placeholder_id,
        "downsample_factor": 1,
        "projector_hidden_act": "gelu",
        "projector_hidden_size": config.hidden_size,
        "projector_bias": True,
        "projector_use_layernorm": True,
        "tie_word_embeddings": True,
        **ids,
        "text_config": _text_config(config) | ids,
        "vision_config": {
            **asdict(source.tower.config),
            "model_type": SIGLIP2,
            "num_patches": spec.tokens_per_image,
            "vision_use_head": False,
        },
    }
    return {
        "config.json": model_config,
        "generation_config.json": ids | {"max_new_tokens": 512},
        "processor_config.json": {"processor_class": _PROCESSOR, "num_image_tokens": spec.tokens_per_image},
        "preprocessor_config.json": _image_processor_config(spec),
        "tokenizer_config.json": tokenizer_config(config, tokenizer, _PROCESSOR, image_token),
    }


def _text_config(config: TextConfig) -> dict[str, Any]:
    text = {
        "model_type": "qwen3_moe" if config.use_moe else "qwen3",
        "vocab_size": config.vocab_size,
        **text_sizes(config),
        "use_sliding_window": False,
    }
    if config.use_moe:
        text |= {
            "moe_intermediate_size": config.intermediate_size,
            "num_experts": config.n_routed_experts,
            "num_experts_per_tok": config.num_experts_per_tok,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "router_aux_loss_coef": config.aux_loss_alpha,
        }
    return text


def _image_processor_config(spec: VisionSpec) -> dict[str, Any]:
    return image_processor_config("Lfm2VlImageProcessor", spec) | {
        "resample": FILTERS.index(spec.resample),
        **ONE_TILE,
        "tile_size": spec.image_size,
        "encoder_patch_size": spec.patch_size,
        "min_image_tokens": spec.tokens_per_image,
        "max_image_tokens": spec.tokens_per_image,
        "do_pad": True,
    }


def _tokenizer(source: ModelParts) -> str:
    return source.tokenizer.backend.to_str()


REQUIREMENTS = """
## Requirements

The image processor of transformers' LFM2-VL needs `torchvision`. With `open_thinking=True`, `apply_chat_template` asks
the model to reason before it answers.
"""
LFM2 = Form(
    tag="lfm2_vl",
    language_model="a Qwen3",
    projects="a projector of two layers",
    adds_image_token=False,
    tower=SIGLIP_VISION,
    projector=MLP,
    tensors=_tensors,
    contents=_contents,
    tokenizer=_tokenizer,
    template="chat_template_think.jinja",
    requirements=REQUIREMENTS,
)
