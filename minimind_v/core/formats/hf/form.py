"""A class of transformers that can hold a model exactly, and what all exported folders have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from minimind_v.core.config.schema import ModelConfig, TextConfig, VisionSpec
from minimind_v.core.data.tokenizer import Tokenizer
from minimind_v.core.errors import UsageError

if TYPE_CHECKING:
    from minimind_v.core.formats.load import ModelParts


@dataclass(frozen=True)
class Form:
    """A class of transformers.

    tag: its name on the hub.
    language_model: the class of a dense one, for the card; `projects` describes its projector there.
    adds_image_token: an image is a new token after the vocabulary, not the tokenizer's placeholder.
    tower, projector: those that it can hold.
    tensors: a model → its tensors as transformers names and shapes them, in their own types.
    contents: a model and its dtype → the JSON files of the folder by name.
    tokenizer: the text of its `tokenizer.json`.
    template: the file of its chat template in `assets`.
    requirements: a section of the card.
    """

    tag: str
    language_model: str
    projects: str
    adds_image_token: bool
    tower: str
    projector: str
    tensors: Callable[[ModelParts], dict[str, Tensor]]
    contents: Callable[[ModelParts, str], dict[str, Any]]
    tokenizer: Callable[[ModelParts], str]
    template: str
    requirements: str = ""

    def check(self, path: Path, config: ModelConfig) -> None:
        """Raises UsageError where it cannot hold a model, its vision tower or its projector."""
        if (config.vision.model_type, config.projector) != (self.tower, self.projector):
            raise UsageError(
                f"{path} has the vision tower {config.vision.model_type!r} and the projector {config.projector!r}; "
                f"--to hf can hold {self.tower} with {self.projector} — `mmv convert --to safetensors` can hold any"
            )


def special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """The ids of the special tokens, by transformers' names."""
    return {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}


def text_sizes(config: TextConfig) -> dict[str, Any]:
    """The sizes that all text models of transformers have."""
    return {
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
    }


def image_processor_config(kind: str, spec: VisionSpec) -> dict[str, Any]:
    """The settings that the image processors of all classes have, for one of the class `kind`."""
    return {
        "image_processor_type": kind,
        "do_convert_rgb": True,
        "do_resize": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(spec.mean),
        "image_std": list(spec.std),
    }


def tokenizer_config(config: TextConfig, tokenizer: Tokenizer, processor: str, image_token: str) -> dict[str, Any]:
    """The contents of `tokenizer_config.json`."""
    bos, eos, pad = map(tokenizer.backend.id_to_token, special_ids(tokenizer).values())
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "processor_class": processor,
        "bos_token": bos,
        "eos_token": eos,
        "pad_token": pad,
        "unk_token": pad,
        "image_token": image_token,
        "extra_special_tokens": {"image_token": image_token},
        "model_max_length": config.max_position_embeddings,
        "padding_side": "left",  # of prompts in one batch
        "clean_up_tokenization_spaces": False,
    }
