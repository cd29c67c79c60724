"""The folder for transformers, opened by transformers alone and compared with the model that it was made of."""

import json
import re

import pytest
import torch
from safetensors import safe_open

from minimind_v.core.data.images import load_pixels
from minimind_v.core.data.prompt import PromptEncoder
from minimind_v.core.errors import RunError
from minimind_v.core.export.prove import ask_hf
from minimind_v.core.export.prove.cases import _content, ask
from minimind_v.core.export.prove.compare_hf import compare
from minimind_v.core.export.prove.pillow_processor import has_torchvision
from minimind_v.core.formats.hf import write as hf
from minimind_v.core.formats.hf.card import _training
from minimind_v.core.formats.load import read_model_parts
from minimind_v.core.formats.request import ExportRequest
from minimind_v.core.generate.sampling import Sampling
from minimind_v.core.generate.session import Session
from tests.export.made import CONFIGS, exported, jpeg, opened, order, picture, source

TOLERANCE = 1e-4


def asked(processor, messages, **how):
    how = {"add_generation_prompt": True} | how
    return processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt", **how)


def shown(numbers, text="What is it?"):
    content = [{"type": "image", "image": picture(number)} for number in numbers]
    return [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]


@pytest.mark.parametrize("kind", CONFIGS)
def test_stock_transformers_computes_the_same_logits(kind):
    processor, model = opened(kind)
    ours = source(kind).model
    for numbers in ((0,), (1, 2), (3, 4, 5), ()):
        text = "<image>\n" * len(numbers) + "What is it?"
        tokens = PromptEncoder(source(kind).tokenizer, ours.spec.tokens_per_image).prompt(
            [{"role": "user", "content": text}]
        )
        inputs = asked(processor, shown(numbers))
        pixels = torch.stack([pixels_of(number) for number in numbers]) if numbers else None
        with torch.no_grad():
            expected = ours(
                torch.tensor([tokens.input_ids]), pixel_values=pixels, image_mask=torch.tensor([tokens.image_mask])
            ).logits
            logits = model(**inputs).logits
        assert logits.shape[-1] == CONFIGS[kind].vocab_size + 1
        assert float((expected - logits[..., :-1]).abs().max()) < TOLERANCE


def pixels_of(number):
    return torch.from_numpy(load_pixels(jpeg(number), "picture", source().model.spec.image_size).copy())


@pytest.mark.long
@pytest.mark.parametrize(("kind", "pictures"), [("dense", 20), ("moe", 20)])
def test_it_answers_the_same_about_many_pictures(kind, pictures):
    processor, model = opened(kind)
    for first in range(pictures):
        numbers = range(first, first + first % 3 + 1)
        inputs = asked(processor, shown(numbers))
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=64)[0, inputs["input_ids"].shape[1] :]
        session = Session(source(kind).model, source(kind).tokenizer, Sampling(temperature=0.0))
        answer = "".join(session.ask("What is it?", [pixels_of(number).numpy() for number in numbers], 64))
        assert processor.decode(tokens, skip_special_tokens=True) == answer


def test_every_tensor_is_used_and_none_is_wanting():
    from transformers import AutoModelForImageTextToText

    for kind in ("dense", "moe"):
        _, info = AutoModelForImageTextToText.from_pretrained(exported(kind), output_loading_info=True)
        assert not any(info.values()), info


def test_nothing_asks_for_code():
    config = json.loads((exported() / "config.json").read_text())
    assert config["architectures"] == ["LlavaForConditionalGeneration"]
    assert "auto_map" not in "".join(path.read_text() for path in exported().glob("*.json"))
    assert not list(exported().glob("*.py"))


def test_the_parts_have_the_names_that_transformers_gives_them():
    with safe_open(exported("moe") / "model.safetensors", "pt") as file:
        names, metadata = set(file.keys()), file.metadata()
    assert metadata["format"] == "pt"
    assert json.loads(metadata["minimind_v"])["stage"] == "sft"
    assert {
        "model.language_model.embed_tokens.weight",
        "model.language_model.layers.0.block_sparse_moe.experts.gate_up_proj",
        "model.multi_modal_projector.linear_1.weight",
        "model.vision_tower.embeddings.class_embedding",
    } <= names


# --- prompts ----------------------------------------------------------------------------------------------------------

PROMPTS = [
    "<image>\nWhat colour is the star?",
    "What colour is the star?\n<image>",
    "<image>\n<image>\nAre these the same?",
    "Here: <image> and there: <image> Compare.",
    "<image>",
    "图中有什么？\n<image>",
    "<image>\n🙂 def f(x): return x @ y",
    "no image file at all",
    "  spaces  \n\n and lines \n",
    "@" * 64,
    "<image>\n" + "@" * 200,
    "a 'quoted' text, 3.14, \t tab",
]


@pytest.mark.parametrize("text", PROMPTS)
def test_prompts_are_the_same_ids(text):
    processor, _ = opened()
    tokens = PromptEncoder(source().tokenizer, 64).prompt([{"role": "user", "content": text}])
    content = _parts_with_spaces(text)
    ids = asked(processor, [{"role": "user", "content": content}])["input_ids"][0].tolist()
    assert ids == as_theirs(tokens)


