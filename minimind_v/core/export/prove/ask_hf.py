"""Answer test prompts with an exported folder as its user would: stock transformers, no custom code, no mmv."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

NEW_TOKENS = 32


def ask(folder: str, cases: list[dict[str, Any]], dtype: str) -> dict[str, Any]:
    """What the model of a folder reads, sees, thinks and says of each case."""
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    if dtype == "float64" and hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the quicker ways know no fp64
    parameters = sum(parameter.numel() for parameter in model.parameters())
    answers = [answer(model, processor, case) for case in cases]
    return {"class": type(model).__name__, "parameters": parameters, "answers": answers}


@torch.inference_mode()
def answer(model: Any, processor: Any, case: dict[str, Any]) -> dict[str, Any]:
    """One case: greedily, with the logits of every token that is said."""
    inputs = processor.apply_chat_template(
        with_pictures(case["messages"], case["pictures"]), add_generation_prompt=True, tokenize=True, return_dict=True,
        return_tensors="pt",
    ).to(model.dtype)  # fmt: skip
    found = model.generate(
        **inputs, do_sample=False, max_new_tokens=NEW_TOKENS, return_dict_in_generate=True, output_logits=True
    )
    return {
        "input_ids": inputs["input_ids"][0],
        "pixel_values": inputs.get("pixel_values"),
        "logits": torch.cat(found.logits),  # [N, V]
        "said": found.sequences[0, inputs["input_ids"].shape[1] :],  # [N]
    }


def with_pictures(messages: list[dict[str, Any]], pictures: list[str]) -> list[dict[str, Any]]:
    """The messages with a picture in each part that stands for one."""
    left = iter(pictures)
    return [
        said | {"content": [
            part | {"image": Image.open(next(left))} if part["type"] == "image" else part for part in said["content"]
        ]}
        for said in messages
    ]  # fmt: skip
