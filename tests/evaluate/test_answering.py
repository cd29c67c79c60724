"""Replies to asks that share images, prompts and processes: those of each ask by itself."""

from __future__ import annotations

import multiprocessing
import os
import signal
from functools import partial

import numpy as np
import pytest
import torch

from minimind_v.core.config.schema import TextConfig, VisionSpec
from minimind_v.core.data.feature_cache import FeatureEncoder, open_feature_cache
from minimind_v.core.errors import RunError
from minimind_v.core.evaluate import answering as answering_module
from minimind_v.core.evaluate import by_task
from minimind_v.core.evaluate.answering import Answering, Features
from minimind_v.core.evaluate.ask import Ask
from minimind_v.core.evaluate.benchmarks import open_benchmark
from minimind_v.core.evaluate.by_task import choose_task, evaluate_task
from minimind_v.core.evaluate.measure import Asked, groups_of
from minimind_v.core.evaluate.questions import Question
from minimind_v.core.formats.load import load
from minimind_v.core.model.vlm import VLM
from tests.cli.harness import ASSETS, EYE, sighted, tiny_data, tokenizer, write_rows

SPEC = VisionSpec(image_size=16, patch_size=8, width=24)  # 4 tokens per image
KINDS = {"dense": {}, "experts": {"use_moe": True}}
QUESTIONS = (
    ("<image>\nWhat colour is the star?", 1), ("Is there a red star?\n<image>", 1), ("How many objects are there?", 0),
    ("<image>\n<image>\nWhich is bigger?", 2), ("<image>\nWhere is it?", 1), ("Left <image> or right <image>?", 2),
)  # fmt: skip
CANDIDATES = ("red", "a blue circle at the top left", "两", "")


@pytest.fixture(params=KINDS)
def model(request):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 600}
    model = VLM(TextConfig(**sizes, **KINDS[request.param]), SPEC, tokenizer().placeholder_id)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    return model.eval()


def features_of(digest):
    return torch.randn(SPEC.tokens_per_image, SPEC.width, generator=torch.Generator().manual_seed(ord(digest)))


def answering_of(model, guesses=()):
    return Answering(model, tokenizer(), Features(features_of), guesses, "float32")


def asks_of(method, candidates=()):
    """Several questions about each of three images, with no, one and two images, before and behind the text."""
    return [
        Ask((("user", text),), method, candidates, 9, tuple("abcab"[first : first + count]))
        for first in range(3)
        for text, count in QUESTIONS
        if count or not first
    ]


@torch.inference_mode()
def logits_of(model, answering, ask, ids):
    """Logits of a plain pass over one prompt and these tokens, behind the prompt and each of them."""
    prompt = answering.prompts.prompt([{"role": "user", "content": ask.messages[-1][1]}])
    whole = torch.tensor([[*prompt.input_ids, *ids]])
    mask = torch.tensor([[*prompt.image_mask, *[False] * len(ids)]])
    features = torch.stack([features_of(digest) for digest in ask.images]) if ask.images else None
    return model(whole, image_features=features, image_mask=mask).logits[0, len(prompt) - 1 :]


def test_candidates_have_the_log_probabilities_of_plain_passes(model):
    answering = answering_of(model)
    asks = [*asks_of("likelihood", CANDIDATES), *asks_of("first", CANDIDATES[:2])]
    for ask, reply in zip(asks, answering.reply(asks), strict=True):
        for text, logprob, count in zip(ask.candidates, reply.logprobs, reply.tokens, strict=True):
            ids = [*tokenizer().encode(text).ids, tokenizer().eos_id][: 1 if ask.method == "first" else None]
            table = logits_of(model, answering, ask, ids[:-1]).log_softmax(dim=-1)
            expected = sum(float(table[n, id]) for n, id in enumerate(ids))
            assert (logprob, count) == (pytest.approx(expected, rel=1e-4), len(ids))


def greedy(model, answering, ask):
    ids = []
    while len(ids) < ask.most_tokens and tokenizer().eos_id not in ids:
        ids.append(int(logits_of(model, answering, ask, ids)[-1].argmax()))
    return tokenizer().decode([id for id in ids if id != tokenizer().eos_id]).strip()


