"""Apple's GPU, by a stand-in: what is chosen on it, and that its path computes what the CPU's does."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from minimind_v.core import bench
from minimind_v.core.config.presets import PRESETS
from minimind_v.core.config.recipes import sft
from minimind_v.core.curate.stats import TypicalRow
from minimind_v.core.data.batch import Batch
from minimind_v.core.device import autocast, gpu_names, has_bf16, has_fused_adamw, peak_memory, pick_device
from minimind_v.core.errors import UsageError
from minimind_v.core.generate.batch import Question, generate_many
from minimind_v.core.generate.sampling import GREEDY, Sampling
from minimind_v.core.generate.session import Session
from minimind_v.core.model import ops
from minimind_v.core.model.kernels import apple as apple_kernels
from minimind_v.core.model.kernels.accelerate import accelerate
from minimind_v.core.model.vision.encoder import VisionSpec
from minimind_v.core.model.vlm import VLM
from minimind_v.core.monitor.messages import out_of_memory
from minimind_v.core.train.batch_size import find_batch_size
from minimind_v.core.train.forecast import estimate
from tests.apple.standin import MPS, OnApple, apple_gpu
from tests.cli.harness import EYE, run_mmv, sighted_model, tiny_data, tokenizer
from tests.conftest import Events, given_run

QUESTION = "What colour is the star?"


@pytest.fixture
def apple():
    with apple_gpu():
        yield


@pytest.fixture
def mac(monkeypatch):
    """torch finds Apple's GPU, and nothing computes on it."""
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


# --- what is chosen ---------------------------------------------------------------------------------------------------


def test_auto_takes_apples_gpu_where_it_is(apple):
    assert pick_device("auto").type == "mps"
    assert pick_device("cpu").type == "cpu"


def test_without_one_auto_takes_the_cpu(mac, monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert pick_device("auto").type == "cpu"


def test_several_processes_do_not_share_apples_gpu(mac):
    assert pick_device("auto", local_rank=0).type == "cpu"
    with pytest.raises(UsageError, match="--device mps is one GPU for one process"):
        pick_device("mps", local_rank=1)


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="there is one here")
def test_where_there_is_none_asking_for_it_is_one_line():
    ended = run_mmv("bench", "--preset", "demo", "--device", "mps")
    assert ended.code == 2
    assert ended.error.startswith("--device mps: not available on this machine")


@pytest.mark.parametrize(("macos", "expected"), [(13, False), (14, True), (15, True)])
def test_bf16_needs_macos_14(macos, expected, monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda major, minor: (macos, 0) >= (major, minor))
    assert has_bf16(MPS) is expected
    with autocast(MPS, "auto"):
        assert torch.is_autocast_enabled("mps") is expected
    with autocast(MPS, "float32"):
        assert not torch.is_autocast_enabled("mps")


def test_what_was_only_tried_on_others_is_off(mac):
    assert not has_fused_adamw(MPS)
    assert has_fused_adamw(torch.device("cpu"))
    assert gpu_names() == ["Apple GPU (MPS)"]
    assert peak_memory()[1] == 0
    assert out_of_memory(RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB)"))


def test_doctor_names_apples_gpu(mac):
    assert run_mmv("doctor", "--json").json["gpu"] == "Apple GPU (MPS)"


def test_a_batch_size_is_not_measured_there():
    config = sft(PRESETS["demo"])
    with pytest.raises(UsageError, match="give a number"):
        find_batch_size(config, MPS)


# --- that it computes the same ----------------------------------------------------------------------------------------


@pytest.mark.long
def test_answers_are_those_of_the_cpu():
    first, second = (tiny_data().picture(number) for number in (0, 1))
    asked = [Question(QUESTION, [first]), Question("有几个物体？"), Question("?", [second])]

    def talk(model):
        session = Session(model, tokenizer(), GREEDY)
        answers = ["".join(session.ask(QUESTION, [first], 12)), "".join(session.ask("And?", [], 12))]
        session.restart()
        answers.append("".join(session.ask(QUESTION, [first], 12)))  # the picture is remembered
        answers.append("".join(Session(model, tokenizer(), Sampling(seed=3)).ask("有几个物体？", [], 8)))
        return answers, generate_many(model, tokenizer(), asked, max_new_tokens=8)

    expected = talk(sighted_model())
    with apple_gpu():
        model = accelerate(sighted_model().to(pick_device("auto")), MPS)
        assert isinstance(model.lm_head.weight, OnApple)
        assert talk(model) == expected


