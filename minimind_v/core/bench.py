"""Measure how fast this machine trains and answers, and what limits it.

It downloads nothing: weights are random with the real sizes, images are synthetic.
"""

from __future__ import annotations

import io
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from minimind_v.core.config.generation import generation_of
from minimind_v.core.config.presets import PRESETS, check_preset
from minimind_v.core.config.recipes import pretrain
from minimind_v.core.data.batch import Batch
from minimind_v.core.data.feature_cache import FeatureEncoder
from minimind_v.core.data.images import load_pixels
from minimind_v.core.device import autocast, pick_device, wait_for
from minimind_v.core.generate.rows import Row, generate
from minimind_v.core.generate.sampling import GREEDY, Sampler
from minimind_v.core.model.kernels.accelerate import accelerate
from minimind_v.core.model.loss import IGNORE
from minimind_v.core.model.vision.encoder import VisionEncoder
from minimind_v.core.model.vision.spec import DEMO, STANDARD, TOWERS
from minimind_v.core.model.vlm import VLM
from minimind_v.core.train.freeze import freeze
from minimind_v.core.train.step import AdamW

QUESTION, ANSWER = 40, 40  # tokens of a caption row besides its image; those of the answer are supervised
NEW_TOKENS = 48  # of an answer
SIDE = 2048  # of the matrices whose product is timed
SIDE_CUDA = 8192  # a large GPU must work longer than the host needs to start it
SPREAD = range(-14, 15, 4)  # tokens by which rows of the measured steps differ: a run has rows of many lengths
JPEG = (448, 336)


@dataclass(frozen=True)
class Measured:
    """Rates per second, and a sentence on what limits training."""

    preset: str
    device: str
    threads: int
    dtype: str
    matmul_gflops: float  # of one large product, in 10⁹ operations per second
    clip_pictures: float
    decoded_pictures: float  # JPEGs of 448×336, by one process
    data_workers: int
    samples_first_epoch: float  # of pretraining, every image encoded
    samples_later: float  # with cached features
    matmul_share: float  # of the rate above that the operations of training reach, in later epochs
    first_token_seconds: float  # a question about a new image
    tokens: float  # of one answer
    limit: str


def bench(preset: str, device_name: str, report: Callable[[str], None]) -> Measured:
    """Measure everything and `report` each stage. Raises UsageError for an unknown preset or device."""
    check_preset(preset)
    device = pick_device(device_name)
    torch.manual_seed(0)
    model = accelerate(_make_model(preset).to(device), device)
    assert model.vision_encoder is not None
    encoder, recipe = FeatureEncoder(model.vision_encoder, device, "auto"), pretrain(PRESETS[preset])
    report("multiplying matrices")
    product_type = torch.bfloat16 if encoder.kind == "bfloat16" else torch.float32
    operations_per_second = matmul_rate(device, product_type)
    report("encoding images")
    images = torch.randint(0, 256, (encoder.group, 3, *[model.spec.image_size] * 2), dtype=torch.uint8).to(device)
    encode_seconds = _seconds(device, lambda: encoder.encode(images)) / len(images)
    report("decoding images")
    decode_seconds = _decode(model.spec.image_size)
    report("training")
    step_seconds, step_operations = _learn(model, recipe.freeze, 4 if device.type == "cpu" else recipe.data.batch_size)
    # Again: other programs may have slowed the first ones.
    operations_per_second = max(operations_per_second, matmul_rate(device, product_type))
    report("answering")
    first, each = _answer(model)
    workers = recipe.data.workers
    return Measured(
        preset=preset,
        device=str(device),
        threads=torch.get_num_threads(),
        dtype=encoder.kind,
        matmul_gflops=operations_per_second / 1e9,
        clip_pictures=1 / encode_seconds,
        decoded_pictures=1 / decode_seconds,
        data_workers=workers,
        samples_first_epoch=1 / (step_seconds + encode_seconds),
        samples_later=1 / step_seconds,
        matmul_share=step_operations / step_seconds / operations_per_second,
        first_token_seconds=first,
        tokens=1 / each,
        limit=_limit(encode_seconds, step_seconds, decode_seconds / workers),
    )


def _limit(encoding: float, training: float, loading: float) -> str:
    """Describe what takes most of a sample's time; the arguments are seconds per sample."""
    if loading > encoding + training:
        return (
            f"decoding: workers take {loading * 1e3:.1f} ms an image, training {(encoding + training) * 1e3:.1f} ms — "
            "use more --workers or smaller images; later epochs read cached features and decode nothing"
        )
    share = encoding / (encoding + training)
    if share > 0.5:
        return (
            f"encoding images: {share:.0%} of the first epoch's time; "
            f"with cached features a later epoch takes {1 - share:.0%} of it"
        )
    return f"the language model: {1 - share:.0%} of the first epoch's time; encoding images takes {share:.0%}"


# --- the parts --------------------------------------------------------------------------------------------------------


