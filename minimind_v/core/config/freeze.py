"""Freeze policies: which parameters of a model train, by name.

A policy may put modules of its own into the model first, as LoRA does. Their `state_dict` must have the published
names and shapes, with all that they have learned in them: it is what a run saves, and what every other command loads.
Parameters go into the resume state as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class FreezePolicy:
    """Which parameters train, asked by their name and the number of decoder layers; the vision encoder never does."""

    trains: Callable[[str, int], bool]
    prepare: Callable[[Any], None] = lambda model: None  # called once with the VLM, its weights loaded


def _in_layers(name: str, *layers: int) -> bool:
    return name.startswith(tuple(f"model.layers.{layer}." for layer in layers))


FREEZE_POLICIES = {
    "projector": FreezePolicy(lambda name, layers: False),
    "projector+last": FreezePolicy(lambda name, layers: _in_layers(name, layers - 1)),
    "attention": FreezePolicy(lambda name, layers: ".self_attn." in name),
    "all": FreezePolicy(lambda name, layers: True),
}  # the projector trains in all of them
