"""A model of 2025 as transformers' LLaVA.

A dense model becomes a Llama, a mixture of experts a GraniteMoeShared; both compute exactly the same as ours. The image
token is a new one after the vocabulary, so that no text of a user stands for an image.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from torch import Tensor

from minimind_v.core.config.schema import CLIP_VISION, LINEAR, TextConfig, VisionSpec
from minimind_v.core.data.tokenizer import IMAGE_TOKEN, Tokenizer, with_image_token
from minimind_v.core.formats.hf.form import Form, image_processor_config, special_ids, text_sizes, tokenizer_config
from minimind_v.core.formats.hf.names import TOWER, to_llava
from minimind_v.core.formats.vision_tower import StoredTower

if TYPE_CHECKING:
    from minimind_v.core.formats.load import ModelParts

BICUBIC = 3  # Pillow's number


def _tensors(source: ModelParts) -> dict[str, Tensor]:
    tensors = to_llava(source.checkpoint.tensors, source.checkpoint.config)
    return tensors | {TOWER + name: tensor for name, tensor in source.tower.tensors.items()}


def _contents(source: ModelParts, dtype: str) -> dict[str, Any]:
    config, spec, tokenizer = source.checkpoint.config, source.tower.spec, source.tokenizer
    return {
        "config.json": _model_config(config, source.tower, tokenizer, dtype),
        "generation_config.json": special_ids(tokenizer)
        | {
            "suppress_tokens": [config.vocab_size],
            "max_new_tokens": 512,  # the image token is never generated
        },
        "processor_config.json": _processor_config(spec),
        "preprocessor_config.json": _image_processor_config(spec),
        "tokenizer_config.json": tokenizer_config(config, tokenizer, "LlavaProcessor", IMAGE_TOKEN),
    }


def _tokenizer(source: ModelParts) -> str:
    return with_image_token(source.tokenizer.backend.to_str(), source.checkpoint.config.vocab_size)


def _model_config(config: TextConfig, tower: StoredTower, tokenizer: Tokenizer, dtype: str) -> dict[str, Any]:
    ids = special_ids(tokenizer)
    text = {
        "model_type": "granitemoeshared" if config.use_moe else "llama",
        "vocab_size": config.vocab_size + 1,  # and the image token
        **text_sizes(config),
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


def _image_processor_config(spec: VisionSpec) -> dict[str, Any]:
    return image_processor_config("CLIPImageProcessor", spec) | {
        "size": {"shortest_edge": spec.image_size},
        "resample": BICUBIC,
        "do_center_crop": True,
        "crop_size": {"height": spec.image_size, "width": spec.image_size},
    }


def _processor_config(spec: VisionSpec) -> dict[str, Any]:
    return {
        "processor_class": "LlavaProcessor",
        "image_token": IMAGE_TOKEN,
        "patch_size": spec.patch_size,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,  # CLIP's class token, which "default" leaves out
    }


LLAVA = Form(
    tag="llava",
    language_model="a Llama",
    projects="one linear projector",
    adds_image_token=True,
    tower=CLIP_VISION,
    projector=LINEAR,
    tensors=_tensors,
    contents=_contents,
    tokenizer=_tokenizer,
    template="chat_template.jinja",
)
