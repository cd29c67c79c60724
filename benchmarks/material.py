"""What the benchmarks train on: rows, pictures, a vision tower and weights, made from a seed at full size."""

from __future__ import annotations

import io
import json
import random
import shutil
import zipfile
from collections.abc import Iterable
from dataclasses import asdict
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
TURNS = {"small": (1, 4), "3v": (1, 3)}  # of a conversation, by preset: of as many as its length holds
PICTURE_SIZE = (448, 336)
BASE_TOWER = {"image_size": 224, "patch_size": 16, "hidden_size": 768, "num_hidden_layers": 12,
              "num_attention_heads": 12, "intermediate_size": 3072}  # fmt: skip  # ViT-B/16
SIGLIP_SIZES = BASE_TOWER | {"image_size": 256, "patch_size": 32}


def make_material(folder: Path, tokenizer_source: Path, rows: dict[str, int], seed: int, preset: str = "small") -> None:
    """Write `tokenizer/`, `vision/`, `weights.safetensors` and, per stage, `<stage>.jsonl` with `<stage>.zip`."""
    from minimind_v.core.config.presets import PRESETS

    shutil.copytree(tokenizer_source, folder / "tokenizer", copy_function=shutil.copyfile)
    rng = random.Random(seed)
    for stage, count in rows.items():
        write_rows(folder, stage, make_pictures(rng.getrandbits(32), count), rng, preset)
    write_tower(folder / "vision", SIGLIP_SIZES if preset == "3v" else BASE_TOWER, seed, preset)
    write_weights(folder / "weights.safetensors", PRESETS[preset], seed)


def make_pictures(seed: int, count: int, size: tuple[int, int] = PICTURE_SIZE) -> list[bytes]:
    """JPEGs of one size, drawn from a seed."""
    noise = np.random.default_rng(seed)
    return [_picture(noise, size) for _ in range(count)]


def write_rows(folder: Path, stage: str, pictures: Iterable[bytes], rng: random.Random, preset: str = "small") -> None:
    """Write `<stage>.jsonl`, a row for each picture, and the pictures as `<stage>.zip`; needs `tokenizer/`.

    Those of minimind-3v have a system message and reasoning, so that training draws nothing about their form.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
    with (
        (folder / f"{stage}.jsonl").open("w", encoding="utf-8") as lines,
        zipfile.ZipFile(folder / f"{stage}.zip", "w") as archive,
    ):
        for number, picture in enumerate(pictures):
            name = f"{number:06d}.jpg"
            archive.writestr(name, picture)
            messages = [{"role": "system", "content": "Answer with care."}] if preset == "3v" else []
            for turn in range(rng.randint(*TURNS[preset]) if stage == "sft" else 1):
                question = _sentence(rng, tokenizer, *QUESTION_TOKENS)
                answer = _sentence(rng, tokenizer, *(ANSWER_TOKENS if stage == "sft" else CAPTION_TOKENS))
                messages.append({"role": "user", "content": question if turn else f"{question}\n<image>"})
                thought = {"reasoning_content": "bright sky"} if preset == "3v" else {}
                messages.append({"role": "assistant", "content": answer} | thought)
            lines.write(json.dumps({"conversations": messages, "image": name}) + "\n")


def _sentence(rng: random.Random, tokenizer, least: int, most: int) -> str:
    """Words of a drawn number of tokens."""
    length = rng.randint(least, most)
    ids = tokenizer.encode(" ".join(rng.choices(WORDS.split(), k=most)), add_special_tokens=False).ids[:length]
    return tokenizer.decode(ids).strip()


def _picture(noise: np.random.Generator, size: tuple[int, int]) -> bytes:
    """A JPEG with about as much detail as a photograph: coarse patches with fine noise on them."""
    width, height = size
    coarse = Image.fromarray(noise.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
    grain = noise.integers(-12, 13, smooth.shape, dtype=np.int16)
    buffer = io.BytesIO()
    Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def write_tower(folder: Path, sizes: dict, seed: int, preset: str = "small") -> None:
    """A preset's vision tower of these sizes with random weights: as fast as a real one. transformers opens it too."""
    import torch
    from safetensors.torch import save_file

    from minimind_v.core.config.generation import generation_of
    from minimind_v.core.config.presets import PRESETS
    from minimind_v.core.model.vision.spec import tower_type

    torch.manual_seed(seed)
    model_type = generation_of(PRESETS[preset]).towers[0]
    tower = tower_type(model_type)
    config = tower.config(**sizes)
    tensors = {f"vision_model.{name}": tensor for name, tensor in tower.build(config).state_dict().items()}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    images = {"size": dict.fromkeys(("height", "width"), sizes["image_size"]), "resample": 3}
    files = {"config.json": {"model_type": model_type} | asdict(config)}
    if preset == "3v":
        files["preprocessor_config.json"] = images | {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    for name, settings in files.items():
        (folder / name).write_text(json.dumps(settings), encoding="utf-8")


def write_weights(path: Path, config, seed: int) -> None:
    """The weights of `make_model`."""
    from minimind_v.core.formats.checkpoint import export_tensors, write_checkpoint

    write_checkpoint(path, export_tensors(make_model(config, seed)), config, "lm")


def make_model(config, seed: int, width: int = 768):
    """A model whose logits are far from uniform: with fresh weights any mistake gives the same ln(6400)."""
    import torch

    from minimind_v.core.config.generation import generation_of
    from minimind_v.core.model.vision.encoder import VisionSpec
    from minimind_v.core.model.vlm import VLM

    torch.manual_seed(seed)
    spec = VisionSpec(image_size=224, patch_size=16, width=width)
    model = VLM(config, spec, placeholder_id=34, projector=generation_of(config).projector)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and not name.startswith("vision_proj."):
            torch.nn.init.normal_(parameter, std=0.06)
    return model
