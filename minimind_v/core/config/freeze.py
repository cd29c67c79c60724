"""Freeze policies: which parameters of a model train, by name.

A policy may first put its own modules into the model, as LoRA does. Their `state_dict` must have the published names
and shapes and all trained changes: a run saves it, and every other command loads it. Parameters go into the resume
state as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from minimind_v.core.extensions import Table


@dataclass(frozen=True)
class FreezePolicy:
    """Which parameters train, by their name and the number of decoder layers; the vision encoder never trains."""

    trains: Callable[[str, int], bool]
    prepare: Callable[[Any], None] = lambda model: None  # called once with the VLM, its weights loaded


FREEZE_POLICIES = Table(
    {
        "projector": FreezePolicy(lambda name, layers: False),
        "projector+last": FreezePolicy(lambda name, layers: name.startswith(f"model.layers.{layers - 1}.")),
        "projector+ends": FreezePolicy(
            lambda name, layers: name.startswith(("model.layers.0.", f"model.layers.{layers - 1}."))
        ),
        "attention": FreezePolicy(lambda name, layers: ".self_attn." in name),
        "all": FreezePolicy(lambda name, layers: True),
    }
)  # the projector trains in all of them
