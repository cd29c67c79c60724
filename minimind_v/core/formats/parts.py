"""What is to be exported as it is stored: tensors that stay in their files until they are written, and no modules.

Everything is checked to fit together by names and shapes. Reading needs no transformers, so it is quick and small; that
what was written computes the same is what verification proves, with the modules.
"""

from __future__ import annotations

from dataclasses import dataclass

from minimind_v.core.data.tokenizer import Tokenizer
from minimind_v.core.formats.checkpoint import Checkpoint, match_tensors, read_checkpoint
from minimind_v.core.formats.gguf.read import is_gguf, read_tokenizer, read_vision_encoder
from minimind_v.core.formats.hf.names import published_shapes
from minimind_v.core.formats.load import check_companions, find_companions
from minimind_v.core.formats.request import ExportRequest
from minimind_v.core.formats.vision_tower import Tower, read_tower


@dataclass(frozen=True)
class Source:
    """All parts of a model."""

    checkpoint: Checkpoint
    tokenizer: Tokenizer
    tower: Tower


def read_parts(order: ExportRequest) -> Source:
    """Read what `order` names. Raises MissingInput, or WeightsError where a part is damaged or does not fit."""
    checkpoint = read_checkpoint(order.model)
    order.refuse_layout(checkpoint.companions.layout)
    paths = find_companions(checkpoint, order.vision_model, order.tokenizer)
    if is_gguf(paths.vision_model):
        eye = read_vision_encoder(paths.vision_model)
        tower = Tower(eye.config, eye.spec, dict(eye.tower.state_dict()))
    else:
        tower = read_tower(paths.vision_model)
    words = (
        read_tokenizer(paths.tokenizer)
        if is_gguf(paths.tokenizer)
        else Tokenizer.load(paths.tokenizer, checkpoint.companions.layout)
    )
    check_companions(checkpoint, paths, words, tower.spec, tower.tensors)
    match_tensors(checkpoint, published_shapes(checkpoint.config, tower.spec.width), checkpoint.config)
    return Source(checkpoint, words, tower)
