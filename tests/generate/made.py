"""Tiny models with a vision tower, wide random weights, and the demo's tokenizer."""

import torch

from minimind_v.core.config.schema import TextConfig
from minimind_v.core.model.kernels.accelerate import accelerate
from minimind_v.core.model.vlm import VLM
from tests.cli.harness import tokenizer
from tests.model.conftest import SIZES, SPEC, spread, tiny_encoder

KINDS = {
    "dense": {},
    "one head for all": {"num_key_value_heads": 1},
    "experts": {"use_moe": True},
    "many experts, none shared": {
        "use_moe": True,
        "n_routed_experts": 7,
        "num_experts_per_tok": 3,
        "n_shared_experts": 0,
    },
    "normed heads": {"qk_norm": True, "num_key_value_heads": 2},
    "normed heads, one expert for a token": {
        "qk_norm": True,
        "use_moe": True,
        "num_experts_per_tok": 1,
        "n_shared_experts": 0,
    },
}


def make_model(seed=0, **sizes):
    loaded = tokenizer()
    model = VLM(TextConfig(**(SIZES | {"vocab_size": loaded.vocab_size} | sizes)), SPEC, loaded.placeholder_id)
    spread(model, seed)
    model.vision_encoder = tiny_encoder(seed)
    return accelerate(model.eval(), torch.device("cpu"))  # as a model is loaded
