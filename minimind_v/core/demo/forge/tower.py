"""The demo's vision encoder, which learns the words for what is on each patch."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, PreTrainedModel, SiglipVisionConfig, SiglipVisionModel

from minimind_v.core.config.generation import V2026
from minimind_v.core.config.schema import SIGLIP_VISION
from minimind_v.core.data.images import load_pixels
from minimind_v.core.demo import warm_start, world
from minimind_v.core.demo.forge.training import Recipe, descend
from minimind_v.core.demo.generations import DemoGeneration
from minimind_v.core.model.vision.encoder import VisionEncoder, VisionSpec
from minimind_v.core.model.vision.spec import DEMO, TOWERS

ATTRIBUTES = (list(world.SIZES), list(world.COLOURS), list(world.SHAPES), list(world.POSITIONS))
WORDS = [word for attribute in ATTRIBUTES for word in attribute]  # all words for a patch


def nameless_colour(rng: random.Random) -> tuple[int, int, int]:
    """A colour without a word in the world, far from those with one."""
    while True:
        colour = (rng.randrange(256), rng.randrange(256), rng.randrange(256))
        named = (rgb for _, rgb in world.COLOURS.values())
        grey = max(colour) - min(colour) < 40  # the background is grey
        if not grey and all(sum((a - b) ** 2 for a, b in zip(colour, rgb, strict=True)) > 75**2 for rgb in named):
            return colour


def captioned_image(spec: VisionSpec, rng: random.Random, held_out: bool = False) -> tuple[Tensor, Tensor]:
    """The pixels of an image [3, S, S], and the words of the object on each patch [P, words].

    Most objects have a colour without a name, and no word for it. With named colours alone the tower learned that red
    objects are never stars, and could not encode the shape of the held-out pairs. (With `held_out`, for measurements
    only, every image has such a pair, and all colours have names.)
    """
    patches = spec.image_size // spec.patch_size
    figures = [
        figure if held_out or rng.random() < 0.4 else replace(figure, colour=nameless_colour(rng), named=False)
        for figure in world.pose(world.make_scene(rng, held_out), rng)
    ]
    drawing = world.jpeg(world.paint(figures, rng))
    pixels = load_pixels(drawing, "drawn", spec.image_size, spec.resize_mode, spec.resample)
    covers = []
    for figure in figures:
        mask = Image.new("L", (world.CANVAS, world.CANVAS))
        figure.paint(ImageDraw.Draw(mask), 255)
        covers.append(np.asarray(mask.resize((patches, patches), Image.Resampling.BOX)).reshape(-1) / 255)
    cover = np.stack(covers)  # [objects, P]
    labels = np.zeros((patches * patches, len(WORDS)), dtype=np.float32)
    for patch, (which, share) in enumerate(zip(cover.argmax(0), cover.max(0), strict=True)):
        if share > 0.15:
            item, named = figures[which].item, figures[which].named
            names = (item.size, item.shape, item.position, *([item.colour] if named else []))
            labels[patch, [WORDS.index(name) for name in names]] = 1
    return torch.from_numpy(pixels.copy()), torch.from_numpy(labels)


def batches(
    spec: VisionSpec, rng: random.Random, count: int, size: int, held_out: bool = False
) -> Iterator[tuple[Tensor, Tensor]]:
    """`count` fresh batches of images [B, 3, S, S] and words [B, P, words]."""
    for _ in range(count):
        pixels, labels = zip(*(captioned_image(spec, rng, held_out) for _ in range(size)), strict=True)
        yield torch.stack(pixels), torch.stack(labels)


def published_tower(model_type: str) -> PreTrainedModel:
    """transformers' tower of the demo's sizes, its weights drawn as those of the published ones were."""
    sizes = vars(DEMO[model_type])
    if model_type == SIGLIP_VISION:
        return SiglipVisionModel(SiglipVisionConfig(**sizes, vision_use_head=False))
    return CLIPVisionModel(CLIPVisionConfig(**sizes, projection_dim=sizes["hidden_size"]))


def demo_spec(model_type: str) -> VisionSpec:
    """The spec of the demo's tower."""
    return TOWERS[model_type].describe(DEMO[model_type], {})


