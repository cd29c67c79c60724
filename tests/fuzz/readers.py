"""The formats that `mmv` reads: for each what makes an example, what reads it, and what may become of its data.

`read` takes the folder with the example, changed or not, and returns what the project's own functions read there, by
names: Refused in the place of what one of them refused in one line. Whatever else it raises is a fault.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch

from minimind_v.cli.info import _described, _trained_with
from minimind_v.core.config.generation import V2025
from minimind_v.core.config.load import resolve, to_yaml
from minimind_v.core.config.presets import PRESETS
from minimind_v.core.curate.check import check_row
from minimind_v.core.data.dataset import Example, RowDataset
from minimind_v.core.data.feature_store import FeatureStore
from minimind_v.core.data.images import decode, load_pixels
from minimind_v.core.data.prompt import PromptEncoder
from minimind_v.core.data.tokenizer import Tokenizer
from minimind_v.core.errors import MmvError, RowError
from minimind_v.core.files import as_json
from minimind_v.core.formats.checkpoint import load_into, read_checkpoint
from minimind_v.core.formats.companions import of_the_run
from minimind_v.core.formats.description import shaped_sizes
from minimind_v.core.formats.hf import card
from minimind_v.core.formats.load import load
from minimind_v.core.formats.request import ExportRequest
from minimind_v.core.formats.vision_tower import load_encoder
from minimind_v.core.hub.receipt import Receipt
from minimind_v.core.model.no_init import NoInit
from minimind_v.core.model.vlm import VLM
from minimind_v.core.monitor import manifest
from minimind_v.core.pages.run_report import find_run, read_run, report_page
from minimind_v.core.rows import index
from minimind_v.core.rows.heldout import hold_out
from minimind_v.core.rows.pictures import open_pictures
from minimind_v.core.rows.stores import open_rows
from minimind_v.core.train.recall import earlier_run
from minimind_v.core.train.resume import States
from tests.fuzz import seeds

MOST = 40  # rows of a file that are read: a changed file may have many


@dataclass(frozen=True)
class Refused:
    """What was refused in one line, where the rest of the data can be read."""

    line: str


Data = Mapping[str, Any]


@dataclass(frozen=True)
class Format:
    """A format. `proof` says what its checksums promise:

    "" nothing: any data may come of it; "whole": the data as written, or a refusal; "pieces": each piece as written, or
    none, as of what is only remembered.
    """

    make: Callable[[Path], Any]
    read: Callable[[Path], Data]
    changed: str = "**/*"  # which files are changed
    kind: str = ""  # of structured changes
    proof: str = ""


# --- what data is -----------------------------------------------------------------------------------------------------


def digest(value: Any) -> str:
    """A digest that equal data have in common."""
    hasher = hashlib.blake2b(digest_size=8)
    _feed(hasher, value)
    return hasher.hexdigest()


def _feed(hasher: Any, value: Any) -> None:
    if isinstance(value, torch.Tensor):
        value = value.detach().float().numpy() if value.is_floating_point() else value.numpy()
    if isinstance(value, np.ndarray):
        hasher.update(f"{value.dtype}{value.shape}".encode() + value.tobytes())
    elif is_dataclass(value) and not isinstance(value, type):
        _feed(hasher, [getattr(value, field.name) for field in fields(value)])
    elif isinstance(value, Mapping):
        for key, inner in sorted(
            value.items(), key=lambda item: repr(item[0])
        ):  # safetensors gives its tensors in any order
            _feed(hasher, key)
            _feed(hasher, inner)
    elif isinstance(value, list | tuple):
        hasher.update(f"{len(value)}".encode())
        for inner in value:
            _feed(hasher, inner)
    else:
        hasher.update(repr(value).encode("utf-8", "surrogatepass"))


def or_refused(read: Callable[[], Any]) -> Any:
    """What is read, or the line that refused it."""
    try:
        return read()
    except MmvError as error:
        return Refused(str(error))


# --- pictures ---------------------------------------------------------------------------------------------------------


def read_picture(folder: Path) -> Data:
    data = (folder / "picture").read_bytes()
    return {"pixels": load_pixels(data, "picture", seeds.SIZE), "size": decode(data, "picture").size}


def read_zip(folder: Path) -> Data:
    return _read_pictures(folder / "images.zip")


def read_folder(folder: Path) -> Data:
    return _read_pictures(folder / "images")


def _read_pictures(folder: Path) -> Data:
    pictures = open_pictures(folder)
    names = [f"{n}.jpg" for n in range(seeds.ROWS)]
    return {name: or_refused(lambda name=name: load_pixels(pictures.read(name), name, seeds.SIZE)) for name in names}


# --- rows -------------------------------------------------------------------------------------------------------------


def read_rows(data: Path, images: Path | None = None) -> Data:
    """All that training, `check` and `convert` read of rows."""
    rows = open_rows(data, images)
    encoder = PromptEncoder(seeds.tokenizer(), seeds.SPEC.tokens_per_image)
    dataset = RowDataset(rows, encoder, seeds.SIZE, 128)
    read: dict[str, Any] = {"rows": len(rows)}
    for number in range(min(len(rows), MOST)):
        text = dataset.text(number)
        loaded = dataset.load(text) if isinstance(text, Example) else Refused(str(text))
        read[f"row {number}"] = _of_row(loaded) if isinstance(loaded, Example) else Refused(str(loaded))
        check_row(dataset, number)
        try:
            row = rows.row(number)
        except RowError:
            continue
        as_json({"conversations": row.conversations} | row.extra)
    rows.shuffled(np.random.default_rng(0))
    return read


def _of_row(example: Example) -> Any:
    return list(example.tokens.input_ids), example.names, [picture.pixels for picture in example.images]


def rows_in(name: str, images: str | None = None) -> Callable[[Path], Data]:
    """A reader of a file of rows."""
    return lambda folder: read_rows(folder / name, folder / images if images else None)


def read_indexed(folder: Path) -> Data:
    with mock.patch.object(index, "WORTH_KEEPING", 1):
        return read_rows(folder / "rows.jsonl", folder / "images.zip")


def read_tokens(folder: Path) -> Data:
    store = seeds.open_tokens(folder)
    kept = store.read(np.arange(seeds.ROWS))
    for_training, loose = store.lengths(np.arange(seeds.ROWS), seeds.dataset_of(folder).text)
    assert for_training.all() and not loose, "a row was not tokenised again"  # noqa: PT018
    return {
        f"{row}": [list(text.tokens.input_ids), text.names] for row, text in kept.items() if isinstance(text, Example)
    }


def read_features(folder: Path) -> Data:
    store = FeatureStore(folder / "features" / "a", seeds.FORM, 10**8)
    read = {key.hex(): store.read(key) for key in seeds.feature_keys()}
    store.count()
    store.write(seeds.feature_keys(), torch.zeros(seeds.ROWS, seeds.FORM.patches, seeds.FORM.width))
    store.close()
    return {key: features for key, features in read.items() if features is not None}


# --- weights ----------------------------------------------------------------------------------------------------------


def read_weights(folder: Path) -> Data:
    """A checkpoint, loaded into a model of its sizes, as far as these are those that were written."""
    path = next(path for path in sorted(folder.iterdir()) if path.suffix in (".pth", ".safetensors"))
    checkpoint = read_checkpoint(path)
    with NoInit():
        model = VLM(checkpoint.config, seeds.SPEC, placeholder_id=5)
    load_into(model, checkpoint, new_projector=True)
    _trained_with(checkpoint)
    return {"model": model.state_dict(), "config": checkpoint.config, "stage": checkpoint.stage}


def read_whole_model(folder: Path) -> Data:
    """An exported folder: weights, tower and tokenizer; and what `mmv info` tells of it."""
    loaded = load(folder / "model", device="cpu")
    _described(folder / "model")
    encoded = loaded.tokenizer.encode("What is in the picture?").ids
    return {"model": loaded.model.state_dict(), "config": loaded.checkpoint.config, "ids": encoded}


def read_gguf_head(folder: Path) -> Data:
    from minimind_v.core.formats.gguf.read import describe_gguf

    return {path.name: or_refused(lambda path=path: describe_gguf(path)) for path in sorted(folder.glob("*/*.gguf"))}


def read_tower(folder: Path) -> Data:
    encoder = load_encoder(folder / "vision")
    size = encoder.spec.image_size
    assert size <= 4096, f"an image of {size} pixels a side"
    return {"spec": encoder.spec, "features": encoder(torch.zeros(1, 3, size, size, dtype=torch.uint8))}


def read_words(folder: Path) -> Data:
    tokenizer = Tokenizer.load(folder)
    ids = tokenizer.encode("Wie viele Punkte? 几个点？ <|im_end|> @@").ids
    return {"ids": ids, "text": tokenizer.decode(ids), "vocab": tokenizer.vocab_size, "special": tokenizer.eos_id}


# --- configurations and records ---------------------------------------------------------------------------------------


def read_configuration(folder: Path) -> Data:
    read = {}
    for name in ("config.yaml", "short.yaml"):
        read[name] = or_refused(lambda name=name: to_yaml(resolve("pretrain", folder / name).config))
    return read


def read_settings(folder: Path) -> Data:
    sets = (folder / "sets").read_text("utf-8", "surrogateescape").split("\n")
    resolved = resolve("pretrain", sets=sets)
    return {"config": to_yaml(resolved.config, resolved.sources)}


def read_states(folder: Path) -> Data:
    """Each state: of those that are whole, the newest; then, without it, the one before."""
    states, read = States(folder / "states", 2), {}
    while states.paths():
        state = or_refused(lambda: states.newest(lambda warning: None))
        if isinstance(state, Refused):
            return read | {"the rest": state}
        read[f"{state.progress['step']}"] = [state.tensors, state.progress, state.origin]
        for path in states.paths():
            if path.name >= state.path.name:
                path.unlink()
    return read


def read_run_report(folder: Path) -> Data:
    run = find_run(folder / "pretrain_vlm_512")
    return {"page": or_refused(lambda: report_page(read_run(run))), "info": or_refused(lambda: _described(run))}


def read_run_notes(folder: Path) -> Data:
    """What later commands look up beside weights: what the run read, and what it was."""
    weights = folder / "pretrain_vlm_512.pth"
    model = PRESETS["small"]
    companions, earlier = of_the_run(weights, shaped_sizes(model)), earlier_run(weights, model)
    checkpoint = SimpleNamespace(stage="sft", generation=V2025, config=model)
    text = card._training(SimpleNamespace(checkpoint=checkpoint), ExportRequest(weights))  # type: ignore[arg-type]
    with mock.patch.object(manifest, "start", return_value={}):  # which asks git, and packages for their versions
        manifest.write_manifest(folder / "pretrain_vlm_512" / "manifest.json", seeds.config(), seeds.origin(), done=2)
    return {"companions": companions, "earlier": earlier, "card": text}


def read_held_out(folder: Path) -> Data:
    rows = open_rows(folder / "rows.jsonl")
    return {"mask": hold_out(rows, 4, 1, folder / "held_out.json", "data", lambda message: None)}


def read_receipt(folder: Path) -> Data:
    receipt = Receipt.read(folder)
    read = {want: receipt.answers(want, "a/b") for want in ["clip", *receipt.download_parts]}
    receipt.write()
    return read | {"files": {name: asdict(kept) for name, kept in receipt.files.items()}}


FORMATS = {
    "jsonl": Format(seeds.jsonl, rows_in("rows.jsonl", "images.zip"), "rows.jsonl", "json"),
    "json array": Format(seeds.json_array, rows_in("rows.json", "images"), "rows.json", "json"),
    "jsonl, in parts": Format(seeds.jsonl_in_parts, rows_in("rows.jsonl", "images"), "rows.jsonl", "json"),
    "csv": Format(seeds.csv, rows_in("rows.csv", "images"), "rows.csv", "csv"),
    "imagefolder": Format(seeds.imagefolder, rows_in("images"), "images/metadata.jsonl", "json"),
    "coco": Format(seeds.coco, rows_in("rows.json", "images"), "rows.json", "json"),
    "tar": Format(seeds.tar, rows_in("rows.tar"), "rows.tar", "tar"),
    "row index": Format(seeds.indexed_jsonl, read_indexed, ".*.npy", proof="whole"),
    "parquet": Format(seeds.parquet, rows_in("rows.parquet")),
    "parquet, structs": Format(seeds.parquet_structs, rows_in("rows.parquet")),
    "parquet, dictionary": Format(seeds.parquet_dictionary, rows_in("rows.parquet")),
    "saved dataset": Format(seeds.saved, rows_in("rows"), "rows/*", "json"),
    "zip": Format(seeds.zip_of_pictures, read_zip, "images.zip", proof="whole"),
    "zip, rewritten": Format(seeds.zip_of_pictures, read_zip, "images.zip", "zip"),
    "folder": Format(seeds.folder_of_pictures, read_folder, "images/*", "jpeg"),
    "jpeg": Format(seeds.turned_jpeg, read_picture, kind="jpeg"),
    "jpeg, progressive": Format(seeds.picture("JPEG", progressive=True), read_picture, kind="jpeg"),
    "jpeg, cmyk": Format(seeds.picture("JPEG", "CMYK"), read_picture, kind="jpeg"),
    "mpo": Format(seeds.mpo, read_picture, kind="jpeg"),
    "png": Format(seeds.picture("PNG"), read_picture, kind="png"),
    "png, palette": Format(seeds.picture("PNG", "P", transparency=0), read_picture, kind="png"),
    "webp": Format(seeds.picture("WEBP"), read_picture),
    "webp, lossless": Format(seeds.picture("WEBP", "RGBA", lossless=True), read_picture),
    "gif": Format(seeds.gif, read_picture),
    "bmp": Format(seeds.picture("BMP"), read_picture),
    "tiff": Format(seeds.picture("TIFF"), read_picture, kind="tiff"),
    "tiff, deflate": Format(seeds.picture("TIFF", compression="tiff_deflate"), read_picture, kind="tiff"),
    "tiff, float": Format(seeds.picture("TIFF", "F"), read_picture, kind="tiff"),
    "ppm": Format(seeds.picture("PPM"), read_picture),
    "avif": Format(seeds.picture("AVIF"), read_picture),
    "pth": Format(seeds.pth, read_weights, "*.pth", "zip"),
    "pth, experts": Format(seeds.pth_moe, read_weights, "*.pth", "zip"),
    "pth, legacy": Format(seeds.pth_legacy, read_weights, "*.pth"),
    "pth, description": Format(seeds.pth, read_weights, "*.json", "json"),
    "safetensors": Format(seeds.safetensors, read_weights, kind="safetensors"),
    "hf": Format(seeds.hf, read_whole_model, "model/*.safetensors", "safetensors"),
    "hf, json": Format(seeds.hf, read_whole_model, "model/*.json", "json"),
    "gguf": Format(seeds.gguf, read_whole_model, "model/*.gguf", "gguf"),
    "gguf, head": Format(seeds.gguf, read_gguf_head, "model/*.gguf", "gguf"),
    "tower": Format(seeds.tower, read_tower, "vision/*.safetensors", "safetensors"),
    "tower, json": Format(seeds.tower, read_tower, "vision/*.json", "json"),
    "tokenizer": Format(seeds.tokenizer_file, read_words, kind="json"),
    "yaml": Format(seeds.configuration, read_configuration, kind="yaml"),
    "set": Format(seeds.settings, read_settings, kind="yaml"),
    "states": Format(seeds.states, read_states, proof="pieces"),
    "run report": Format(seeds.run_records, read_run_report, "pretrain_vlm_512/*.json*", "json"),
    "run notes": Format(seeds.run_records, read_run_notes, "pretrain_vlm_512/*", "json"),
    "held out": Format(seeds.held_out, read_held_out, "held_out.json", "json", "whole"),
    "receipt": Format(seeds.receipt, read_receipt, ".mmv-download/*", "json"),
    "token store": Format(seeds.token_store, read_tokens, "*.bin", proof="pieces"),
    "feature store": Format(seeds.feature_store, read_features, proof="pieces"),
}
