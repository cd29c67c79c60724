"""Remembered features: the same curve to the last bit, keys that change with what decides features, and 8 bits."""

from __future__ import annotations

import random
import shutil
import signal
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import minimind_v.core.demo
from minimind_v.core.config.schema import DataConfig, RunConfig, TextConfig
from minimind_v.core.data import feature_cache as cache
from minimind_v.core.data import feature_store as store
from minimind_v.core.data.batch import Batch
from minimind_v.core.data.feature_cache import FeatureEncoder, open_feature_cache
from minimind_v.core.data.feature_layout import FeatureLayout
from minimind_v.core.data.feature_store import digest
from minimind_v.core.data.feature_writer import FeatureWriter
from minimind_v.core.data.vision_stage import VisionStage
from minimind_v.core.demo.dataset import write_sft
from minimind_v.core.formats.vision_tower import load_encoder
from minimind_v.core.train.loop import Run
from minimind_v.core.train.run import assemble
from tests.conftest import Events

ASSETS = Path(minimind_v.core.demo.__file__).parent / "assets"
CPU = torch.device("cpu")
ROWS = 12


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_sft(tmp_path_factory.mktemp("data"), random.Random(3), ROWS)[0]


@pytest.fixture
def config(rows, tmp_path) -> RunConfig:
    tiny = TextConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=600)
    data = DataConfig(rows.data, rows.images, ASSETS, max_length=256, batch_size=3, workers=0)
    return RunConfig(
        stage="sft",
        model=tiny,
        data=data,
        vision_model=ASSETS / "vision",
        out=tmp_path / "out",
        features_dir=tmp_path / "features",
        epochs=3,
        lr=3e-3,
        dtype="float32",
        device="cpu",
        save_every=0,
    )


@pytest.fixture
def train(config, events, tmp_path):
    """Trains with changes to the configuration; returns the run, its curve and what it has learnt."""

    def train(**changes):
        events.steps.clear()
        events.messages.clear()
        run = assemble(replace(config, out=tmp_path / f"{random.random()}", **changes), events)
        run.run()
        return run, [(step.loss, step.grad_norm) for step in events.steps]

    return train


def weights(run: Run) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in run.train_step.model.state_dict().items() if "vision_encoder" not in name}


@pytest.mark.long
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_feature_cache_changes_no_bit(dtype, workers, config, train, events):
    data = replace(config.data, workers=workers)
    plain, expected = train(features="off", dtype=dtype, data=data)
    first, curve = train(features="exact", dtype=dtype, data=data)
    again, later = train(features="exact", dtype=dtype, data=data)
    assert expected == curve == later
    for name, tensor in weights(plain).items():
        assert torch.equal(tensor, weights(first)[name]), name
        assert torch.equal(tensor, weights(again)[name]), name
    pictures = 3 * ROWS
    assert plain.train_step.features.encoded == pictures
    assert first.train_step.features.encoded == ROWS, "each is encoded once"
    assert again.train_step.features.encoded == 0
    (summary,) = [line for line in events.messages if line.startswith("features:")]
    assert f"{ROWS} cached" in summary


@pytest.mark.long
def test_eight_bits_keep_the_curve(train):
    _, exact = train(features="off", epochs=6)
    first, rough = train(features="int8", epochs=6)
    again, later = train(features="int8", epochs=6)
    assert rough == later, "read or looked at, a picture is the same"
    assert (first.train_step.features.encoded, again.train_step.features.encoded) == (ROWS, 0)
    assert exact != rough
    assert [loss for loss, _ in rough] == pytest.approx([loss for loss, _ in exact], rel=5e-3)


class Stopping(Events):
    """Asks its run to stop after the first step, as Ctrl-C does."""

    def step(self, metrics, logged):
        super().step(metrics, logged)
        signal.raise_signal(signal.SIGINT)


def test_a_resumed_run_is_the_same_whatever_is_cached(config, events, train):
    plain, expected = train(features="off")
    half, first = replace(config, features="exact"), Stopping()
    assert assemble(half, first).run().steps == 1
    shutil.rmtree(config.features_dir)
    events.steps.clear()
    resumed = assemble(replace(half, features="auto"), events, resume=True)
    resumed.run()
    assert [(step.loss, step.grad_norm) for step in first.steps + events.steps] == expected
    assert all(torch.equal(tensor, weights(resumed)[name]) for name, tensor in weights(plain).items())