def as_theirs(tokens):
    return [600 if patch else number for number, patch in zip(tokens.input_ids, tokens.image_mask, strict=True)]


def _parts_with_spaces(text):
    """Newlines between a picture and a text are the template's; other spaces are the author's."""
    content = []
    for number, piece in enumerate(text.split("<image>")):
        if number:
            content.append({"type": "image", "image": picture(number)})
        if number and piece.startswith("\n"):
            piece = piece[1:]
        if piece.endswith("\n") and piece.strip() and "<image>" in text:
            piece = piece[:-1]
        if piece:
            content.append({"type": "text", "text": piece})
    return content


def test_conversations_are_the_same_ids():
    processor, _ = opened()
    conversation = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "<image>\nWhat is it?"},
        {"role": "assistant", "content": "A star."},
        {"role": "user", "content": "<image>\nAnd now?"},
    ]
    standard = [{"role": turn["role"], "content": _content(turn["content"])} for turn in conversation]
    pictures = iter((picture(0), picture(1)))
    for message in standard:
        for item in message["content"]:
            if item["type"] == "image":
                item["image"] = next(pictures)
    expected = as_theirs(PromptEncoder(source().tokenizer, 64).prompt(conversation))
    assert asked(processor, standard)["input_ids"][0].tolist() == expected
    # The same with plain strings where there is only text.
    plain = [
        message if message["role"] == "user" else message | {"content": message["content"][0]["text"]}
        for message in standard
    ]
    assert asked(processor, plain)["input_ids"][0].tolist() == expected


@pytest.mark.parametrize("text", ["@" * 64, "@" * 1000, "<image>", "<|image|>", "<|image|>\n<image>" + "@" * 128])
def test_no_text_of_a_user_becomes_a_picture(text):
    processor, model = opened()
    for content in (text, [{"type": "text", "text": text}]):
        inputs = asked(processor, [{"role": "user", "content": content}])
        assert 600 not in inputs["input_ids"]
        assert "pixel_values" not in inputs
        model.generate(**inputs, max_new_tokens=2)
    inputs = asked(processor, shown((0,), text))
    assert int((inputs["input_ids"] == 600).sum()) == 64


def test_an_answer_that_is_given_is_marked():
    processor, _ = opened()
    conversation = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Yes."}]
    encoded = asked(processor, conversation, add_generation_prompt=False, return_assistant_tokens_mask=True)
    tokens = PromptEncoder(source().tokenizer, 64).row(conversation, 0, 1000)
    assert encoded["input_ids"][0].tolist() == tokens.input_ids
    assert list(map(bool, encoded["assistant_masks"][0])) == tokens.loss_mask


def test_roles_and_parts_that_it_does_not_know_are_refused():
    processor, _ = opened()
    with pytest.raises(Exception, match="the role tool is none of system, user and assistant"):
        asked(processor, [{"role": "tool", "content": "x"}])
    with pytest.raises(Exception, match="no video"):
        processor.apply_chat_template([{"role": "user", "content": [{"type": "video"}]}])


# --- other ways to use it ---------------------------------------------------------------------------------------------


def test_several_prompts_at_once_are_answered_as_one_by_one():
    processor, model = opened()
    assert processor.tokenizer.padding_side == "left"
    conversations = [
        shown((0,)),
        shown((1, 2), "Compare these two, in many words."),
        [{"role": "user", "content": "Hi"}],
    ]
    batch = asked(processor, conversations, padding=True)
    answers = model.generate(**batch, do_sample=False, max_new_tokens=12)[:, batch["input_ids"].shape[1] :]
    for conversation, row in zip(conversations, answers, strict=True):
        alone = asked(processor, conversation)
        expected = model.generate(**alone, do_sample=False, max_new_tokens=12)[0, alone["input_ids"].shape[1] :]
        assert row[: len(expected)].tolist() == expected.tolist()


def test_the_pipeline_answers():
    from transformers import pipeline

    asks = pipeline("image-text-to-text", model=str(exported()))
    processor, model = opened()
    for talk in (shown((0,)), shown((1, 2), "Compare.")):
        inputs = asked(processor, talk)
        answer = model.generate(**inputs, do_sample=False, max_new_tokens=8)[0, inputs["input_ids"].shape[1] :]
        reply = asks(text=talk, max_new_tokens=8, do_sample=False)[0]["generated_text"][-1]
        assert reply == {"role": "assistant", "content": processor.decode(answer, skip_special_tokens=True)}


@pytest.mark.parametrize("name", ["LlavaForConditionalGeneration", "AutoModelForMultimodalLM"])
def test_other_classes_open_it_too(name):
    import transformers

    if not hasattr(transformers, name):
        pytest.skip(f"this transformers has no {name}")
    processor, model = opened()
    inputs = asked(processor, shown((0,)))
    with torch.no_grad():
        logits = getattr(transformers, name).from_pretrained(exported()).eval()(**inputs).logits
        assert torch.equal(logits, model(**inputs).logits)


