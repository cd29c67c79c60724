"""Write and read the `mmproj` GGUF file: CLIP and the projector, for llama.cpp's LLaVA graph.

Tensors are not only renamed, because of the graph:

- **Layer.** The graph stops one layer early unless `feature_layer` says otherwise. The file has no post-layernorm,
  because the projector was trained on the features before it.
- **Two linear layers for one.** The graph always has a GELU after the first layer. The two layers [W; −W] and [I, −I]
  together compute W, since gelu(x) − gelu(−x) = x. llama.cpp has a table of GELU in half precision inside ±10, and is
  exact outside; so the first layer makes x 256 times larger, and the second smaller.
- **Class token.** Since May 2025 the graph has put it after the patches and then dropped the first patch instead of it,
  with every position off by one (ggml-org/llama.cpp#25814). All versions read a file without a class token alike. So
  CLIP's class token replaces the patch in the upper left corner: that position gets the class embedding, enlarged
  16,384 times; the next layernorm undoes this, and the corner's pixels vanish beside it. The model gets 195 of the 196
  patches, and the class token's feature in place of the corner's.
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
from minimind_v.core.formats.vision_tower import StoredTower, add_unused, tower_shapes
from minimind_v.core.model.vision.encoder import VisionEncoder
from minimind_v.core.model.vision.spec import TOWERS, ClipConfig, VisionSpec, trouble_of, trouble_of_colours

_LAYER = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
          "attn_out": "self_attn.out_proj", "ffn_up": "mlp.fc1", "ffn_down": "mlp.fc2", "ln1": "layer_norm1",
          "ln2": "layer_norm2"}  # fmt: skip
_CORNER = "minimind_v.corner_position"  # llama.cpp ignores it; with it the file has all of CLIP
_LOUD = 2.0**14  # the factor that lifts the class embedding over the corner's pixels
_FAR = 2.0**8  # the factor that takes a projected feature out of GELU's table
# llama.cpp's key for an activation; without one it uses CLIP's own. Its `gelu` is the tanh form.
_ACTIVATIONS = {"quick_gelu": None, "gelu": "use_gelu", "gelu_new": "use_gelu", "gelu_pytorch_tanh": "use_gelu",
                "silu": "use_silu"}  # fmt: skip


def write_keys(writer: Writer, encoder: VisionEncoder, hidden_size: int) -> None:
    """Write the sizes of the tower. Raises WeightsError for a tower that llama.cpp cannot compute."""
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
    """Write the tower, and the projector given under its published names."""
    tower = encoder.tower.state_dict()
    writer.half("v.patch_embd.weight", tower["embeddings.patch_embedding.weight"])  # [width, 3, patch, patch]
    positions = tower["embeddings.position_embedding.weight"].float()  # [1 + P, width]
    shifted = positions[1:].clone()
    shifted[0] = (tower["embeddings.class_embedding"].float() + positions[0]) * _LOUD
    writer.exact("v.position_embd.weight", shifted)
    writer.exact(_CORNER, positions[1])
    for kind in ("weight", "bias"):
        writer.exact(f"v.pre_ln.{kind}", tower[f"pre_layrnorm.{kind}"])
    for layer in range(encoder.config.num_hidden_layers):
        for name, published in _LAYER.items():
            weight, bias = (tower[f"encoder.layers.{layer}.{published}.{kind}"] for kind in ("weight", "bias"))
            (writer.exact if weight.ndim == 1 else writer.matrix)(f"v.blk.{layer}.{name}.weight", weight)
            writer.exact(f"v.blk.{layer}.{name}.bias", bias)
    weight, bias = (projector[f"vision_proj.vision_proj.0.{kind}"].float() for kind in ("weight", "bias"))
    back = torch.eye(len(bias)) / _FAR
    writer.exact("mm.0.weight", torch.cat((weight, -weight)) * _FAR)  # [2·hidden, width]
    writer.exact("mm.0.bias", torch.cat((bias, -bias)) * _FAR)
    writer.exact("mm.2.weight", torch.cat((back, -back), dim=1))  # [hidden, 2·hidden]
    writer.exact("mm.2.bias", torch.zeros(len(bias)))


def read_tower(reader: Reader) -> Iterator[tuple[str, Tensor]]:
    """Yield the tower's tensors under CLIP's names, the corner's position included."""
    spec, config = read_sizes(reader)
    shapes, width = tower_shapes(TOWERS[CLIP_VISION], config), spec.width
    positions = reader.tensor("v.position_embd.weight", spec.tokens_per_image, width)
    corner = reader.tensor(_CORNER, width)
    yield "embeddings.class_embedding", positions[0] / _LOUD  # with its own position, which is 0 below
    yield "embeddings.position_embedding.weight", torch.cat((torch.zeros(1, width), corner[None], positions[1:]))

    def named(ours: str, theirs: str) -> tuple[str, Tensor]:
        return ours, reader.tensor(theirs, *shapes[ours])

    yield named("embeddings.patch_embedding.weight", "v.patch_embd.weight")
    for kind in ("weight", "bias"):
        yield named(f"pre_layrnorm.{kind}", f"v.pre_ln.{kind}")
        for layer in range(config.num_hidden_layers):
            for name, published in _LAYER.items():
                yield named(f"encoder.layers.{layer}.{published}.{kind}", f"v.blk.{layer}.{name}.{kind}")


def read_sizes(reader: Reader) -> tuple[VisionSpec, ClipConfig]:
    """The sizes of the tower. Raises WeightsError where mmv did not write the file, or its sizes are invalid."""

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
    """Read CLIP's whole tower. Raises WeightsError where mmv did not write the file."""
    spec, config = read_sizes(reader)
    tensors, kind = dict(read_tower(reader)), TOWERS[CLIP_VISION]
    for name, tensor in tensors.items():
        check_numbers(reader.path, name, tensor)
    add_unused(tensors, kind, tower_shapes(kind, config))
    return StoredTower(kind, config, spec, tensors)


def tower_tensors(encoder: VisionEncoder) -> dict[str, Tensor]:
    """The tensors of a tower in memory, as `read_tower` yields them."""
    tensors = dict(encoder.tower.state_dict())
    positions = tensors["embeddings.position_embedding.weight"].clone()
    tensors["embeddings.class_embedding"] = tensors["embeddings.class_embedding"] + positions[0]
    positions[0] = 0
    return tensors | {"embeddings.position_embedding.weight": positions}


@torch.no_grad()
def without_corner(encoder: VisionEncoder, pixel_values: Tensor) -> Tensor:
    """Features [M, P, width] of uint8 images [M, 3, S, S] as llama.cpp has them: the first is the class token's."""
    tower: Any = encoder.tower
    x = tower.embeddings((pixel_values.float() / 255 - encoder.mean) / encoder.std)  # [M, 1 + P, width]
    return tower.encode(torch.cat((x[:, :1], x[:, 2:]), dim=1))


def read_projector(reader: Reader) -> dict[str, Tensor]:
    """Read the projector under its published names."""
    width, hidden = reader.number("clip.vision.embedding_length"), reader.number("clip.vision.projection_dim")
    weight, bias = reader.tensor("mm.0.weight", 2 * hidden, width), reader.tensor("mm.0.bias", 2 * hidden)
    return {
        "vision_proj.vision_proj.0.weight": weight[:hidden] / _FAR,
        "vision_proj.vision_proj.0.bias": bias[:hidden] / _FAR,
    }
