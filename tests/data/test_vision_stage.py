"""Images that are encoded ahead: the rows of every grouping, no image twice, and a recording that is not believed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import minimind_v.core.demo
from minimind_v.core.cuda_graph import EAGER
from minimind_v.core.data.batch import Batch
from minimind_v.core.data.feature_cache import FeatureCache, FeatureEncoder, open_feature_cache
from minimind_v.core.data.vision_stage import AHEAD, VisionStage, encode_ahead
from minimind_v.core.formats.vision_tower import load_encoder

SIZE, PATCHES, WIDTH = 4, 2, 3
CPU = torch.device("cpu")


class StandIn:
    """Features depend on the image alone, and are of any group: [K, P, width], the sum of the image in each number."""

    device, group = CPU, 4

    def __init__(self, group: int = 4) -> None:
        self.group, self.groups = group, list[int]()

    def encode(self, pixel_values: Tensor) -> Tensor:
        self.groups.append(len(pixel_values))
        return features_of(pixel_values)


def features_of(pixel_values: Tensor) -> Tensor:
    return pixel_values.float().sum(dim=(1, 2, 3))[:, None, None].expand(-1, PATCHES, WIDTH).clone()


def cannot_record(encode, device, pool):
    raise RuntimeError("there is no CUDA")


def stage(encoder: StandIn, cache: FeatureCache | None = None, record=cannot_record) -> VisionStage:
    return VisionStage(cache or FeatureCache(warn=str), encoder, record)  # type: ignore[arg-type]


def batch_of(images: Tensor, stored: list[bool], supervised: bool = True) -> Batch:
    """A row with these images [M, 3, S, S], some of them as stored features."""
    pixels = torch.tensor([not each for each in stored], dtype=torch.bool)
    labels = torch.tensor([[-100, 5 if supervised else -100]])
    return Batch(
        *[torch.ones(1, 2, dtype=torch.int64)] * 2,
        labels,
        torch.zeros(1, 2, dtype=torch.bool),
        pixel_values=images[pixels] if pixels.any() else None,
        image_features=features_of(images[~pixels]) if any(stored) else None,
        image_order=pixels.int().argsort(stable=True).argsort() if pixels.any() and any(stored) else None,
        keys=[bytes([number]) for number in pixels.nonzero().flatten().tolist()],
    )


def random_steps(seed: int) -> tuple[list[list[Batch]], list[list[Tensor]]]:
    """Steps of some micro-batches, with no image, one or more, and the features that each must get."""
    draw = random.Random(seed)
    steps, expected = list[list[Batch]](), list[list[Tensor]]()
    for _ in range(12):
        counts = [draw.choice([0, 1, 2, 3, 7]) for _ in range(draw.choice([1, 2]))]
        images = [torch.randint(0, 256, (count, 3, SIZE, SIZE), dtype=torch.uint8) for count in counts]
        steps.append([batch_of(each, [draw.random() < 0.3 for _ in each]) for each in images])
        expected.append([features_of(each) for each in images])
    return steps, expected


@pytest.mark.parametrize("group", [1, 3, 16, 1000])
@pytest.mark.parametrize("seed", range(3))
def test_any_grouping_gives_the_same_rows_in_reading_order(group, seed):
    steps, expected = random_steps(seed)
    encoder, cache = StandIn(group), FeatureCache(warn=str)
    handed_out = list(stage(encoder, cache).steps(iter(steps)))
    assert len(handed_out) == len(steps)
    for batches, features in zip(handed_out, expected, strict=True):
        for batch, rows in zip(batches, features, strict=True):
            assert batch.pixel_values is None
            assert batch.image_features is None if not len(rows) else torch.equal(batch.image_features, rows)
    images = sum(len(batch.keys) for batches in steps for batch in batches)
    assert sum(encoder.groups) == cache.encoded == images, "none is encoded twice, none stands in"
    assert set(encoder.groups[:-1]) <= {group}, "every group but the last is full"


def test_a_step_is_handed_out_when_the_group_after_its_own_is_launched():
    fetched = list[int]()
    image = torch.zeros(1, 3, SIZE, SIZE, dtype=torch.uint8)

    def steps() -> Iterator[list[Batch]]:
        for number in range(20):
            fetched.append(number)
            yield [batch_of(image, [False])]

    encoder = StandIn(4)
    handed_out = stage(encoder).steps(steps())
    next(handed_out)
    assert len(fetched) == 8
    assert encoder.groups == [4, 4]
    for _ in range(3):
        next(handed_out)
    assert len(fetched) == 8, "the others of its group need no further step"
    next(handed_out)
    assert len(fetched) == 12


def test_stored_features_and_text_wait_for_nothing():
    stored = batch_of(torch.zeros(2, 3, SIZE, SIZE, dtype=torch.uint8), [True, True])
    fetched = list[int]()

    def steps() -> Iterator[list[Batch]]:
        for number in range(20):
            fetched.append(number)
            yield [stored]

    assert next(stage(StandIn(4)).steps(steps())) == [stored]
    assert len(fetched) == 1


def test_a_few_images_among_much_text_are_not_waited_for_without_end():
    image = torch.ones(1, 3, SIZE, SIZE, dtype=torch.uint8)
    steps = [[batch_of(image, [False])]] + [[batch_of(image[:0], [])]] * 100
    source, encoder = iter(steps), StandIn(4)
    first = next(stage(encoder).steps(source))
    assert torch.equal(first[0].image_features, features_of(image))
    assert len(list(source)) == 100 - AHEAD
    assert encoder.groups == [1]


def test_images_of_a_batch_that_trains_nothing_are_not_encoded():
    batch = batch_of(torch.zeros(1, 3, SIZE, SIZE, dtype=torch.uint8), [False], supervised=False)
    encoder = StandIn()
    assert list(stage(encoder).steps(iter([[batch]]))) == [[batch]]
    assert not encoder.groups


def test_a_signal_ends_the_steps_behind_those_that_were_fetched():
    image = torch.zeros(1, 3, SIZE, SIZE, dtype=torch.uint8)
    source = iter([[batch_of(image, [False])], None, None])
    ended = list(stage(StandIn()).steps(source))
    assert [step is None for step in ended] == [False, True]
    assert list(source) == [None], "nothing is fetched after it"


def test_elsewhere_than_on_cuda_steps_stay_as_they_are():
    steps = iter([])
    assert encode_ahead(steps, FeatureCache()) is steps
    assert encode_ahead(steps, FeatureCache(StandIn())) is steps  # type: ignore[arg-type]


# --- recording --------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_a_recording_is_replayed_for_full_groups_and_gives_the_same_bits():
    """A trace stands for a CUDA graph: it reads the group's memory and does again what the encoder did."""
    encoder = FeatureEncoder(load_encoder(Path(minimind_v.core.demo.__file__).parent / "assets/vision"), CPU, "float32")
    encoder.group, calls, encode = 4, [], encoder.encode
    encoder.encode = lambda pixels: calls.append(len(pixels)) or encode(pixels)  # type: ignore[method-assign]
    groups = EAGER + 3

    def record(work, device, pool):
        trace = make_fx(lambda: work())()
        return lambda: trace()

    images = torch.randint(0, 256, (4 * groups + 2, 3, 64, 64), dtype=torch.uint8)
    steps = [[batch_of(rows, [False, False])] for rows in images.split(2)]
    handed_out = list(VisionStage(FeatureCache(), encoder, record).steps(iter(steps)))
    features = torch.cat([batch.image_features for batches in handed_out for batch in batches])
    assert torch.equal(features, encode(images))
    assert calls == [4] * (EAGER + 2) + [2], "the first groups, the recording, the comparison, and a rest"


