"""A tiny model of minimind-3v in the three folders and files of its form: SigLIP, tokenizer, weights."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from minimind_v.core.config.presets import PRESETS
from minimind_v.core.config.schema import MLP, VisionSpec
from minimind_v.core.formats.checkpoint import export_tensors
from minimind_v.core.model.vision.siglip_config import SiglipConfig
from minimind_v.core.model.vision.spec import TOWERS, read_vision_spec
from minimind_v.core.model.vlm import VLM
from tests.tokenizers_made import thinking_tokenizer

SIZES = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
         "intermediate_size": 64, "vocab_size": 600}  # fmt: skip
DENSE = replace(PRESETS["3v"], **SIZES)
MOE = replace(PRESETS["3v-moe"], **SIZES)
TOWER = SiglipConfig(hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2, image_size=64,
                     patch_size=16)  # fmt: skip
SPEC = VisionSpec(image_size=64, patch_size=16, width=24)


def tiny_siglip(folder: Path, seed: int = 0) -> Path:
    """The folder of a SigLIP tower as it is published: half precision, a squeezing preprocessor."""
    folder.mkdir(parents=True)
    torch.manual_seed(seed)
    module = TOWERS["siglip_vision_model"].build(TOWER)
    tensors = {f"vision_model.{name}": tensor.half().contiguous() for name, tensor in module.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {"model_type": "siglip_vision_model", **asdict(TOWER)}
    preprocessor = {"resample": 2, "size": {"height": 64, "width": 64}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return folder


def tiny_state(config=DENSE, spec=SPEC, seed=0):
    """The published tensors of a tiny model with the MLP projector."""
    torch.manual_seed(seed)
    return export_tensors(VLM(config, spec, placeholder_id=5, projector=MLP))


def tiny_3v(folder: Path, config=DENSE, name="sft_vlm_48.pth") -> tuple[Path, Path, Path]:
    """Weights, vision model and tokenizer of a tiny model, below `folder`."""
    tower, tokenizer = tiny_siglip(folder / "siglip"), thinking_tokenizer(folder / "words")
    torch.save(tiny_state(config, read_vision_spec(tower)), folder / name)
    return folder / name, tower, tokenizer
