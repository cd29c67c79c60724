"""transformers' own Trainer fine-tunes exported folders of both generations, and `mmv convert` reads the result."""

import shutil

import pytest
import torch
from transformers import AutoModelForImageTextToText

import minimind_v as mmv
from minimind_v.core.export.prove.ask_hf import open_processor
from minimind_v.core.formats.hf import write as hf
from minimind_v.core.formats.request import ExportRequest
from tests.cli.harness import run_mmv
from tests.export import made
from tests.formats.made3v import DENSE, MOE, tiny_3v

pytest.importorskip("accelerate", reason="transformers.Trainer needs accelerate; `make interop` brings it")

pytestmark = pytest.mark.long

ANSWERS = ("A star.", "Two circles.", "A red star.", "Nothing.")


@pytest.fixture(params=["llava", "llava, moe", "lfm2", "lfm2, moe"])
def folder(request, tmp_path):
    """An exported folder for transformers that is not verified."""
    form, _, is_moe = request.param.partition(", ")
    if form == "llava":
        return made.exported("moe" if is_moe else "dense")
    (tmp_path / "export").mkdir()
    hf.make(ExportRequest(*tiny_3v(tmp_path / "parts", MOE if is_moe else DENSE)), tmp_path / "export")
    return tmp_path / "export"


def conversation(number, answer=None):
    content = [{"type": "image", "image": made.picture(number)}, {"type": "text", "text": "What is it?"}]
    messages = [{"role": "user", "content": content}]
    return [*messages, {"role": "assistant", "content": [{"type": "text", "text": answer}]}] if answer else messages


def inputs_of(processor, messages):
    """The inputs of the model for a conversation: with an answer, or up to the place of one."""
    return processor.apply_chat_template(
        messages, add_generation_prompt=len(messages) == 1, tokenize=True, return_dict=True, return_tensors="pt"
    )


def fine_tune(folder, processor, out):
    """The model of a folder after some steps on four rows, saved with the folder's other files, and its losses."""
    from transformers import Trainer, TrainingArguments

    model = AutoModelForImageTextToText.from_pretrained(folder)
    model.model.vision_tower.requires_grad_(False)

    def collate(rows):
        batch = dict(inputs_of(processor, rows[0]))
        batch["labels"] = batch["input_ids"].masked_fill(batch["input_ids"] == model.config.image_token_id, -100)
        return batch

    arguments = TrainingArguments(
        str(out), max_steps=12, per_device_train_batch_size=1, logging_steps=4, report_to=[], use_cpu=True,
        remove_unused_columns=False, learning_rate=2e-3, save_strategy="no",
    )  # fmt: skip
    rows = [conversation(number, answer) for number, answer in enumerate(ANSWERS)]
    trainer = Trainer(model, arguments, data_collator=collate, train_dataset=rows)
    trainer.train()
    trainer.save_model(str(out))
    for path in folder.iterdir():
        if not (out / path.name).exists():
            shutil.copy(path, out)
    return model.eval(), [record["loss"] for record in trainer.state.log_history if "loss" in record]


def test_the_trainer_fine_tunes_a_folder_that_converts_back(folder, tmp_path):
    processor, out = open_processor(str(folder)), tmp_path / "tuned"
    model, losses = fine_tune(folder, processor, out)
    assert losses[-1] < losses[0] - 0.1
    weights = tmp_path / "back.safetensors"
    done = run_mmv("convert", "--to", "safetensors", "--model", out, "--out", weights)
    assert done.code == 0, done.err
    back = mmv.load(weights, vision_model=out, tokenizer=out, device="cpu")
    with torch.no_grad():
        theirs = model(**inputs_of(processor, conversation(0))).logits
        ours = back(**back.processor("<image>\nWhat is it?", images=[made.picture(0)])).logits
    assert ours.abs().max() > 0.5
    torch.testing.assert_close(ours, theirs[..., : ours.shape[-1]], atol=1e-2, rtol=0)  # torchvision rounds pixels
