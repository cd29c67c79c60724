"""A small valid example of each format, made by the project's own writers or by stock libraries.

Each function fills an empty folder. The same folder comes out each time, so that a case is the same wherever it is run:
names, times and random numbers are fixed.
"""

from __future__ import annotations

import base64
import io
import json
import os
import random
import re
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from PIL import Image, ImageDraw
from safetensors.torch import save_file

from minimind_v.core.config.load import build_config, to_yaml
from minimind_v.core.config.schema import RunConfig, TextConfig
from minimind_v.core.data.dataset import RowDataset
from minimind_v.core.data.feature_layout import FeatureLayout
from minimind_v.core.data.feature_store import FeatureStore
from minimind_v.core.data.prompt import PromptEncoder
from minimind_v.core.data.token_store import TokenStore
from minimind_v.core.data.tokenizer import Tokenizer
from minimind_v.core.hub.receipt import Kept, Receipt
from minimind_v.core.model.vision.clip import ClipVision
from minimind_v.core.model.vision.encoder import VisionSpec
from minimind_v.core.model.vision.spec import ClipConfig
from minimind_v.core.model.vlm import VLM
from minimind_v.core.monitor.fingerprint import INPUTS
from minimind_v.core.rows import index
from minimind_v.core.rows.stores import open_rows
from minimind_v.core.train.resume import States
from tests.cli.harness import ASSETS

MOMENT = 1_700_000_000 * 10**9  # the time of every file: what is kept about a file names it
SIZE = 32  # pixels of the side of what the model is shown
TINY = TextConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=600)
MOE = TextConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, vocab_size=600, use_moe=True)
SPEC = VisionSpec(image_size=SIZE, patch_size=16, width=32)
FORM = FeatureLayout("float32", 4, 8)
ROWS = 5
QUESTIONS = ("What is in the picture?", "图片里有什么？", "How many dots?", "Which colour is it?", "Is it night?")


def set_times(folder: Path) -> None:
    """Give every file the same time."""
    for path in folder.rglob("*"):
        if path.is_file():
            os.utime(path, ns=(MOMENT, MOMENT))


# --- pictures ---------------------------------------------------------------------------------------------------------


@cache
def drawing(number: int, mode: str = "RGB") -> Image.Image:
    picture = Image.new("RGB", (48, 40), (40 * number % 256, 200, 90))
    draw = ImageDraw.Draw(picture)
    draw.ellipse((5, 5 + number, 30, 30), fill=(250, 20 * number % 256, 10))
    draw.line((0, 39, 47, number), fill=(0, 0, 0), width=2)
    return picture.convert(mode)


def encoded(number: int, kind: str = "JPEG", mode: str = "RGB", **how: Any) -> bytes:
    buffer = io.BytesIO()
    drawing(number, mode).save(buffer, kind, **how)
    return buffer.getvalue()


def picture(kind: str, mode: str = "RGB", **how: Any) -> Callable[[Path], None]:
    """A maker of one picture's file."""

    def make(folder: Path) -> None:
        (folder / "picture").write_bytes(encoded(3, kind, mode, **how))

    return make


def mpo(folder: Path) -> None:
    drawing(1).save(folder / "picture", "MPO", save_all=True, append_images=[drawing(2)])


def gif(folder: Path) -> None:
    drawing(1).save(folder / "picture", "GIF", save_all=True, append_images=[drawing(2), drawing(3)])


def turned_jpeg(folder: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    (folder / "picture").write_bytes(encoded(3, exif=exif, icc_profile=bytes(200), quality=80))


# --- rows -------------------------------------------------------------------------------------------------------------


def conversations(number: int) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": f"<image>\n{QUESTIONS[number % ROWS]}"},
        {"role": "assistant", "content": f"There are {number} dots, and a line."},
    ]


def folder_of_pictures(folder: Path) -> None:
    (folder / "images").mkdir()
    for number in range(ROWS):
        (folder / "images" / f"{number}.jpg").write_bytes(encoded(number))


