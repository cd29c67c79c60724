"""The parts of a model as they lie in their files."""

import subprocess
import sys

import pytest
import torch

from minimind_v.core.config.presets import PRESETS
from minimind_v.core.formats.hf.names import published_shapes
from minimind_v.core.formats.load import read_model_parts
from minimind_v.core.model.projector import projector_shapes
from minimind_v.core.model.vision.spec import VisionSpec
from minimind_v.core.model.vlm import VLM
from tests.cli.harness import ASSETS, EYE, run_mmv
from tests.export.made import CONFIGS, order, weights
from tests.formats.towers import LAYOUTS


@pytest.mark.parametrize("config", [*CONFIGS.values(), *PRESETS.values()], ids=[*CONFIGS, *PRESETS])
def test_a_checkpoint_has_the_tensors_of_the_model(config):
    with torch.device("meta"):
        model = VLM(config, spec := VisionSpec(64, 8, 48), placeholder_id=5)
    shapes = published_shapes(config) | projector_shapes(spec, config.hidden_size)
    assert shapes == {name: tensor.shape for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_a_tower_is_exported(layout, tmp_path):
    layout(tmp_path)
    out = tmp_path / "out"
    paths = ("--vision-model", tmp_path, "--tokenizer", order().tokenizer)
    assert run_mmv("convert", "--to", "hf", "--model", weights("dense"), *paths, "--out", out, "--no-verify").code == 0


@pytest.mark.long
def test_reading_needs_no_transformers():
    """Whose import takes longer than all the rest."""
    code = (
        "import sys; from minimind_v.core.formats.load import read_model_parts; "
        "from minimind_v.core.formats.hf import write; "
        "assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert read_model_parts(weights("dense"), EYE, ASSETS).checkpoint.stage == "sft"