def _make_model(preset: str) -> VLM:
    generation = generation_of(PRESETS[preset])
    tower = generation.towers[0]
    kind, config = TOWERS[tower], (DEMO if preset.startswith("demo") else STANDARD)[tower]
    spec = kind.describe(config, {})
    encoder = VisionEncoder(kind.build(config), spec)
    return VLM(PRESETS[preset], spec, placeholder_id=34, vision=encoder, projector=generation.projector)


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of one large product, the fastest of several: the most that other work can reach."""
    side = SIDE_CUDA if device.type == "cuda" else SIDE
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / _seconds(device, lambda: left @ right, times=7, summary=min)


def _decode(size: int) -> float:
    """Seconds for a JPEG with about as much detail as a photograph."""
    noise = np.random.default_rng(0)
    coarse = Image.fromarray(noise.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(JPEG)
    grain = noise.integers(-12, 13, (JPEG[1], JPEG[0], 3))
    buffer = io.BytesIO()
    Image.fromarray((np.asarray(coarse) + grain).clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=85)
    data = buffer.getvalue()
    return _seconds(torch.device("cpu"), lambda: [load_pixels(data, "picture", size) for _ in range(20)]) / 20


def _learn(model: VLM, policy: str, rows: int) -> tuple[float, float]:
    """Seconds and operations per sample of a pretraining step with cached features, as a run computes it.

    On a GPU a run replays recorded steps, which takes less; here each kernel is launched.
    """
    model.train()
    trained = freeze(model, policy)
    optimiser = AdamW(trained, 1e-6, model.device)
    batches = [_rows(model, rows, QUESTION + more) for more in (SPREAD if model.device.type == "cuda" else (0,))]
    order = cycle(batches)

    def step() -> float:
        batch, features = next(order)
        with autocast(model.device, "auto"):
            out = model(batch.input_ids, image_features=features, image_mask=batch.image_mask, labels=batch.labels)
        out.loss.backward()
        read = float(out.loss.detach()) + float(nn.utils.clip_grad_norm_(trained, 1.0))
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        return read

    seconds = _seconds(model.device, step, times=max(3, 4 * len(batches)), warm=len(batches)) / rows
    return seconds, operations(model, batches[0][0].input_ids.shape[1], ANSWER)


def operations(model: VLM, length: float, answer: float) -> float:
    """Operations for a row of `length` tokens and one image with cached features, `answer` tokens supervised.

    Two operations per weight and token forward, two for its input's gradient, two more for a trainable weight. Of
    experts those are counted that a token meets, of the last layer what an answer's tokens or their attention need;
    attention's own products are left out.
    """
    config, total = model.config, 0.0
    last = f"layers.{config.num_hidden_layers - 1}."
    for name, weight in model.model.named_parameters():
        if weight.ndim != 2 or "embed_tokens" in name:
            continue
        met = config.num_experts_per_tok / config.n_routed_experts if ".experts." in name else 1.0
        tokens = answer if name.startswith(last) and ".k_proj" not in name and ".v_proj" not in name else length
        total += met * weight.numel() * tokens * (6 if weight.requires_grad else 4)
    head = model.lm_head.weight
    total += head.numel() * answer * (6 if head.requires_grad else 4)
    return total + 4 * model.spec.width * model.config.hidden_size * model.spec.tokens_per_image  # the projector


def _rows(model: VLM, rows: int, question: int = QUESTION) -> tuple[Batch, Tensor]:
    """Caption rows of random ids with an image each, and random features of the images."""
    spec = model.spec
    length = spec.tokens_per_image + question + ANSWER
    input_ids = torch.randint(0, model.config.vocab_size, (rows, length))
    image_mask = torch.zeros(rows, length, dtype=torch.bool)
    image_mask[:, 20 : 20 + spec.tokens_per_image] = True
    labels = input_ids.clone()
    labels[:, :-ANSWER] = IGNORE
    batch = Batch(input_ids, torch.ones_like(image_mask), labels, image_mask).to(model.device)
    return batch, torch.randn(rows, spec.tokens_per_image, spec.width, device=model.device)


def _answer(model: VLM) -> tuple[float, float]:
    """Seconds to the first token about a new image, and for each further token."""
    model.eval()
    batch, _ = _rows(model, 1)
    size = model.spec.image_size
    input_ids, image_mask = (tensor[0, :-ANSWER].tolist() for tensor in (batch.input_ids, batch.image_mask))
    first, each = [], []
    for _ in range(3):
        image = torch.randint(0, 256, (3, size, size), dtype=torch.uint8).numpy()
        begun = time.perf_counter()
        answer = generate(model, Row(input_ids, Sampler(GREEDY), NEW_TOKENS, image_mask, [image]), -1)  # without an end
        next(answer)
        then = time.perf_counter()
        count = sum(1 for _ in answer)
        first.append(then - begun)
        each.append((time.perf_counter() - then) / count)
    return statistics.median(first), statistics.median(each)


def _seconds(
    device: torch.device,
    work: Callable[[], object],
    times: int = 3,
    warm: int = 1,
    summary: Callable[[list[float]], float] = statistics.median,
) -> float:
    """Return the median, or another summary, of several calls after warm-up calls.

    On a GPU it is the mean of calls that are queued behind each other, as in a run.
    """
    for _ in range(warm):
        work()
    wait_for(device)
    if device.type == "cuda":
        begun = time.perf_counter()
        for _ in range(times):
            work()
        wait_for(device)
        return (time.perf_counter() - begun) / times
    seconds = []
    for _ in range(times):
        begun = time.perf_counter()
        work()
        wait_for(device)
        seconds.append(time.perf_counter() - begun)
    return summary(seconds)
