"""The model for lmms-eval, against a stand-in of its interface; `make interop` runs lmms-eval itself."""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

import minimind_v as mmv
from tests.cli.harness import ASSETS, EYE, sighted, tiny_data


class StandIn:
    """What lmms-eval's base class gives a model: the documents of each task and split."""

    is_simple = True

    def __init__(self) -> None:
        self.task_dict: dict[str, Any] = {}


@dataclass
class Manifest:
    model_id: str
    simple_class_path: str


@pytest.fixture
def adapter(monkeypatch):
    contents = {"api.model": {"lmms": StandIn}, "models.registry_v2": {"ModelManifest": Manifest}}
    for name in ("", "api", "api.model", "models", "models.registry_v2"):
        content, name = contents.get(name, {}), ".".join(filter(None, ("lmms_eval", name)))
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "minimind_v.lmms_eval", raising=False)
    yield importlib.import_module("minimind_v.lmms_eval")
    sys.modules.pop("minimind_v.lmms_eval", None)


PATHS = (sighted(), EYE, ASSETS)
QUESTIONS = ["What colour is the star?", "有几个物体？", "Is there a red star?"]


@pytest.fixture
def model(adapter):
    """The adapter with three documents: two with a picture, one without."""
    model = adapter.Mmv(*PATHS, device="cpu")
    documents = [{"image": Image.open(tiny_data().picture(number))} for number in range(2)]
    model.task_dict = {"task": {"test": [*documents, {"image": None}]}}
    return model


def requests(*middle, context=QUESTIONS):
    """A request for each document, in the order of lmms-eval's arguments."""
    visual = lambda document: [document["image"]] if document["image"] else []  # noqa: E731
    return [
        SimpleNamespace(args=(text, *middle, visual, number, "task", "test")) for number, text in enumerate(context)
    ]


def test_answers_are_those_of_the_python_interface(model):
    m = mmv.load(*PATHS, device="cpu")
    images = [str(tiny_data().picture(0)), str(tiny_data().picture(1)), None]
    expected = [
        m.ask(question, image, max_new_tokens=9).strip() for question, image in zip(QUESTIONS, images, strict=True)
    ]
    settings = {"max_new_tokens": 9, "temperature": 0, "do_sample": False, "until": ["\n\n"]}
    assert model.generate_until(requests(settings)) == [answer.split("\n\n")[0] for answer in expected]
    letter = expected[0][1]
    assert model.generate_until(requests(settings | {"until": letter}))[0] == expected[0].split(letter)[0]
    assert model._pixels == {}, "the pixels of a group are dropped"


def test_a_loss_is_that_of_a_plain_pass_and_the_likeliest_answer_is_told(model):
    m = mmv.load(*PATHS, device="cpu")
    losses = model.loglikelihood(requests(" red"))
    inputs = m.processor(QUESTIONS[0], str(tiny_data().picture(0)))
    answer = torch.tensor([[*m.tokenizer.encode("red").ids, m.tokenizer.eos_id]])
    ids = torch.cat([inputs["input_ids"], answer], dim=1)
    mask = torch.cat([inputs["image_mask"], torch.zeros_like(answer, dtype=torch.bool)], dim=1)
    with torch.no_grad():
        logits = m(ids, image_mask=mask, pixel_values=inputs["pixel_values"]).logits[0]
    start = inputs["input_ids"].shape[1] - 1
    expected = torch.nn.functional.cross_entropy(logits[start:-1], answer[0])
    assert losses[0] == (pytest.approx(float(expected), rel=1e-4), False)
    likeliest = m.ask(QUESTIONS[0], str(tiny_data().picture(0)), max_new_tokens=64).strip()
    [(_, is_likeliest)] = model.loglikelihood(requests(lambda document: likeliest, context=QUESTIONS[:1]))
    assert is_likeliest


@pytest.mark.parametrize("settings", [{"do_sample": True}, {"temperature": 0.5}, {"num_beams": 4}])
def test_what_is_not_greedy_is_refused(model, settings):
    with pytest.raises(ValueError, match="takes the likeliest answer"):
        model.generate_until(requests(settings))


def test_the_entry_point_names_the_class(adapter):
    manifest = adapter.manifest()
    module, _, name = manifest.simple_class_path.rpartition(".")
    assert (manifest.model_id, getattr(sys.modules[module], name)) == ("mmv", adapter.Mmv)