@pytest.fixture
def staged(monkeypatch) -> None:
    """Runs on the CPU encode ahead and store in a thread, as on a GPU."""

    def encode_ahead(steps, features):
        if features.store is not None:
            features.writer = FeatureWriter(features.store, features.warn, threaded=True)
        return VisionStage(features, features.encoder, lambda encode, device, pool: encode).steps(steps)

    monkeypatch.setattr("minimind_v.core.train.loop.encode_ahead", encode_ahead)


def stored(folder: Path) -> dict[bytes, bytes]:
    """The stored features, by key."""
    (index,), (data,) = folder.glob("*/*.index"), folder.glob("*/*.features")
    keys = [index.read_bytes()[at : at + 16] for at in range(0, index.stat().st_size, store.ENTRY)]
    record = data.stat().st_size // len(keys)
    return {key: data.read_bytes()[n * record : (n + 1) * record] for n, key in enumerate(keys)}


def test_encoding_ahead_changes_no_bit_and_stores_the_same(config, train, request, tmp_path):
    plain, expected = train(features="exact", features_dir=tmp_path / "plain")
    request.getfixturevalue("staged")
    ahead, curve = train(features="exact", features_dir=tmp_path / "ahead")
    again, later = train(features="off")
    assert expected == curve == later
    assert all(torch.equal(tensor, weights(ahead)[name]) for name, tensor in weights(plain).items())
    assert (ahead.train_step.features.encoded, again.train_step.features.encoded) == (ROWS, 3 * ROWS)
    assert stored(tmp_path / "plain") == stored(tmp_path / "ahead")


def test_a_run_that_encodes_ahead_stops_and_resumes_as_if_it_had_not(config, events, train, staged):
    plain, expected = train(features="off")
    first = Stopping()
    assert assemble(replace(config, features="exact"), first).run().steps == 1
    events.steps.clear()
    resumed = assemble(replace(config, features="exact"), events, resume=True)
    resumed.run()
    assert [(step.loss, step.grad_norm) for step in first.steps + events.steps] == expected
    assert all(torch.equal(tensor, weights(resumed)[name]) for name, tensor in weights(plain).items())


def test_a_resume_may_change_whether_but_not_into_what(config, events):
    from minimind_v.core.errors import UsageError

    assemble(replace(config, max_steps=2, features="exact"), events).run()
    assemble(replace(config, max_steps=2, features="off"), events, resume=True)
    with pytest.raises(UsageError, match="features"):
        assemble(replace(config, max_steps=2, features="int8"), events, resume=True)


# --- what a name proves -----------------------------------------------------------------------------------------------


@pytest.fixture
def tower(tmp_path) -> Path:
    return Path(shutil.copytree(ASSETS / "vision", tmp_path / "tower", copy_function=shutil.copyfile))


def name_of(folder: Path, dtype: str = "float32") -> str:
    return FeatureEncoder(load_encoder(folder), CPU, dtype).identify()[0]


def test_the_name_changes_with_all_that_decides_features(tower, monkeypatch):
    before = name_of(tower)
    assert name_of(tower) == before
    names = {before, name_of(tower, "bfloat16")}

    normal = (tower / "preprocessor_config.json").read_text()
    (tower / "preprocessor_config.json").write_text(normal.replace("0.481", "0.482"))
    names.add(name_of(tower))
    (tower / "preprocessor_config.json").write_text(normal)

    tensors = load_file(tower / "model.safetensors")
    key = next(name for name in tensors if name.endswith("layers.3.mlp.fc2.bias"))
    tensors[key][5] += 1e-3
    save_file(tensors, tower / "model.safetensors", metadata={"format": "pt"})
    names.add(name_of(tower))

    shutil.copyfile(ASSETS / "vision" / "model.safetensors", tower / "model.safetensors")
    assert name_of(tower) == before
    monkeypatch.setattr(cache, "RENDERING", "another")
    names.add(name_of(tower))
    assert len(names) == 5


@pytest.mark.long
def test_what_another_tower_saw_is_not_used(tower, train):
    train(features="exact")
    tensors = load_file(tower / "model.safetensors")
    key = next(name for name in tensors if name.endswith("layers.0.mlp.fc2.weight"))
    tensors[key] *= 1.5
    save_file(tensors, tower / "model.safetensors", metadata={"format": "pt"})
    _, expected = train(features="off", vision_model=tower)
    other, curve = train(features="exact", vision_model=tower)
    assert other.train_step.features.encoded == ROWS
    assert curve == expected


