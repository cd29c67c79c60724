"""Read transformers folders as weights with the published names, without running code from the folder.

Two kinds: a LLaVA or an LFM2-VL without custom code, as `mmv convert --to hf` and transformers save it; and the
published layout, whose `config.json` names custom code (`auto_map`) and whose tensors have the published names. Weights
are one file, or shards with an index.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from minimind_v.core.config.schema import TextConfig
from minimind_v.core.data.tokenizer import Tokenizer
from minimind_v.core.errors import UsageError, WeightsError
from minimind_v.core.files import object_in, read_json
from minimind_v.core.formats.hf import lfm2_names as lfm2
from minimind_v.core.formats.hf.differences import refuse_other_classes, refuse_other_settings
from minimind_v.core.formats.hf.names import EMBEDDING, HEAD, TEXT, TOWER, from_llava, module_name
from minimind_v.core.formats.tensor_files import read_tensors
from minimind_v.core.hub.sources import META
from minimind_v.core.wording import plural

VISION = "vision_encoder."
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # each may be split, with `….index.json` beside
# Other names in the published configurations.
_OLD_NAMES = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "hidden_dim": "intermediate_size",
    "norm_eps": "rms_norm_eps",
    "max_seq_len": "max_position_embeddings",
    "num_experts": "n_routed_experts",
    "router_aux_loss_coef": "aux_loss_alpha",
}
# Names below which transformers may put the modules of a whole model.
_WHOLE = re.compile(r"^(.*?\.)??(?=(vision_proj|vision_encoder|lm_head)\.)")
_DECODER = re.compile(r"^(.*?\.)??((model|language_model)\.)+(?=(embed_tokens|layers|norm)\.)")


def is_export(folder: Path) -> bool:
    """Whether a folder is of a class of transformers without custom code: it has its own vision tower and tokenizer."""
    return (read_json(folder / "config.json") or {}).get("model_type") in ("llava", lfm2.MODEL_TYPE)


def read_folder(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors under the published names, and their description: `model`, and `stage` where the folder names it.

    Raises WeightsError with the next step where the folder is of another kind, or lacks a file.
    """
    files = weight_files(folder)
    config = read_json(folder / "config.json")
    if config is None:
        raise WeightsError(f"{folder / 'config.json'} is missing — download the folder again")
    if config.get("model_type") in ("llava", lfm2.MODEL_TYPE):
        refuse_other_classes(folder, config)
        return (_read_llava if config["model_type"] == "llava" else _read_lfm2)(folder, files, config)
    sizes = {_OLD_NAMES.get(name, name): value for name, value in config.items() if value is not None}
    if sizes.get("use_moe") is True and "moe_intermediate_size" in sizes:
        sizes["intermediate_size"] = sizes["moe_intermediate_size"]
    tensors = {_published_name(name): tensor for name, tensor in _read_all(files, ())[0].items()}
    if f"model.{EMBEDDING}" in tensors or HEAD in tensors:  # else it is no language model
        refuse_other_settings(folder, config)
    return tensors, {"model": sizes}


def _published_name(name: str) -> str:
    """The name of a tensor in the `.pth`, from its name in a folder."""
    if match := _WHOLE.match(name):
        return name[match.end() :]
    return _DECODER.sub("model.", name, count=1)


def weight_files(folder: Path) -> list[Path]:
    """The file, or the shards, of a folder's weights. Raises WeightsError where there are none, or one is missing."""
    for name in WEIGHTS:
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.is_file():
            shards = (read_json(index) or {}).get("weight_map")
            if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
                raise WeightsError(f"{index}: names no files — download the folder again")
            if outside := [shard for shard in shards.values() if not _is_name(shard)]:
                raise WeightsError(f"{index}: {outside[0]!r} is not a file in the folder — download the folder again")
            files = [folder / shard for shard in sorted(set(shards.values()))]
            for file in files:
                if not file.is_file():
                    raise WeightsError(f"{file} (part of the weights) is missing — download the folder again")
            return files
    if (folder / "config.json").is_file():
        raise WeightsError(f"{folder}: has a config.json but no weights ({' or '.join(WEIGHTS)}) — download it again")
    raise WeightsError(f"{folder}: a folder, not a weights file — name a .pth or .safetensors")