def test_the_tokenizer_alone_writes_the_same_prompt():
    from transformers import AutoTokenizer

    tokenizer, processor = AutoTokenizer.from_pretrained(exported()), opened()[0]
    for content in ("Hi", [{"type": "text", "text": "Hi"}]):
        conversation = [{"role": "user", "content": content}]
        ids = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert ids == asked(processor, conversation)["input_ids"][0].tolist()


def test_what_it_says_is_never_the_image_token():
    _, model = opened()
    assert model.generation_config.suppress_tokens == [600]
    assert model.generation_config.eos_token_id == source().tokenizer.eos_id
    assert model.generation_config.pad_token_id == source().tokenizer.pad_id


def test_types():
    from transformers import AutoModelForImageTextToText

    assert opened()[1].dtype == torch.float32  # as mmv itself runs it, whatever it is stored in
    for dtype in ("float16", "bfloat16", "float32"):
        folder = exported("dense", dtype)
        assert AutoModelForImageTextToText.from_pretrained(folder).dtype == getattr(torch, dtype)
        with safe_open(folder / "model.safetensors", "pt") as file:
            assert {file.get_tensor(name).dtype for name in file.keys()} == {getattr(torch, dtype)}  # noqa: SIM118


def test_a_weight_too_large_for_the_type_is_refused(tmp_path):
    request = order(dtype="float16")
    loaded = read_model_parts(request.model, request.vision_model, request.tokenizer)
    loaded.checkpoint.tensors["model.norm.weight"] = loaded.checkpoint.tensors["model.norm.weight"].float() + 1e5
    with pytest.raises(RunError, match=r"model\.language_model\.norm\.weight does not fit in float16"):
        hf.write(loaded, tmp_path, request)


def test_it_can_be_trained_further_and_comes_back(tmp_path):
    """As a training loop of anybody's would: labels in, loss out, saved by transformers, read by us."""
    from transformers import AutoModelForImageTextToText

    from minimind_v.core.formats.load import load

    processor = opened()[0]
    model = AutoModelForImageTextToText.from_pretrained(exported())
    model.model.vision_tower.requires_grad_(False)
    conversation = [*shown((0,)), {"role": "assistant", "content": "A star."}]
    inputs = asked(processor, conversation, add_generation_prompt=False)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == 600, -100)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)
    losses = []
    for _ in range(4):
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 0.1
    model.eval().save_pretrained(tmp_path)  # under its older names, projector of two layers that have both learnt
    processor.save_pretrained(tmp_path)
    back = load(tmp_path, device="cpu")
    tokens = PromptEncoder(back.tokenizer, 64).prompt([{"role": "user", "content": "<image>\nWhat is it?"}])
    with torch.no_grad():
        expected = model(**asked(processor, shown((0,)))).logits[..., :-1]
        logits = back.model(
            torch.tensor([tokens.input_ids]), pixel_values=pixels_of(0)[None],
            image_mask=torch.tensor([tokens.image_mask]),
        ).logits  # fmt: skip
    assert float((expected - logits).abs().max()) < TOLERANCE


@pytest.mark.skipif(has_torchvision(), reason="torchvision itself makes the difference, in all tests of verification")
def test_another_library_may_prepare_images_with_one_level_of_difference(monkeypatch):
    """torchvision, where it is installed, rounds otherwise than Pillow."""
    processor, std = opened()[0], torch.tensor(opened()[0].image_processor.image_std)

    class RoundedUp:
        def apply_chat_template(self, *messages, **how):
            inputs = processor.apply_chat_template(*messages, **how)
            if "pixel_values" in inputs:
                inputs["pixel_values"][:, :, 20:30, 20:30] += (1 / 255 / std)[:, None, None]
            return inputs

    monkeypatch.setattr(ask_hf, "open_processor", lambda folder: RoundedUp())
    report = compare(order(), exported(), ask(exported()))
    assert report.findings["pixels"] == "largest difference 1 of 255 grey levels"
    assert not report.wrong, report.findings


@pytest.mark.long
@pytest.mark.parametrize("damaged", ["[" * 100_000, "a: 2026-99-99", "\0", "\xff", "[1]", "*a", "{"])
def test_records_of_a_run_that_are_damaged_are_left_out_of_the_card(tmp_path, damaged):
    request = ExportRequest(tmp_path / "sft_vlm_64.pth")
    run = tmp_path / "sft_vlm_64"
    run.mkdir()
    for name in ("config.yaml", "metrics.jsonl"):
        (run / name).write_bytes(damaged.encode("latin-1"))
    assert "Nothing more is known about its training." in _training(source(), request)


def test_the_snippet_of_the_card_runs(tmp_path, monkeypatch, capsys):
    card = (exported() / "README.md").read_text()
    assert "pipeline_tag: image-text-to-text" in card
    snippet = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    (tmp_path / "picture.jpg").write_bytes(jpeg(0))
    monkeypatch.chdir(tmp_path)
    exec(snippet.replace('folder = "."', f"folder = {str(exported())!r}"), {})
    assert capsys.readouterr().out
