"""The demo's assets of 2025 as a start for those of minimind-3v: other forms, nearly the same functions.

The forge trains the result on, for minutes where random weights would take an hour.
"""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from minimind_v.core.config.presets import PRESETS
from minimind_v.core.config.schema import CLIP_MEAN, CLIP_STD, SIGLIP_COLOURS
from minimind_v.core.data.images import load_pixels
from minimind_v.core.data.layouts import ChatML
from minimind_v.core.data.tokenizer import Tokenizer
from minimind_v.core.demo import world
from minimind_v.core.demo.generations import DEMO_GENERATIONS
from minimind_v.core.formats.vision_tower import load_encoder
from minimind_v.core.model.vlm import VLM

DEMO_2025 = DEMO_GENERATIONS["2025"]
ASSETS = Path(str(DEMO_2025.assets))


@torch.no_grad()
def fill_tower(tower: nn.Module) -> None:
    """Copy the CLIP tower into a SigLIP tower of the same sizes.

    The patch embedding takes on the normalisation of CLIP's colours and, with the deviation of a typical patch, the
    norm before the layers. The class token is left out.
    """
    encoder = load_encoder(ASSETS / "vision")
    clip: Any = encoder.tower
    stored = clip.state_dict()
    images = torch.stack([_image(encoder.spec.image_size, seed) for seed in range(16)])
    embeddings = clip.embeddings((images.float() / 255 - encoder.mean) / encoder.std)[:, 1:]  # [16, P, width]
    gain, shift = stored["pre_layrnorm.weight"], stored["pre_layrnorm.bias"]
    gain = gain * (1 / embeddings.std(dim=-1)).mean()
    mean, std, half = (torch.tensor(values).view(1, 3, 1, 1) for values in (CLIP_MEAN, CLIP_STD, SIGLIP_COLOURS))
    weight = stored["embeddings.patch_embedding.weight"]
    bias = (weight * (half - mean) / std).sum((1, 2, 3))
    weight, position = weight * half / std, stored["embeddings.position_embedding.weight"][1:]
    tensors = {name: tensor for name, tensor in stored.items() if name.startswith("encoder.")}
    tensors["embeddings.patch_embedding.weight"] = (weight - weight.mean(0)) * gain.view(-1, 1, 1, 1)
    tensors["embeddings.patch_embedding.bias"] = (bias - bias.mean()) * gain + shift
    tensors["embeddings.position_embedding.weight"] = (position - position.mean(-1, keepdim=True)) * gain
    tower.load_state_dict(tensors, strict=False)  # without the last norm


def _image(side: int, seed: int) -> Tensor:
    rng = random.Random(seed)
    drawing = world.jpeg(world.draw(world.make_scene(rng), rng))
    return torch.from_numpy(load_pixels(drawing, "drawn", side).copy())


@torch.no_grad()
def fill_base(model: VLM, tokenizer: Tokenizer) -> None:
    """Copy the Llama-form base into a Qwen3-form model of the same width.

    Tokens are matched by their text; further neurons of an MLP start without effect. The norms of queries and keys
    start with their usual sizes in a text.
    """
    stored = {name: tensor.float() for name, tensor in load_file(ASSETS / "lm_128.safetensors").items()}
    former = Tokenizer.load(ASSETS)
    tensors, ids = model.state_dict(), former.backend.get_vocab()
    for name, tensor in stored.items():
        if name.endswith("embed_tokens.weight"):
            for token, id in tokenizer.backend.get_vocab().items():
                if token in ids:
                    tensors[name][id] = tensor[ids[token]]
            continue
        if name.endswith("down_proj.weight"):
            tensors[name].zero_()
        tensors[name][tuple(slice(size) for size in tensor.shape)] = tensor
    for name, size in _sizes(stored, former).items():
        tensors[f"{name.removesuffix('_proj')}_norm.weight"].fill_(size)


def _sizes(stored: dict[str, Tensor], tokenizer: Tokenizer) -> dict[str, float]:
    """The root mean square of queries and keys of each layer, by the names of their projections."""
    encoder = load_encoder(ASSETS / "vision")
    model = VLM(PRESETS[DEMO_2025.preset], encoder.spec, tokenizer.placeholder_id)
    model.load_state_dict(stored, strict=False)
    sizes: dict[str, float] = {}

    def measure(name: str, module: nn.Module, inputs: Any, output: Tensor) -> None:
        sizes[name] = float(output.square().mean().sqrt())

    for name, module in model.named_modules():
        if name.endswith(("q_proj", "k_proj")):
            module.register_forward_hook(partial(measure, name))
    rng = random.Random(0)
    text = ChatML.system_prompt + " ".join(world.caption(world.make_scene(rng), "en") for _ in range(8))
    model.model(model.model.embed_tokens(torch.tensor([tokenizer.encode(text).ids])))
    return sizes