def test_answers_are_those_of_plain_passes_whatever_is_guessed(model):
    """Guesses that are right, right at first, and wrong; answers that end at different lengths leave the others."""
    asks = asks_of("answer")
    expected = [greedy(model, answering_of(model), ask) for ask in asks]
    assert len(set(expected)) > 3
    for guesses in ((), expected, [text[: len(text) // 2] for text in expected], ["red", "a blue circle"]):
        assert [reply.text for reply in answering_of(model, guesses).reply(asks)] == expected


def test_what_asks_have_in_common_is_read_once(model, monkeypatch):
    """An image with the text before it for all questions about it, and a prompt for all its candidates."""
    read, begin = [], answering_module.Reading.begin

    def counted(model, dtype, beginnings, images):
        read.append((len(beginnings), len(images)))
        return begin(model, dtype, beginnings, images)

    monkeypatch.setattr(answering_module.Reading, "begin", counted)
    asks = [Ask((("user", f"<image>\n{text}"),), "likelihood", CANDIDATES, images=(a,)) for text in "xyz" for a in "ab"]
    answering_of(model).reply(asks)
    assert read == [(2, 2)]


def test_rows_are_divided_where_they_would_take_much_memory(model, monkeypatch):
    asks = asks_of("answer")
    expected = [reply.text for reply in answering_of(model).reply(asks)]
    monkeypatch.setattr(answering_module, "TOKENS", 100)
    monkeypatch.setattr(answering_module, "ROWS", 3)
    assert [reply.text for reply in answering_of(model).reply(asks)] == expected


def test_the_asks_of_an_image_are_in_one_group_where_they_fit():
    question = Question("q", 0, "here", (), (), ())
    counts = {"a": 30, "b": 30, "c": 30, "d": 100}
    asks = [Ask((("user", str(n)),), images=(image,)) for image, count in counts.items() for n in range(count)]
    groups = groups_of([Asked(question, "seen", tuple(asks))])
    assert sorted(ask.key for group in groups for ask in group) == sorted(ask.key for ask in asks)
    assert max(map(len, groups)) <= 64
    for image in "abc":
        assert sum(any(ask.images == (image,) for ask in group) for group in groups) == 1
    assert len(groups) <= 4


# --- the features of a run, and several processes ---------------------------------------------------------------------


@pytest.fixture
def measure(tmp_path):
    """`measure(out, …)` evaluates a small model; returns the text of its predictions."""
    loaded = load(sighted(), EYE, ASSETS, "cpu")
    rows = [
        {"question": f"Is number {number} a red star?", "answer": "no", "image": tiny_data().picture(number % 8).name}
        for number in range(32)
    ]
    data = write_rows(tmp_path / "rows.jsonl", rows)

    def evaluate(out, **how):
        store = open_benchmark(data, tiny_data().folder)
        report = evaluate_task(loaded, choose_task("loss"), store, tmp_path / out, **how).report
        with open(report["predictions"], encoding="utf-8") as file:
            return file.read()

    evaluate.model = loaded.model
    return evaluate


def test_features_that_a_training_run_left_are_read(measure, tmp_path, monkeypatch):
    """Those of its images are not computed again, and change no digit; the blank one is."""
    encoded, encode = [], FeatureEncoder.encode
    encoder = FeatureEncoder(measure.model.vision_encoder, measure.model.device, "auto")
    memory = open_feature_cache("exact", tmp_path / "features", encoder, 8, str, str)
    expected = measure("without")
    from minimind_v.core.data.feature_store import digest
    from minimind_v.core.data.images import load_pixels

    for number in range(5):
        data = tiny_data().picture(number).read_bytes()
        pixels = load_pixels(data, "picture", *measure.model.spec.preparation)
        memory.store.write([digest(data)], encoder.encode(torch.from_numpy(np.stack([pixels]))))
    monkeypatch.setattr(FeatureEncoder, "encode", lambda self, images: encoded.append(1) or encode(self, images))
    monkeypatch.setattr(by_task, "features_beside", lambda *_: memory)
    assert measure("with") == expected
    assert len(encoded) == 3 + 1


@pytest.mark.long
def test_processes_give_the_same_bytes_and_one_that_is_killed_is_one_error(measure, tmp_path, monkeypatch):
    monkeypatch.setattr("minimind_v.core.evaluate.measure.GROUP", 4)
    expected = measure("alone")
    models = [partial(load, sighted(), EYE, ASSETS, "cpu")] * 2
    totals = []

    def kill(done, total):
        totals.append(total)
        for process in multiprocessing.active_children():
            os.kill(process.pid, signal.SIGKILL)

    with pytest.raises(RunError, match=r"a process of --gpus was killed, .* run the same command again"):
        measure("shared", models=models, progress=kill)
    assert multiprocessing.active_children() == []
    kept = (tmp_path / "shared" / ".replies.jsonl").read_text().count("\n") - 1
    assert 0 < kept < totals[0] / 4
    assert measure("shared", models=models) == expected
    assert multiprocessing.active_children() == []
