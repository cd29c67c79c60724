"""Answer test prompts with an exported folder as its user would: stock transformers, no custom code, no mmv."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from minimind_v.core.export.prove.pillow_processor import PillowProcessor

NEW_TOKENS = 32


def ask(folder: str, cases: list[dict[str, Any]], dtype: str) -> dict[str, Any]:
    """The inputs, logits and tokens of a folder's model for each case."""
    processor = open_processor(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    if dtype == "float64" and hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the faster ones have no fp64
    parameters = sum(parameter.numel() for parameter in model.parameters())
    answers = [answer(model, processor, case) for case in cases]
    stands_in = isinstance(processor, PillowProcessor)
    return {"class": type(model).__name__, "parameters": parameters, "answers": answers, "stands_in": stands_in}


def open_processor(folder: str) -> Any:
    """The folder's own processor, or Pillow's where transformers cannot open that here."""
    return (PillowProcessor if PillowProcessor.replaces_the_own(folder) else AutoProcessor.from_pretrained)(folder)


@torch.inference_mode()
def answer(model: Any, processor: Any, case: dict[str, Any]) -> dict[str, Any]:
    """Generate greedily for one case, with the logits of each token."""
    inputs = processor.apply_chat_template(
        _with_pictures(case["messages"], case["pictures"]), add_generation_prompt=True, tokenize=True, return_dict=True,
        return_tensors="pt",
    ).to(model.dtype)  # fmt: skip
    generated = model.generate(
        **inputs, do_sample=False, max_new_tokens=NEW_TOKENS, return_dict_in_generate=True, output_logits=True
    )
    return {
        "input_ids": inputs["input_ids"][0],
        "pixel_values": inputs.get("pixel_values"),
        "logits": torch.cat(generated.logits),  # [N, V]
        "tokens": generated.sequences[0, inputs["input_ids"].shape[1] :],  # [N]
    }


def _with_pictures(messages: list[dict[str, Any]], pictures: list[str]) -> list[dict[str, Any]]:
    """The messages with an image in each item that stands for one."""
    paths = iter(pictures)

    def with_image(item: dict[str, Any]) -> dict[str, Any]:
        return item | {"image": Image.open(next(paths))} if item["type"] == "image" else item

    return [message | {"content": [with_image(item) for item in message["content"]]} for message in messages]
