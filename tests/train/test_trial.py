"""Made-up steps: without weights they are measured like those of the run, and a light model does all of the work."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from minimind_v.core.config.presets import PRESETS
from minimind_v.core.curate.stats import TypicalRow
from minimind_v.core.model.kernels.accelerate import accelerate
from minimind_v.core.model.kernels.cpu_clip import CpuSiglipVision
from minimind_v.core.model.vision.clip import ClipVision
from minimind_v.core.model.vision.encoder import VisionEncoder
from minimind_v.core.model.vision.spec import read_tower_config
from minimind_v.core.model.vlm import VLM
from minimind_v.core.train import forecast, trial
from minimind_v.core.train.freeze import freeze
from minimind_v.core.train.trial import Trial
from tests.curate.made import recipe

CPU = torch.device("cpu")
TINY_ENCODER = (
    '{"vision_config": {"image_size": 16, "patch_size": 8, "hidden_size": 32, "intermediate_size": 32,'
    ' "num_hidden_layers": 3, "num_attention_heads": 2}}'
)


@pytest.fixture
def vision_model(tmp_path):
    """A folder that says how large a vision encoder is, and has no weights."""
    (tmp_path / "config.json").write_text(TINY_ENCODER)
    return tmp_path


def test_a_light_siglip_tower_has_one_layer_for_all(tmp_path):
    (tmp_path / "config.json").write_text(
        TINY_ENCODER.replace('{"image_size"', '{"model_type": "siglip", "image_size"')
    )
    config = replace(recipe(), vision_model=tmp_path, model=PRESETS["demo"], projector="mlp")
    light = Trial(config, CPU, light=True)
    layers = light.train_step.model.vision_encoder.tower.encoder.layers
    assert type(light.train_step.model.vision_encoder.tower) is CpuSiglipVision
    assert len(layers) == 3
    assert len(set(layers)) == 1
    light.passes(light.batch([1, 1], 30, 7))


def test_time_is_measured_without_weights(vision_model, monkeypatch):
    """With a clock by which a batch takes one and a half seconds: two rows fit into the four seconds of a batch."""
    done = []
    monkeypatch.setattr(forecast, "seconds", lambda device, work: done.append(work()) or 1.5)
    monkeypatch.setattr(trial, "seconds", lambda device, work: done.append(work()) or 0.5)
    config = replace(recipe(), vision_model=vision_model, model=PRESETS["demo"])
    row = TypicalRow(length=20, pictures=1.5, supervised=5)
    estimate = forecast.estimate(config, row, 1000, 250)
    assert estimate.seconds == 1000 * 1.5 / 2 + 250 * 0.5, estimate.how
    assert estimate.how.startswith("an estimate: 1.50 s for 2 synthetic rows of 20 tokens and 1.5 images each")
    assert len(done) == 3 + 1
    missing = forecast.estimate(replace(config, vision_model=vision_model / "none"), row, 1000, 250)
    assert missing.seconds is None
    assert missing.how.startswith("not measured: no vision model")


@pytest.mark.parametrize(
    ("preset", "policy"),
    [*itertools.product(("demo", "small"), ("projector+last", "attention", "all")), ("small", "projector+ends")],
)
def test_a_light_trial_does_the_work_of_all_layers(vision_model, policy, preset):
    """By a clock that counts multiplications, against the model that a run would train."""

    def multiplications(work):
        with FlopCounterMode(display=False) as counter:
            work()
        return counter.get_total_flops()

    config = replace(recipe(), vision_model=vision_model, model=PRESETS[preset], freeze=policy)
    light = Trial(config, CPU, light=True)
    batch = light.batch([1, 1], 30, 7)
    counted = multiplications(lambda: light.passes(batch))

    tower = ClipVision(read_tower_config(vision_model)[1])
    whole = VLM(config.model, light.spec, 34, VisionEncoder(tower, light.spec))
    accelerate(whole, CPU)
    trainable = freeze(whole, policy)
    tokens = {"image_mask": batch.image_mask, "labels": batch.labels, "pixel_values": batch.pixel_values}
    true = multiplications(lambda: whole(batch.input_ids, **tokens).loss.backward())
    assert counted == pytest.approx(true, rel=0.03)  # attention is counted for the queries that need no gradient, too
    assert light.trainable == sum(parameter.numel() for parameter in trainable)
    assert sum(parameter.numel() for parameter in light.train_step.model.parameters()) < 0.7 * sum(
        parameter.numel() for parameter in whole.parameters()
    )


def test_time_by_a_real_clock_is_some():
    config = replace(recipe(), model=PRESETS["demo"])
    estimate = forecast.estimate(config, TypicalRow(length=80, pictures=1, supervised=5), 8, 2)
    assert estimate.seconds is not None, estimate.how
    assert 0 < estimate.seconds < 600