# --- looking ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoder() -> FeatureEncoder:
    return FeatureEncoder(load_encoder(ASSETS / "vision"), CPU, "float32")


@pytest.fixture
def pictures() -> torch.Tensor:
    return torch.randint(0, 256, (11, 3, 64, 64), dtype=torch.uint8)


def test_a_picture_is_the_same_in_any_company(encoder, pictures):
    together = encoder.encode(pictures)
    for order in (torch.randperm(11), torch.arange(11)):
        for size in (1, 2, 3, 5, 11):
            features = torch.cat([encoder.encode(chunk) for chunk in pictures[order].split(size)])
            assert torch.equal(features, together[order])


@pytest.mark.parametrize(("device", "groups"), [("cpu", [4, 4, 4]), ("cuda", [1, 4, 2])])
def test_groups_are_filled_up_where_bits_must_be_the_same(device, groups, pictures, monkeypatch):
    """A tower may add up in another order when it has fewer pictures. A GPU promises no bits unless told to."""

    class Moody(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.group_sizes: list[int] = []

        def forward(self, given):
            self.group_sizes.append(len(given))
            return given.float() + (1e-6 if len(given) == 1 else 0.0) + 0.5

    moody = Moody()
    encoder = FeatureEncoder(moody, CPU, "float32")  # type: ignore[arg-type]
    encoder.group = 4  # not one by one, as on a CPU
    monkeypatch.setattr(encoder, "device", torch.device(device))
    monkeypatch.setattr(cache, "autocast", lambda *_: nullcontext())
    alone = encoder.encode(pictures[:1])
    assert torch.equal(alone, pictures[:1] + 0.5) == (device == "cpu")
    encoder.encode(pictures[:6])
    assert moody.group_sizes == groups


def test_a_layer_can_be_trained_on_features(encoder, pictures):
    """They are made without a gradient, and a layer behind them has one."""
    layer = torch.nn.Linear(encoder.encoder.spec.width, 2)
    layer(encoder.encode(pictures[:2])).sum().backward()
    assert layer.weight.grad is not None


# --- deciding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("reading", "encoding", "kept"), [(0.1, 1.0, True), (0.6, 1.0, False), (None, 1.0, False)])
def test_auto_keeps_what_pays(reading, encoding, kept, encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "measure_reading", lambda *_: reading)
    monkeypatch.setattr(encoder, "identify", lambda: ("name", encoding))
    messages: list[str] = []
    feature_cache = open_feature_cache("auto", tmp_path / "features", encoder, 100, messages.append, messages.append)
    assert (feature_cache.store is not None) == kept
    assert len(messages) == 1
    assert ("not cached" in messages[0]) != kept


def test_a_small_budget_is_reported_and_kept(encoder, tmp_path, monkeypatch, pictures):
    form = FeatureLayout("float32", encoder.encoder.spec.tokens_per_image, encoder.encoder.spec.width)
    monkeypatch.setattr(store, "used_and_free", lambda _: (0, 4 * 5 * (form.record + 24)))
    messages, warned = [], []
    feature_cache = open_feature_cache("exact", tmp_path / "features", encoder, 100, messages.append, warned.append)
    monkeypatch.undo()
    assert "room for 5 of the images of 100 rows (--features int8: " in messages[0]
    for begin in range(0, 11, 2):  # of eleven pictures four fit in pairs
        keys = [digest(bytes([n])) for n in range(begin, min(begin + 2, 11))]
        features = feature_cache.features(
            Batch(*[torch.empty(0)] * 4, pixel_values=pictures[begin : begin + 2], keys=keys)
        )
        assert torch.equal(features, encoder.encode(pictures[begin : begin + 2]))
    assert feature_cache.store.count() == 4
    assert len(warned) == 1
    assert "budget" in warned[0]


def test_off_says_and_makes_nothing(encoder, tmp_path):
    messages: list[str] = []
    feature_cache = open_feature_cache("off", tmp_path / "features", encoder, 100, messages.append, messages.append)
    assert feature_cache.store is None
    assert not messages
    assert not (tmp_path / "features").exists()