def zip_of_pictures(folder: Path) -> None:
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        for number in range(ROWS):
            info = zipfile.ZipInfo(f"images/{number}.jpg")
            info.compress_type = zipfile.ZIP_DEFLATED if number % 2 else zipfile.ZIP_STORED
            archive.writestr(info, encoded(number))


def jsonl(folder: Path) -> None:
    rows = [{"conversations": conversations(n), "image": f"{n}.jpg", "id": n, "source": "drawn"} for n in range(ROWS)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    zip_of_pictures(folder)


def json_array(folder: Path) -> None:
    rows = [
        {
            "id": f"{n}",
            "image": [f"{n}.jpg"],
            "conversations": [
                {"from": "human", "value": f"{QUESTIONS[n]}\n<image>"},
                {"from": "gpt", "value": f"{n} dots"},
            ],
        }
        for n in range(ROWS)
    ]
    (folder / "rows.json").write_text(json.dumps(rows, indent=1))
    folder_of_pictures(folder)


def indexed_jsonl(folder: Path) -> None:
    """With the index that is kept beside a large file."""
    jsonl(folder)
    set_times(folder)
    with mock.patch.object(index, "WORTH_KEEPING", 1):
        open_rows(folder / "rows.jsonl", folder / "images.zip")


def parquet(folder: Path) -> None:
    """The published layout."""
    table = pa.table(
        {
            "conversations": [json.dumps(conversations(n), ensure_ascii=False) for n in range(ROWS)],
            "image_bytes": [[encoded(n)] for n in range(ROWS)],
        },
        schema=pa.schema([("conversations", pa.string()), ("image_bytes", pa.list_(pa.binary()))]),
    )
    pq.write_table(table, folder / "rows.parquet", row_group_size=2, compression="zstd")


def parquet_structs(folder: Path) -> None:
    """Messages as structs, pictures as `datasets` keeps them, snappy, several pages."""
    images = [[{"bytes": encoded(n), "path": f"{n}.jpg"}] for n in range(ROWS)]
    table = pa.table({"messages": [conversations(n) for n in range(ROWS)], "images": images})
    pq.write_table(table, folder / "rows.parquet", compression="snappy", data_page_size=64, write_page_index=True)


def parquet_dictionary(folder: Path) -> None:
    """Columns of dictionaries, a picture per row, data pages of the second version."""
    talk = [json.dumps(conversations(n % 2), ensure_ascii=False) for n in range(ROWS)]
    images = [encoded(n % 2) for n in range(ROWS)]
    table = pa.table({"conversations": pa.array(talk).dictionary_encode(), "image": images})
    pq.write_table(table, folder / "rows.parquet", data_page_version="2.0", compression="gzip")


def saved(folder: Path) -> None:
    import datasets

    datasets.disable_progress_bars()
    rows = {
        "conversations": [json.dumps(conversations(n)) for n in range(ROWS)],
        "image": [encoded(n) for n in range(ROWS)],
    }
    datasets.Dataset.from_dict(rows).save_to_disk(folder / "rows")
    state = folder / "rows" / "state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"_fingerprint": "0" * 16}, indent=1))


def jsonl_in_parts(folder: Path) -> None:
    """Messages in parts, as chat APIs have them; pictures by name and in the text."""
    inside = "data:image/jpeg;base64," + base64.b64encode(encoded(4)).decode()
    rows = [
        {
            "messages": [
                {"role": "user", "content": [
                    {"type": "image_url", "image_url": {"url": inside}} if n % 2 else {"type": "image"},
                    {"type": "text", "text": QUESTIONS[n]},
                ]},
                {"role": "assistant", "content": [{"type": "text", "text": f"{n} dots"}]},
            ],
        }
        | ({} if n % 2 else {"images": [f"{n}.jpg"]})
        for n in range(ROWS)
    ]  # fmt: skip
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder_of_pictures(folder)


def csv(folder: Path) -> None:
    lines = ["image,caption", *(f'{n}.jpg,"{n} dots, and a ""line"""' for n in range(ROWS))]
    (folder / "rows.csv").write_text("\n".join(lines) + "\n")
    folder_of_pictures(folder)


def imagefolder(folder: Path) -> None:
    """Pictures with a list of their captions beside them."""
    folder_of_pictures(folder)
    lines = [json.dumps({"file_name": f"{n}.jpg", "text": f"{n} dots"}) for n in range(ROWS)]
    (folder / "images" / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def coco(folder: Path) -> None:
    folder_of_pictures(folder)
    images = [{"id": n, "file_name": f"{n}.jpg", "width": 48, "height": 40} for n in range(ROWS)]
    captions = [{"id": 100 + n, "image_id": n % ROWS, "caption": f"{n} dots"} for n in range(ROWS + 2)]
    content = {"info": {"year": 2026}, "licenses": [], "images": images, "annotations": captions}
    (folder / "rows.json").write_text(json.dumps(content))


def tar(folder: Path) -> None:
    """A shard: a picture, a caption and a JSON of each sample."""
    with tarfile.open(folder / "rows.tar", "w") as archive:
        for n in range(ROWS):
            members = {"jpg": encoded(n), "txt": f"{n} dots".encode(), "json": json.dumps({"id": n}).encode()}
            for ending, data in members.items():
                info = tarfile.TarInfo(f"{n:06d}.{ending}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))


# --- what is kept beside data -----------------------------------------------------------------------------------------


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.load(ASSETS)


def dataset_of(folder: Path) -> RowDataset:
    rows = open_rows(folder / "rows.jsonl", folder / "images.zip")
    return RowDataset(rows, PromptEncoder(tokenizer(), SPEC.tokens_per_image), SIZE, 128)


def open_tokens(folder: Path) -> TokenStore:
    return TokenStore(folder / ".rows.jsonl.tokens-0.bin", ROWS, b"i" * 32, wide=False)


def token_store(folder: Path) -> None:
    jsonl(folder)
    open_tokens(folder).lengths(np.arange(ROWS), dataset_of(folder).text)


def feature_keys() -> list[bytes]:
    return [bytes([number]) * 16 for number in range(ROWS)]


def feature_store(folder: Path) -> None:
    store = FeatureStore(folder / "features" / "a", FORM, 10**8)
    generator = torch.Generator().manual_seed(0)
    store.write(feature_keys(), torch.randn(ROWS, FORM.patches, FORM.width, generator=generator))
    store.close()
    for path in sorted((folder / "features" / "a").iterdir()):
        path.rename(path.with_name("00000000000000000001-00000000" + path.suffix))


# --- weights ----------------------------------------------------------------------------------------------------------


def tensors(config: TextConfig = TINY) -> dict[str, torch.Tensor]:
    from minimind_v.core.formats.checkpoint import export_tensors

    torch.manual_seed(1)
    return export_tensors(VLM(config, SPEC, placeholder_id=5))


def checkpoint(folder: Path, name: str, config: TextConfig = TINY) -> None:
    from minimind_v.core.formats.checkpoint import write_checkpoint
    from minimind_v.core.formats.companions import RECORD

    write_checkpoint(folder / name, tensors(config), config, "sft")
    if name.endswith(".pth"):  # a record of what they were trained with, by places that are everywhere the same
        described = json.loads((folder / name).with_suffix(".json").read_text())
        record = {"paths": ["vision", "vision"], "digest": None}
        described[RECORD] = {"vision_model": record, "tokenizer": record}
        (folder / name).with_suffix(".json").write_text(json.dumps(described, indent=1))


def pth(folder: Path) -> None:
    checkpoint(folder, "sft_vlm_32.pth")


def pth_moe(folder: Path) -> None:
    checkpoint(folder, "sft_vlm_32_moe.pth", MOE)


def pth_legacy(folder: Path) -> None:
    """All tensors in one storage, which such a file names after its place in memory: that name is made another."""
    held = tensors()
    whole = torch.cat([tensor.flatten() for tensor in held.values()])
    pieces = whole.split([tensor.numel() for tensor in held.values()])
    views = {name: piece.view(held[name].shape) for name, piece in zip(held, pieces, strict=True)}
    buffer = io.BytesIO()
    torch.save(views, buffer, _use_new_zipfile_serialization=False)
    data = re.sub(rb"X.\0\0\0\d{9,20}", b"X\x0a\0\0\x001234567890", buffer.getvalue(), flags=re.DOTALL)
    (folder / "sft_vlm_32.pth").write_bytes(data)


def safetensors(folder: Path) -> None:
    checkpoint(folder, "sft_vlm_32.safetensors")


def tower(folder: Path) -> None:
    """As transformers saves a CLIPVisionModel."""
    config = ClipConfig(SPEC.width, 48, 1, 2, image_size=SIZE, patch_size=SPEC.patch_size)
    torch.manual_seed(2)
    held = {f"vision_model.{name}": tensor for name, tensor in ClipVision(config).state_dict().items()}
    (folder / "vision").mkdir()
    save_file(held, folder / "vision" / "model.safetensors", {"format": "pt"})
    (folder / "vision" / "config.json").write_text(json.dumps(asdict(config) | {"model_type": "clip_vision_model"}))
    settings = {"image_mean": list(SPEC.mean), "image_std": list(SPEC.std), "size": {"shortest_edge": SIZE}}
    (folder / "vision" / "preprocessor_config.json").write_text(json.dumps(settings))


def tokenizer_file(folder: Path) -> None:
    """A tokenizer's file."""
    shutil.copy(ASSETS / "tokenizer.json", folder)


def model(folder: Path, config: TextConfig = TINY) -> Any:
    """Weights, tower and tokenizer, as `Order` names them."""
    from minimind_v.core.formats.request import ExportRequest

    tower(folder)
    checkpoint(folder, "sft_vlm_32.pth", config)
    return ExportRequest(folder / "sft_vlm_32.pth", folder / "vision", ASSETS)


def _only(folder: Path, kept: str) -> None:
    for path in folder.iterdir():
        if path.name != kept:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def hf(folder: Path) -> None:
    from minimind_v.core.export.folder import MANIFEST
    from minimind_v.core.formats.hf import write as hf
    from minimind_v.core.formats.load import read_model_parts

    order = model(folder)
    (folder / "model").mkdir()
    hf.write(read_model_parts(order.model, order.vision_model, order.tokenizer), folder / "model", order)
    sizes = {path.name: path.stat().st_size for path in sorted((folder / "model").iterdir())}
    noted = {"made_by": "mmv 1", "kind": "hf", "source": {"name": "sft_vlm_32.pth", "sha256": "0"}, "stage": "sft"}
    noted |= {"verified": {"logits": "the same"}, "files": sizes}
    (folder / "model" / MANIFEST).write_text(json.dumps(noted))
    _only(folder, "model")


def gguf(folder: Path) -> None:
    from minimind_v.core.formats.gguf import write as gguf

    order = model(folder)
    (folder / "model").mkdir()
    gguf.write(order.load(), folder / "model", order)
    _only(folder, "model")


# --- configurations and records ---------------------------------------------------------------------------------------


def config() -> RunConfig:
    return build_config("pretrain", sets=["data.workers=2", "data.file=rows.jsonl", "data.images=images.zip"])


def configuration(folder: Path) -> None:
    """What a run writes, and what somebody writes by hand."""
    (folder / "config.yaml").write_text(to_yaml(config()))
    (folder / "short.yaml").write_text(
        "# mine\npreset: demo\nlr: 1e-3\nfreeze: projector\ntrain.epochs: 2\ndata:\n  file: rows.jsonl\n"
        "  batch_size: auto\n  split: null\nmodel: {num_hidden_layers: 2}\n"
    )


def settings(folder: Path) -> None:
    """Some `--set`, one a line."""
    (folder / "sets").write_text(
        "data.batch_size=16\nlr=1e-4\nmodel.hidden_size=256\nmodel.rope_theta=1e6\nout=here\ninit=none\ngpus=1\ntrack=none"
    )


def states(folder: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    for step in (2, 4):
        held = {f"weight.{name}": torch.randn(4, 6, generator=generator) for name in ("a", "b")}
        held["rng.cpu"] = torch.arange(40, dtype=torch.uint8)
        progress = {"step": step, "split": [4, 1], "counts": {"samples": 8}, "broken": []}
        States(folder / "states", 2).write(step, held, progress, origin())


def origin() -> dict[str, Any]:
    return dict.fromkeys(INPUTS, "5 bytes 0123456789abcdef") | {"code": "c", "rows_per_update": 4}


def run_records(folder: Path) -> None:
    """All that a run leaves in its folder."""
    from minimind_v.core.config.load import as_settings

    rng = random.Random(0)
    steps = [
        {"step": n, "steps": 8, "epoch": n / 4, "loss": 5.0 / n, "hits": 0.1 * n, "lr": 1e-3, "grad_norm": rng.random(),
         "samples": 4 * n, "tokens": 90 * n, "supervised_tokens": 20 * n, "seconds": 0.5 * n, "data_seconds": 0.1 * n}
        for n in range(1, 9)
    ]  # fmt: skip
    validation = {"step": 4, "loss": 3.0, "hits": 0.2, "swapped_loss": 3.5, "rows": 4, "best": True}
    recalled = {"own": {"data": "rows.jsonl", "rows": 4, "loss": 2.0, "hits": 0.5}}
    events = [
        {"step": 4, "validation": validation}, {"step": 5, "warning": "the loss rises"},
        {"step": 8, "memory_bytes": 5 * 10**8}, {"step": 8, "recalled": recalled},
    ]  # fmt: skip
    run = folder / "pretrain_vlm_512"
    run.mkdir()
    run.with_suffix(".pth").touch()
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in steps))
    (run / "events.jsonl").write_text("".join(json.dumps(record) + "\n" for record in events))
    given = as_settings(config())
    start = {"time": "2026-11-27T10:00:00+0000", "after_updates": 0, "command": "mmv train pretrain", "folder": "/",
             "machine": {"platform": "Linux"}, "git": {"commit": "0" * 40, "changed": []}}  # fmt: skip
    manifest = {"mmv": "1", "stage": "pretrain", "seed": 42, "config": given | {"recall_rows": 4},
                "fingerprints": origin(), "versions": {"torch": "2"}, "starts": [start]}  # fmt: skip
    (run / "manifest.json").write_text(json.dumps(manifest, indent=1))
    forecast = {"updates": 8, "samples": 32, "tokens": 700, "seconds": 4.0, "memory_bytes": 10**9, "disk_bytes": 10**7,
                "price_per_hour": 2.0, "cost": 0.1, "config": {"seed": 42}, "how": "measured"}  # fmt: skip
    (run / "forecast.json").write_text(json.dumps(forecast))
    (run / "config.yaml").write_text(yaml.safe_dump(given))


def held_out(folder: Path) -> None:
    from minimind_v.core.rows.heldout import hold_out

    (folder / "rows.jsonl").write_text(
        "".join(json.dumps({"conversations": [{"role": "user", "content": f"{n}"}]}) + "\n" for n in range(40))
    )
    hold_out(open_rows(folder / "rows.jsonl"), 4, 1, folder / "held_out.json", "data", lambda message: None)


def receipt(folder: Path) -> None:
    kept = Kept(5, MOMENT, "0" * 64, "hf", "a/b", "c" * 40, "x.bin")
    (folder / "x.bin").write_bytes(b"12345")
    Receipt(folder, {"x.bin": kept}, {"hf a/b@main": "c" * 40}, {"clip": ["x.bin"]}).write()
