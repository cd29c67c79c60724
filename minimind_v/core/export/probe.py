"""Ask a folder questions as its user would: stock transformers, no code from the folder, nothing of ours.

Run as a program by `verify_hf`: the folder, and a folder with `cases.json` and pictures, which gets `answers.pt`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

NEW_TOKENS = 32


def main(folder: str, work: Path) -> None:
    """Read the cases, answer each, write what was read, seen, thought and said."""
    import torch
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    answers = []
    for case in json.loads((work / "cases.json").read_text(encoding="utf-8")):
        pictures = [Image.open(work / name) for name in case["pictures"]]
        inputs = processor.apply_chat_template(
            with_pictures(case["messages"], pictures), add_generation_prompt=True, tokenize=True, return_dict=True,
            return_tensors="pt",
        )  # fmt: skip
        with torch.inference_mode():
            logits = model(**inputs).logits[0]
            whole = model.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS)[0]
        answers.append({
            "input_ids": inputs["input_ids"][0], "pixel_values": inputs.get("pixel_values"), "logits": logits,
            "said": whole[inputs["input_ids"].shape[1] :],
        })  # fmt: skip
    parameters = sum(parameter.numel() for parameter in model.parameters())
    torch.save({"answers": answers, "parameters": parameters, "class": type(model).__name__}, work / "answers.pt")


def with_pictures(messages: list[dict[str, Any]], pictures: list[Any]) -> list[dict[str, Any]]:
    """The messages with a picture in each part that stands for one."""
    left = iter(pictures)
    return [
        said | {"content": [
            part | {"image": next(left)} if part["type"] == "image" else part for part in said["content"]
        ]}
        for said in messages
    ]  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
