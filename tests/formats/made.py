"""Small models and their weights, made on the spot."""

import io

import torch

from minimind_v.core.config.schema import TextConfig
from minimind_v.core.formats.checkpoint import export_tensors, read_checkpoint, write_checkpoint
from minimind_v.core.model.vision.encoder import VisionSpec
from minimind_v.core.model.vlm import VLM

SPEC = VisionSpec(image_size=16, patch_size=8, width=24)
DENSE = TextConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=61)
MOE = TextConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=61, use_moe=True)


def model(config=DENSE, seed=0, spec=SPEC):
    torch.manual_seed(seed)
    return VLM(config, spec, placeholder_id=5)


def state(config=DENSE, seed=0):
    """A published state dict: half precision, no vision encoder."""
    return export_tensors(model(config, seed))


def text_only(tensors):
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("vision_proj.")}


def packed(content, **how):
    """What torch.save would write."""
    buffer = io.BytesIO()
    torch.save(content, buffer, **how)
    return buffer.getvalue()


def saved(path, content, **how):
    path.write_bytes(packed(content, **how))
    return read_checkpoint(path)


def written(path, config=DENSE, stage="sft", tensors=None):
    write_checkpoint(path, tensors or state(config), config, stage)
    return read_checkpoint(path)
