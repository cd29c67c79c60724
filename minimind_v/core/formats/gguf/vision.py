"""The vision part as GGUF: the `mmproj` file with CLIP and the projector, for llama.cpp's LLaVA graph.

What differs from a plain renaming, and why:

- **Which layer.** The graph stops one layer early unless `feature_layer` says otherwise. Its post-layernorm is left
  out, because the projector was trained on what stands before it.
- **One linear layer of two.** The graph always has a GELU behind the first layer. Of the two layers [W; −W] and [I, −I]
  nothing is left but W, since gelu(x) − gelu(−x) = x. llama.cpp looks GELU up in a table of half precision inside
  ±10, and is exact outside; so x is made 256 times larger on the way in, and smaller on the way out.
- **The class token.** Since May 2025 the graph has put it behind the patches and then dropped the first patch in its
  place, with every position off by one (ggml-org/llama.cpp#25814). A file without a class token is read alike by all
  versions. So CLIP's class token takes the place of the patch in the upper left corner: its position is given the
  class embedding, 16,384 times enlarged, which the layernorm that follows undoes and beside which the corner's pixels
  vanish. The model does not see that one patch of its 196, and in its place reads the class token's feature.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from minimind_v.core.config.schema import CLIP_VISION
from minimind_v.core.errors import WeightsError
from minimind_v.core.formats.gguf.file import Reader, Writer
from minimind_v.core.formats.tensor_files import check_numbers
from minimind_v.core.formats.vision_tower import StoredTower, add_unused, build_encoder, tower_shapes
from minimind_v.core.model.vision.encoder import VisionEncoder
from minimind_v.core.model.vision.spec import TOWERS, ClipConfig, VisionSpec, trouble_of, trouble_of_colours

_LAYER = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
          "attn_out": "self_attn.out_proj", "ffn_up": "mlp.fc1", "ffn_down": "mlp.fc2", "ln1": "layer_norm1",
          "ln2": "layer_norm2"}  # fmt: skip
_CORNER = "minimind_v.corner_position"  # llama.cpp passes over it; with it nothing of CLIP is lost
_LOUD = 2.0**14  # how much the class embedding is enlarged over the corner's pixels
_FAR = 2.0**8  # how much a projected feature is enlarged past GELU's table
# Which key tells llama.cpp of an activation; without one it takes CLIP's own. Its `gelu` is the tanh form.
_ACTIVATIONS = {"quick_gelu": None, "gelu": "use_gelu", "gelu_new": "use_gelu", "gelu_pytorch_tanh": "use_gelu",
                "silu": "use_silu"}  # fmt: skip


def write_keys(writer: Writer, encoder: VisionEncoder, hidden_size: int) -> None:
    """Everything that llama.cpp must know of the tower. Raises WeightsError for a tower that it cannot compute."""
    file, config, spec = writer.file, encoder.config, encoder.spec
    if config.hidden_act not in _ACTIVATIONS:
        raise WeightsError(f"llama.cpp supports no vision encoder with activation {config.hidden_act!r}")
    if switch := _ACTIVATIONS[config.hidden_act]:
        file.add_bool(f"clip.{switch}", True)
    file.add_clip_has_vision_encoder(True)
    file.add_clip_projector_type("mlp")
    file.add_vision_image_size(spec.image_size)
    file.add_vision_patch_size(spec.patch_size)
    file.add_vision_embedding_length(spec.width)
    file.add_vision_feed_forward_length(config.intermediate_size)
    file.add_vision_block_count(config.num_hidden_layers)
    file.add_vision_head_count(config.num_attention_heads)
    file.add_vision_attention_layernorm_eps(config.layer_norm_eps)
    file.add_vision_image_mean(list(spec.mean))
    file.add_vision_image_std(list(spec.std))
    file.add_vision_projection_dim(hidden_size)
    file.add_array("clip.vision.feature_layer", [config.num_hidden_layers])


def write_tensors(writer: Writer, encoder: VisionEncoder, projector: dict[str, Tensor]) -> None:
    """The tower, and the projector given under its published names."""
    tower = encoder.tower.state_dict()
    writer.half("v.patch_embd.weight", tower["embeddings.patch_embedding.weight"])  # [width, 3, patch, patch]
    positions = tower["embeddings.position_embedding.weight"].float()  # [1 + P, width]
    seen = positions[1:].clone()
    seen[0] = (tower["embeddings.class_embedding"].float() + positions[0]) * _LOUD
    writer.exact("v.position_embd.weight", seen)
    writer.exact(_CORNER, positions[1])
    for part in ("weight", "bias"):
        writer.exact(f"v.pre_ln.{part}", tower[f"pre_layrnorm.{part}"])
    for layer in range(encoder.config.num_hidden_layers):
        for name, published in _LAYER.items():
            weight, bias = (tower[f"encoder.layers.{layer}.{published}.{part}"] for part in ("weight", "bias"))
            (writer.exact if weight.ndim == 1 else writer.matrix)(f"v.blk.{layer}.{name}.weight", weight)
            writer.exact(f"v.blk.{layer}.{name}.bias", bias)
    weight, bias = (projector[f"vision_proj.vision_proj.0.{part}"].float() for part in ("weight", "bias"))
    back = torch.eye(len(bias)) / _FAR
    writer.exact("mm.0.weight", torch.cat((weight, -weight)) * _FAR)  # [2·hidden, width]
    writer.exact("mm.0.bias", torch.cat((bias, -bias)) * _FAR)
    writer.exact("mm.2.weight", torch.cat((back, -back), dim=1))  # [hidden, 2·hidden]
    writer.exact("mm.2.bias", torch.zeros(len(bias)))


def read_tower(reader: Reader) -> Iterator[tuple[str, Tensor]]:
    """The tower's tensors under CLIP's names, one by one, the corner's position included."""
    spec, config = read_sizes(reader)
    shapes, width = tower_shapes(TOWERS[CLIP_VISION], config), spec.width
    positions = reader.tensor("v.position_embd.weight", spec.tokens_per_image, width)
    class_token = positions[0] / _LOUD  # with its position, so that this has none
    corner = reader.tensor(_CORNER, width)
    yield "embeddings.class_embedding", class_token
    yield "embeddings.position_embedding.weight", torch.cat((torch.zeros(1, width), corner[None], positions[1:]))

    def named(ours: str, theirs: str) -> tuple[str, Tensor]:
        return ours, reader.tensor(theirs, *shapes[ours])

    yield named("embeddings.patch_embedding.weight", "v.patch_embd.weight")
    for part in ("weight", "bias"):
        yield named(f"pre_layrnorm.{part}", f"v.pre_ln.{part}")
        for layer in range(config.num_hidden_layers):
            for name, published in _LAYER.items():
                yield named(f"encoder.layers.{layer}.{published}.{part}", f"v.blk.{layer}.{name}.{part}")


