"""What is to be exported as it is stored: tensors that stay in their files until they are written, and no modules.

Everything is checked to fit together by names and shapes. Reading needs no transformers, so it is quick and small; that
what was written computes the same is what verification proves, with the modules.
"""

from __future__ import annotations

from dataclasses import dataclass

from minimind_v.core.checkpoint.keys import published_shapes
from minimind_v.core.checkpoint.tower import Tower, read_tower
from minimind_v.core.checkpoint.weights import Checkpoint, fit, read_checkpoint
from minimind_v.core.data.tokenizer import Tokenizer
from minimind_v.core.export.order import Order
from minimind_v.core.generate.load import check_senses, find_senses, require_senses
from minimind_v.core.gguf.files import is_gguf, read_eye, read_tokenizer


@dataclass(frozen=True)
class Source:
    """All parts of a model."""

    checkpoint: Checkpoint
    tokenizer: Tokenizer
    tower: Tower


def read_source(order: Order) -> Source:
    """Read what `order` names. Raises MissingInput, or WeightsError where a part is damaged or does not fit."""
    checkpoint = read_checkpoint(order.model)
    vision_model, tokenizer = find_senses(order.model, order.vision_model, order.tokenizer)
    require_senses(vision_model, tokenizer)
    if is_gguf(vision_model):
        eye = read_eye(vision_model)
        tower = Tower(eye.config, eye.spec, dict(eye.tower.state_dict()))
    else:
        tower = read_tower(vision_model)
    words = read_tokenizer(tokenizer) if is_gguf(tokenizer) else Tokenizer.load(tokenizer)
    check_senses(checkpoint, words, tokenizer, tower.spec, vision_model)
    fit(checkpoint, published_shapes(checkpoint.config, tower.spec.width), checkpoint.config)
    return Source(checkpoint, words, tower)