def train_tower(out: Path, demo: DemoGeneration, seed: int, recipe: Recipe) -> dict[str, float]:
    """Train the tower to caption: from each patch a linear layer predicts the words of its object.

    It predicts them by regression to 0 and 1, not by logits, so that the features hold them linearly and at one scale,
    as a linear projector needs them.
    """
    torch.manual_seed(seed)
    rng = random.Random(seed)
    model_type = demo.generation.towers[0]
    published, tower = published_tower(model_type), TOWERS[model_type].build(DEMO[model_type])
    tower.load_state_dict(published.state_dict())
    if demo.generation is V2026:
        warm_start.fill_tower(tower)
    spec = demo_spec(model_type)
    encoder = VisionEncoder(tower, spec)
    tower.requires_grad_(True)
    reader = nn.Linear(spec.width, len(WORDS))
    parameters = [*tower.parameters(), *reader.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=recipe.tower_lr, weight_decay=0.05)

    def losses() -> Iterator[Tensor]:
        for pixels, labels in batches(spec, rng, recipe.tower_steps, 64):
            read = reader(_encode(encoder, pixels))  # [B, P, words]
            named = labels.any(dim=-1, keepdim=True)  # patches of objects are rare: weigh them up
            yield ((read - labels).square() * torch.where(named, 4.0, 1.0)).mean()

    started = time.time()
    for _ in descend("tower", optimiser, losses(), recipe.tower_steps, 0.1):
        pass
    figures = _score_tower(encoder, reader, random.Random(seed + 1))
    figures["seconds"] = round(time.time() - started)
    folder = out / "vision"
    folder.mkdir(exist_ok=True)
    published.load_state_dict(tower.state_dict())
    published.half().save_pretrained(folder)
    normal = {"image_mean": spec.mean, "image_std": spec.std, "size": spec.image_size}
    (folder / "preprocessor_config.json").write_text(json.dumps(normal, indent=1) + "\n")
    return figures


def _encode(encoder: VisionEncoder, pixels: Tensor) -> Tensor:
    """Features as VisionEncoder computes them, but with gradients."""
    return encoder.tower((pixels.float() / 255 - encoder.mean) / encoder.std)


@torch.no_grad()
def _score_tower(encoder: VisionEncoder, reader: nn.Linear, rng: random.Random) -> dict[str, float]:
    """The share of object patches of new images whose words are predicted right; held-out pairs apart."""
    names, groups = ("size", "colour", "shape", "place"), [len(attribute) for attribute in ATTRIBUTES]
    pairs = [(WORDS.index(shape), WORDS.index(colour)) for shape, colour in sorted(world.HELD_OUT)]
    figures: dict[str, float] = {}
    for held_out, suffix in ((False, ""), (True, "_of_held_out_pairs")):
        right, total = torch.zeros(len(names)), torch.zeros(len(names))
        for pixels, labels in batches(encoder.spec, rng, 10, 64, held_out):
            chosen = sum(labels[..., s] * labels[..., c] for s, c in pairs) > 0 if held_out else labels.any(dim=-1)
            read, truth = reader(_encode(encoder, pixels))[chosen], labels[chosen]
            for n, (guess, target) in enumerate(zip(read.split(groups, -1), truth.split(groups, -1), strict=True)):
                named = target.any(dim=-1)  # a colour without a name does not count
                right[n] += ((guess.argmax(-1) == target.argmax(-1)) & named).sum()
                total[n] += named.sum()
        shares = (right / total).tolist()
        figures |= {f"patch_{name}{suffix}": round(share, 4) for name, share in zip(names, shares, strict=True)}
    return figures