def rows(spec: VisionSpec, vocabulary: int) -> Batch:
    """Two rows with a picture each, the second one shorter, the beginning alike."""
    draw = torch.Generator().manual_seed(0)
    patches = spec.tokens_per_image
    ids = torch.randint(0, vocabulary, (2, patches + 20), generator=draw)
    mask, image = torch.ones_like(ids, dtype=torch.bool), torch.zeros_like(ids, dtype=torch.bool)
    ids[1, :3] = ids[0, :3]
    mask[1, -5:] = False
    image[:, 3 : patches + 3] = True
    labels = torch.where(mask & (torch.arange(ids.shape[1]) > patches + 8), ids, -100)
    features = torch.randn(2, patches, spec.width, generator=draw)
    return Batch(ids, mask, labels, image, None, features, locations=["a:1", "a:2"])


@pytest.mark.long
@pytest.mark.parametrize("moe", [False, True])
@pytest.mark.parametrize("freeze", ["all", "projector+last"])
def test_training_steps_are_those_of_the_cpu(tmp_path, moe, freeze):
    spec = VisionSpec(32, 8, 24)
    text = replace(PRESETS["demo"], hidden_size=64, num_hidden_layers=2, use_moe=moe)

    def losses(device: str) -> list[float]:
        torch.manual_seed(0)
        model = VLM(text, spec, placeholder_id=34)
        out = tmp_path / device
        config = replace(sft(text), vision_model=EYE, freeze=freeze, lr=1e-3, epochs=3, device=device, out=out)
        events = Events()
        run = given_run(config, model, [rows(spec, text.vocab_size)], events)
        run.run()
        assert run.train_step.model.device.type == device
        return [step.loss for step in events.steps]

    expected = losses("cpu")
    assert expected[-1] < expected[0]
    with apple_gpu():
        assert losses("mps") == pytest.approx(expected, rel=1e-4)


@pytest.mark.long
def test_the_command_trains_there(tmp_path, apple):
    """Pictures are looked at, features stored, rows held out: the run as the command line makes it."""
    ended = run_mmv(*tiny_data().train(tmp_path, device="auto", val_every=2, set="features=exact"), "--max-steps", 3)
    assert ended.code == 0, ended.err
    assert "on mps" in ended.err
    assert (tmp_path / "pretrain_vlm_128.pth").is_file()


@pytest.mark.long
def test_speed_is_forecast_and_measured_there(apple, monkeypatch):
    forecast = estimate(replace(sft(PRESETS["demo"]), vision_model=EYE), TypicalRow(80, 1, 10), 100, 10)
    assert forecast.seconds, forecast.how
    assert "Apple GPU (MPS)" in forecast.how
    monkeypatch.setattr(bench, "SIDE", 256)
    monkeypatch.setattr(bench, "NEW_TOKENS", 8)
    rates = bench.bench("demo", "auto", lambda _: None)
    assert (rates.device, rates.dtype) == ("mps", "float32")


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("kind", ["causal", "mask", "row mask", "none"])
def test_attention_by_the_formula_is_torchs_own(heads, kind):
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, 7, 8, generator=draw) for n in (4, heads, heads))
    shape = {"mask": (2, 1, 7, 7), "row mask": (2, 1, 1, 7)}.get(kind)
    mask = torch.rand(shape, generator=draw) > 0.3 if shape else None
    if mask is not None:
        mask[..., 0] = True
    expected = ops.attention(q, k, v, mask, kind == "causal")
    torch.testing.assert_close(apple_kernels.attention(q, k, v, mask, kind == "causal"), expected)


# --- that the stand-in would tell -------------------------------------------------------------------------------------


def test_the_stand_in_refuses_what_the_real_one_does(apple):
    x = torch.ones(2, 2, 4, 4).to(MPS)
    refused = [
        lambda: x.double(),
        lambda: torch.polar(x, x),
        lambda: torch.ones(2).to(MPS, non_blocking=True),
        lambda: F.scaled_dot_product_attention(x, x, x),
        lambda: x + torch.ones(4),
        lambda: torch.ops.mkldnn._linear_pointwise(x, x[0, 0], None, "none", [], ""),
    ]
    for attempt in refused:
        with pytest.raises(AssertionError):
            attempt()


def test_a_path_that_is_written_for_others_is_refused(apple):
    model = sighted_model().to(pick_device("auto"))  # not accelerated
    with pytest.raises(AssertionError, match="attention in one call"):
        list(Session(model, tokenizer(), GREEDY).ask(QUESTION, [tiny_data().picture()], 2))
