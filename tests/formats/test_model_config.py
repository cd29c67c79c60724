"""The description of the whole model, saved with its weights and inferred where it is missing."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from minimind_v.core.config.load import build_config
from minimind_v.core.config.schema import ModelConfig, VisionSpec
from minimind_v.core.data.images import load_pixels
from minimind_v.core.errors import UsageError, WeightsError
from minimind_v.core.export.folder import export
from minimind_v.core.formats.checkpoint import read_checkpoint, write_checkpoint
from minimind_v.core.formats.companions import vision_digest
from minimind_v.core.formats.request import ExportRequest
from minimind_v.core.formats.vision_tower import read_tower
from minimind_v.core.model.projector import PROJECTORS, projected
from minimind_v.core.model.vlm import VLM
from tests.cli.harness import EYE
from tests.formats.made import DENSE, SPEC, state

CONFIG = ModelConfig(DENSE, SPEC)


@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_the_model_config_is_saved_with_the_weights(tmp_path, ending):
    path = tmp_path / f"w{ending}"
    write_checkpoint(path, state(), CONFIG, "sft")
    checkpoint = read_checkpoint(path)
    assert checkpoint.model_config == CONFIG
    assert (checkpoint.config, checkpoint.vision_width, checkpoint.stage) == (DENSE, 24, "sft")


def test_the_json_beside_weights_names_tokens_per_image(tmp_path):
    write_checkpoint(tmp_path / "w.pth", state(), CONFIG, "sft")
    described = json.loads((tmp_path / "w.json").read_text())
    assert described["projector"] == {"type": "linear", "tokens_per_image": 4}
    assert described["vision"]["tokens_per_image"] == 4
    assert described["model"]["hidden_size"] == DENSE.hidden_size


def test_the_model_config_survives_a_conversion(tmp_path):
    write_checkpoint(tmp_path / "w.pth", state(), CONFIG, "sft")
    export(ExportRequest(tmp_path / "w.pth"), "safetensors", tmp_path / "w.safetensors")
    assert read_checkpoint(tmp_path / "w.safetensors").model_config == CONFIG


def test_descriptions_of_older_runs_are_read_and_the_projector_is_recognised(tmp_path):
    write_checkpoint(tmp_path / "w.pth", state(), DENSE, "sft")
    assert json.loads((tmp_path / "w.json").read_text()).keys() == {"stage", "model"}
    checkpoint = read_checkpoint(tmp_path / "w.pth")
    assert (checkpoint.model_config, checkpoint.vision, checkpoint.projector) == (DENSE, None, "linear")
    (tmp_path / "w.json").unlink()
    assert read_checkpoint(tmp_path / "w.pth").projector == "linear"


@pytest.mark.parametrize(
    "vision",
    [{"image_size": "wide"}, {"patch_size": 0}, {"mean": [1, 2]}, {"mean": 3}, {"resize_mode": "stretch"},
     {"width": 10**9}, {"tokens_per_image": -1}, {"std": None}],
)  # fmt: skip
def test_a_damaged_description_of_the_tower_is_refused_in_one_line(tmp_path, vision):
    write_checkpoint(tmp_path / "w.pth", state(), CONFIG, "sft")
    described = json.loads((tmp_path / "w.json").read_text())
    described["vision"] |= vision
    (tmp_path / "w.json").write_text(json.dumps(described))
    with pytest.raises(WeightsError, match=r"belongs to other weights \(vision tower: ") as caught:
        read_checkpoint(tmp_path / "w.pth")
    assert "\n" not in str(caught.value)


def test_a_projector_that_no_table_has_is_refused_and_extensions_are_named():
    with pytest.raises(
        UsageError, match=r"projector 'liner' must be one of linear, mlp \(did you mean 'linear'\?\) .*MMV"
    ):
        VLM(DENSE, SPEC, 5, projector="liner")


def test_the_description_of_a_projector_outweighs_a_guess_from_its_tensors(tmp_path):
    """Its first tensor has the name of minimind-3v's, and the two dimensions of its form of April."""
    config, tensors = ModelConfig(DENSE, SPEC, "linear"), state()
    tensors |= {"vision_proj.mlp.0.weight": tensors.pop("vision_proj.vision_proj.0.weight")}
    tensors["vision_proj.mlp.0.bias"] = tensors.pop("vision_proj.vision_proj.0.bias")
    write_checkpoint(tmp_path / "w.pth", tensors, config, "sft")
    with pytest.raises(WeightsError, match=r"names the projector 'linear', the tensors are those of another kind"):
        read_checkpoint(tmp_path / "w.pth")
    described = json.loads((tmp_path / "w.json").read_text())
    described["projector"]["type"] = "own"
    (tmp_path / "w.json").write_text(json.dumps(described))
    checkpoint = read_checkpoint(tmp_path / "w.pth")
    assert (checkpoint.projector, checkpoint.vision_width) == ("own", SPEC.width)
    (tmp_path / "w.json").unlink()
    with pytest.raises(WeightsError, match="in its form of April"):
        read_checkpoint(tmp_path / "w.pth")


def test_the_projector_changes_tokens_per_image_for_prompts_only(monkeypatch):
    class Half(PROJECTORS["linear"]):
        @staticmethod
        def tokens_per_image(spec):
            return spec.tokens_per_image // 2

        def forward(self, image_features):
            return super().forward(image_features[:, ::2])

    monkeypatch.setitem(PROJECTORS, "half", Half)
    assert projected(SPEC, "half").tokens_per_image == 2
    model = VLM(DENSE, SPEC, 5, projector="half")
    assert (model.spec.tokens_per_image, model.model_config.vision.tokens_per_image) == (2, 4)
    ids = torch.tensor([[1, 5, 5, 7]])
    assert model(ids, image_features=torch.randn(1, 4, 24)).logits.shape == (1, 4, 61)
    with pytest.raises(ValueError, match="row 0"):
        model(ids, image_features=torch.randn(1, 4, 24), image_mask=torch.tensor([[False, True, False, False]]))


def test_the_digest_of_a_clip_tower_is_that_of_earlier_releases():
    """Weights and feature caches of users hold it."""
    tower = read_tower(EYE)
    assert vision_digest(tower.spec, tower.tensors) == "4b90be5a7d7620d1"
    assert tower.spec.identity.startswith("VisionSpec(image_size=64, patch_size=8, width=128, mean=(0.48")
    assert VisionSpec(64, 8, 128, resize_mode="squeeze").identity != VisionSpec(64, 8, 128).identity


def test_the_projector_is_a_setting_of_a_run():
    assert build_config("pretrain").projector == "linear"
    assert build_config("pretrain", sets=["projector=shuffle"]).projector == "shuffle"


def test_a_squeezed_image_keeps_its_edges():
    wide = np.zeros((40, 120, 3), np.uint8)
    wide[:, :30], wide[:, 90:] = 255, 255
    buffer = io.BytesIO()
    Image.fromarray(wide).save(buffer, "png")
    squeezed, cropped = (load_pixels(buffer.getvalue(), "image", 16, mode) for mode in ("squeeze", "crop"))
    assert squeezed.shape == cropped.shape == (3, 16, 16)
    assert (squeezed[:, :, [0, -1]] > 250).all()
    assert cropped.max() == 0
