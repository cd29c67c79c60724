"""What the benchmarks train on: rows, pictures, a vision tower and weights, made from a seed at full size."""

from __future__ import annotations

import io
import json
import random
import shutil
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

WORDS = (
    "a the of on in with and is are two three small large red green blue white wooden young old man woman dog cat "
    "horse street table window kitchen garden tree river boat car bicycle plate bread fruit sky cloud mountain beach "
    "holding standing sitting looking walking near behind under bright dark quiet busy market building sign picture"
)
CAPTION_TOKENS = (20, 60)
QUESTION_TOKENS = (8, 24)
ANSWER_TOKENS = (20, 160)
TURNS = (1, 4)
PICTURE_SIZE = (448, 336)


def make_material(folder: Path, tokenizer_source: Path, rows: dict[str, int], seed: int) -> None:
    """Write `tokenizer/`, `clip/`, `weights.safetensors` and, per stage, `<stage>.jsonl` with `<stage>.zip`."""
    from tokenizers import Tokenizer

    shutil.copytree(tokenizer_source, folder / "tokenizer", copy_function=shutil.copyfile)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
    rng = random.Random(seed)
    for stage, count in rows.items():
        _write_rows(folder, stage, count, tokenizer, rng)
    _write_clip(folder / "clip", seed)
    _write_weights(folder / "weights.safetensors", seed)


def _write_rows(folder: Path, stage: str, count: int, tokenizer, rng: random.Random) -> None:
    noise = np.random.default_rng(rng.getrandbits(32))
    with (
        (folder / f"{stage}.jsonl").open("w", encoding="utf-8") as lines,
        zipfile.ZipFile(folder / f"{stage}.zip", "w") as pictures,
    ):
        for number in range(count):
            name = f"{number:06d}.jpg"
            pictures.writestr(name, _picture(noise))
            messages = []
            for turn in range(1 if stage == "pretrain" else rng.randint(*TURNS)):
                question = _sentence(rng, tokenizer, *QUESTION_TOKENS)
                answer = _sentence(rng, tokenizer, *(CAPTION_TOKENS if stage == "pretrain" else ANSWER_TOKENS))
                messages.append({"role": "user", "content": question if turn else f"{question}\n<image>"})
                messages.append({"role": "assistant", "content": answer})
            lines.write(json.dumps({"conversations": messages, "image": name}) + "\n")


def _sentence(rng: random.Random, tokenizer, least: int, most: int) -> str:
    """Words of a drawn number of tokens."""
    wanted = rng.randint(least, most)
    ids = tokenizer.encode(" ".join(rng.choices(WORDS.split(), k=most)), add_special_tokens=False).ids[:wanted]
    return tokenizer.decode(ids).strip()


def _picture(noise: np.random.Generator) -> bytes:
    """A JPEG with about as much detail as a photograph: coarse patches with fine noise on them."""
    width, height = PICTURE_SIZE
    coarse = Image.fromarray(noise.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
    grain = noise.integers(-12, 13, smooth.shape, dtype=np.int16)
    buffer = io.BytesIO()
    Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def _write_clip(folder: Path, seed: int) -> None:
    """CLIP's ViT-B/16 with random weights: as fast as the real one."""
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(seed)
    config = CLIPVisionConfig(
        image_size=224,
        patch_size=16,
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        intermediate_size=3072,
    )
    CLIPVisionModel(config).save_pretrained(folder)


def _write_weights(path: Path, seed: int) -> None:
    """A small preset whose logits are far from uniform: with fresh weights any mistake gives the same ln(6400)."""
    import torch

    from minimind_v.core.checkpoint.weights import export_tensors, write_checkpoint
    from minimind_v.core.config.presets import PRESETS
    from minimind_v.core.model.vision import VisionSpec
    from minimind_v.core.model.vlm import VLM

    torch.manual_seed(seed)
    model = VLM(PRESETS["small"], VisionSpec(image_size=224, patch_size=16, width=768), placeholder_id=0)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and not name.startswith("vision_proj."):
            torch.nn.init.normal_(parameter, std=0.06)
    write_checkpoint(path, export_tensors(model), PRESETS["small"], "lm")