@pytest.mark.parametrize("trouble", ["differs", "fails"])
def test_a_recording_that_fails_or_differs_by_a_bit_is_reported_once_and_not_used(trouble):
    attempts, warnings = [], []

    def record(encode, device, pool):
        attempts.append(1)
        if trouble == "fails":
            raise RuntimeError("operation not permitted when stream is capturing\nlong words")

        def replay():
            encode()
            ahead._features[0, 0, 0] += 1e-3

        return replay

    images = torch.randint(0, 256, (4 * (EAGER + 4), 3, SIZE, SIZE), dtype=torch.uint8)
    steps = [[batch_of(rows, [False] * 4)] for rows in images.split(4)]
    ahead = stage(StandIn(4), FeatureCache(warn=warnings.append), record)
    features = [batches[0].image_features for batches in ahead.steps(iter(steps))]
    assert torch.equal(torch.cat(features), features_of(images))
    assert len(attempts) == 1
    failure = "it cannot be recorded (operation not permitted when stream is capturing)"
    reason = "it gives other results" if trouble == "differs" else failure
    assert warnings == [f"images are encoded without a CUDA graph, which takes longer: {reason}"]


def test_a_run_that_stores_no_features_hears_of_it(tmp_path):
    spec, warnings = SimpleNamespace(tokens_per_image=PATCHES, width=WIDTH), []
    encoder = SimpleNamespace(encoder=SimpleNamespace(spec=spec), kind="float32", device=CPU)
    open_feature_cache("off", tmp_path, encoder, 9, str, warnings.append).warn("it is slow")  # type: ignore[arg-type]
    assert warnings == ["it is slow"]