def _is_name(text: str) -> bool:
    """Whether a text is the name of a file in a folder, not a path that leaves it."""
    return bool(text) and text not in (".", "..") and not set(text) & set("/\\\0:")


def _read_all(files: list[Path], without: tuple[str, ...]) -> tuple[dict[str, Tensor], dict[str, str]]:
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for file in files:
        shard, description = read_tensors(file, without)
        tensors |= shard
        metadata |= description
    return tensors, metadata


def _read_llava(folder: Path, files: list[Path], config: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    saved, metadata = _read_all(files, ("vision_tower.", TOWER))
    tensors = {module_name(name): tensor for name, tensor in saved.items()}
    try:
        model = _text_sizes(config)
        _refuse_lost_tokens(folder, tensors, model["vocab_size"])
        return from_llava(tensors, TextConfig(**model)), {"stage": _stage_of(metadata), "model": model}
    except KeyError as error:
        raise WeightsError(f"{folder}: {error.args[0]} is missing — convert or download it again") from None
    except (UsageError, ValueError, TypeError, IndexError, RuntimeError) as error:
        raise WeightsError(f"{folder}: config.json does not match the weights ({error}) — convert it again") from None


def _read_lfm2(folder: Path, files: list[Path], config: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors, metadata = _read_all(files, (TOWER,))
    try:
        published = lfm2.from_lfm2(tensors)
    except KeyError as error:
        raise WeightsError(f"{folder}: {error.args[0]} is missing — convert or download it again") from None
    return published, {"stage": _stage_of(metadata), "model": lfm2.described_sizes(config)}


def _refuse_lost_tokens(folder: Path, tensors: Mapping[str, Tensor], vocab_size: int) -> None:
    """Raises WeightsError where tokens were added after the image token: only the rows before it are kept.

    Rows without a token in the folder's tokenizer are padding.
    """
    rows = max((len(tensors[name]) for name in (TEXT + EMBEDDING, HEAD) if name in tensors), default=0)
    if rows <= vocab_size + 1 or not (folder / "tokenizer.json").is_file():
        return
    ids = Tokenizer.load(folder).backend.get_vocab()
    if added := sorted(token for token, id in ids.items() if id >= vocab_size):
        raise WeightsError(
            f"{folder}: its tokenizer has {plural(len(added), 'token')} after the image token "
            f"({', '.join(added[:3])}): their rows of the embedding would be lost — train with a tokenizer that "
            f"contains them and with --set model.vocab_size={vocab_size + len(added)}, then convert"
        )


def _text_sizes(config: dict[str, Any]) -> dict[str, Any]:
    """The sizes in a LLaVA's configuration, by the names of TextConfig."""
    text = object_in(config, "text_config")
    rope = object_in(text, "rope_parameters")
    sizes = {name: text[name] for name in TextConfig.__dataclass_fields__ if text.get(name) is not None}
    sizes |= {
        "rope_theta": rope.get("rope_theta", text.get("rope_theta", 10000.0)),
        # The image token ends the vocabulary; further training may add padding after it.
        "vocab_size": config.get("image_token_id", config.get("image_token_index")),
    }
    if text.get("model_type") == "granitemoeshared":
        sizes |= {
            "use_moe": True,
            "n_routed_experts": text.get("num_local_experts"),
            "aux_loss_alpha": text.get("router_aux_loss_coef", TextConfig.aux_loss_alpha),
            "n_shared_experts": (text.get("shared_intermediate_size") or 0) // max(text.get("intermediate_size", 1), 1),
        }
    return sizes


def _stage_of(metadata: dict[str, str]) -> str | None:
    try:
        return json.loads(metadata[META])["stage"]
    except (KeyError, ValueError, TypeError):
        return None
