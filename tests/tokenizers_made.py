"""A tokenizer folder with the tokens of minimind-3v's chat layout, small enough for the demo's language model."""

from __future__ import annotations

import json
from pathlib import Path

from minimind_v.core.data.thinking import TAGS

ASSETS = Path(__file__).parents[1] / "minimind_v" / "core" / "demo" / "assets"
IMAGE_PAD = "<|image_pad|>"


def thinking_tokenizer(folder: Path) -> Path:
    """The folder of the demo's tokenizer whose last learnt tokens are the image's token and the tags of thinking."""
    description = json.loads((ASSETS / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary, tokens = description["model"]["vocab"], (IMAGE_PAD, *TAGS)
    by_id = {number: token for token, number in vocabulary.items()}
    first = len(by_id) - len(tokens)
    for number, token in enumerate(tokens, first):
        del vocabulary[by_id[number]]
        vocabulary[token] = number
        description["added_tokens"].append({
            "id": number, "content": token, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": token == IMAGE_PAD,
        })  # fmt: skip
    description["model"]["merges"] = [merge for merge in description["model"]["merges"] if "".join(merge) in vocabulary]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(description, ensure_ascii=False), encoding="utf-8")
    return folder
