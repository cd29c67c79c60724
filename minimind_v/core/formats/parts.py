"""What is to be exported as it is stored: tensors that stay in their files until they are written, and no modules.

Everything is checked to fit together by names and shapes. Reading needs no transformers, so it is quick and small; that
what was written computes the same is what verification proves, with the modules.
"""

from __future__ import annotations

from dataclasses import dataclass

from minimind_v.core.data.tokenizer import Tokenizer
from minimind_v.core.formats.checkpoint import Checkpoint, fit, read_checkpoint
from minimind_v.core.formats.gguf.read import is_gguf, read_eye, read_tokenizer
from minimind_v.core.formats.hf.names import published_shapes
from minimind_v.core.formats.load import check_senses, find_senses
from minimind_v.core.formats.request import Order
from minimind_v.core.formats.vision_tower import Tower, read_tower


@dataclass(frozen=True)
class Source:
    """All parts of a model."""

    checkpoint: Checkpoint
    tokenizer: Tokenizer
    tower: Tower


def read_source(order: Order) -> Source:
    """Read what `order` names. Raises MissingInput, or WeightsError where a part is damaged or does not fit."""
    checkpoint = read_checkpoint(order.model)
    senses = find_senses(checkpoint, order.vision_model, order.tokenizer)
    if is_gguf(senses.vision_model):
        eye = read_eye(senses.vision_model)
        tower = Tower(eye.config, eye.spec, dict(eye.tower.state_dict()))
    else:
        tower = read_tower(senses.vision_model)
    words = read_tokenizer(senses.tokenizer) if is_gguf(senses.tokenizer) else Tokenizer.load(senses.tokenizer)
    check_senses(checkpoint, senses, words, tower.spec, tower.tensors)
    fit(checkpoint, published_shapes(checkpoint.config, tower.spec.width), checkpoint.config)
    return Source(checkpoint, words, tower)