def read_sizes(reader: Reader) -> tuple[VisionSpec, ClipConfig]:
    """What the tower is. Raises WeightsError where the file is no `mmproj` of ours, or its sizes are those of none."""

    def size(name: str) -> int:
        return int(reader.number(f"clip.vision.{name}"))

    mean, std = (reader.key(f"clip.vision.image_{name}") for name in ("mean", "std"))
    used = next((act for act, switch in _ACTIVATIONS.items() if switch and reader.keys.get(f"clip.{switch}")), None)
    config = ClipConfig(
        image_size=size("image_size"), patch_size=size("patch_size"), hidden_size=size("embedding_length"),
        intermediate_size=size("feed_forward_length"), num_hidden_layers=size("block_count"),
        num_attention_heads=size("attention.head_count"), hidden_act=used or "quick_gelu",
        layer_norm_eps=reader.number("clip.vision.attention.layer_norm_epsilon", float),
    )  # fmt: skip
    if trouble := trouble_of(config) or trouble_of_colours(mean, std):
        raise WeightsError(f"{reader.path}: the vision model does not load ({trouble}) — convert again")
    return VisionSpec(config.image_size, config.patch_size, config.hidden_size, tuple(mean), tuple(std)), config


def read_stored(reader: Reader) -> StoredTower:
    """The whole of CLIP's tower again. Raises WeightsError where the file is no `mmproj` of ours."""
    spec, config = read_sizes(reader)
    tensors, kind = dict(read_tower(reader)), TOWERS[CLIP_VISION]
    for name, tensor in tensors.items():
        check_numbers(reader.path, name, tensor)
    add_unused(tensors, kind, tower_shapes(kind, config))
    return StoredTower(kind, config, spec, tensors)


def read_encoder(reader: Reader) -> VisionEncoder:
    """The vision encoder of an `mmproj`. Raises as `read_stored`."""
    return build_encoder(read_stored(reader))


def tower_tensors(encoder: VisionEncoder) -> dict[str, Tensor]:
    """What `read_tower` gives, of a tower in memory."""
    tensors = dict(encoder.tower.state_dict())
    positions = tensors["embeddings.position_embedding.weight"].clone()
    tensors["embeddings.class_embedding"] = tensors["embeddings.class_embedding"] + positions[0]
    positions[0] = 0
    return tensors | {"embeddings.position_embedding.weight": positions}


@torch.no_grad()
def without_corner(encoder: VisionEncoder, pixel_values: Tensor) -> Tensor:
    """Features [M, P, width] of uint8 pictures [M, 3, S, S] as llama.cpp has them: the first is the class token's."""
    tower: Any = encoder.tower
    x = tower.embeddings((pixel_values.float() / 255 - encoder.mean) / encoder.std)  # [M, 1 + P, width]
    x = torch.cat((x[:, :1], x[:, 2:]), dim=1)  # [M, P, width]
    return tower.encode(x)


def read_projector(reader: Reader) -> dict[str, Tensor]:
    """The projector under its published names."""
    width, hidden = reader.number("clip.vision.embedding_length"), reader.number("clip.vision.projection_dim")
    weight, bias = reader.tensor("mm.0.weight", 2 * hidden, width), reader.tensor("mm.0.bias", 2 * hidden)
    return {
        "vision_proj.vision_proj.0.weight": weight[:hidden] / _FAR,
        "vision_proj.vision_proj.0.bias": bias[:hidden] / _FAR,
    }
