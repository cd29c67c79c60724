"""Weights files: reading them safely, knowing what they are, and loading them with a receipt.

A checkpoint is a flat state dict in half precision without `vision_encoder.*`, under the published names, as `.pth`
or `.safetensors`. What a file cannot say of itself (the number of attention heads, the stage) stands in a small JSON
beside it, or in the safetensors header; where that is absent, sizes are inferred from the tensors.
"""

from __future__ import annotations

import codecs
import json
import pickle
import re
import textwrap
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

from minimind_v.core.config.presets import PRESETS
from minimind_v.core.config.schema import TextConfig
from minimind_v.core.errors import MissingInput, RunError, UsageError, WeightsError
from minimind_v.core.files import write_atomically, write_text

PROJECTOR = "vision_proj."
VISION = "vision_encoder."
# Buffers that older versions of the published model saved and that are computed today.
_OLD_BUFFERS = re.compile(r"(\.|^)(mask|pos_cis|freqs_cos|freqs_sin|inv_freq)$")
_WRAPPERS = re.compile(r"^(module\.|_orig_mod\.)+")  # DistributedDataParallel, torch.compile
# What the shapes of tensors tell for certain, so that no description may say otherwise.
_SHAPED = ("hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size", "use_moe")
_SHAPED_EXPERTS = ("n_routed_experts", "n_shared_experts")
# What changes what weights compute, and no shape.
_UNSHAPED = ("num_attention_heads", "num_key_value_heads", "rope_theta", "rms_norm_eps")


@dataclass(frozen=True)
class Checkpoint:
    """A weights file in memory."""

    path: Path
    tensors: dict[str, Tensor]
    config: TextConfig
    stage: str  # lm, pretrain, sft or unknown
    ignored: list[str]  # names that were left out: old buffers, the vision encoder
    guessed: bool  # true where the sizes were inferred from the tensors alone

    @property
    def vision_width(self) -> int | None:
        """Width of the features its projector takes; None for a text-only base."""
        weight = self.tensors.get("vision_proj.vision_proj.0.weight")
        return None if weight is None or weight.ndim != 2 else weight.shape[1]

    @property
    def parameters(self) -> int:
        """Number of parameters, the tied head counted once."""
        return sum(tensor.numel() for name, tensor in self.tensors.items() if name != "lm_head.weight")


@dataclass
class Receipt:
    """What happened to every tensor of a load."""

    source: str
    loaded: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)  # not in the file, and meant to be initialised
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    wrong_shape: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        counts = [f"{len(self.loaded)} tensors loaded"]
        for name in ("new", "missing", "unexpected", "wrong_shape", "ignored"):
            if found := getattr(self, name):
                shown = ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
                counts.append(f"{len(found)} {name.replace('_', ' ')} ({shown})")
        return f"{self.source}: " + "; ".join(counts)


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a `.pth` or `.safetensors` file, whichever it really is.

    Raises MissingInput, or WeightsError with a line for each way in which a file can be wrong.
    """
    if path.is_dir():
        raise WeightsError(f"{path}: a folder, not a weights file — name the .pth or .safetensors in it")
    if not path.is_file():
        raise MissingInput(f"no weights at {path}")
    tensors, meta = _read_safetensors(path) if _sniff(path) == "safetensors" else (_read_pth(path), _read_beside(path))
    tensors = {_WRAPPERS.sub("", name): tensor for name, tensor in tensors.items()}
    ignored = sorted(name for name in tensors if name.startswith(VISION) or _OLD_BUFFERS.search(name))
    tensors = {name: tensor for name, tensor in tensors.items() if name not in set(ignored)}
    for name, tensor in tensors.items():
        _check_numbers(path, name, tensor)
    config, guessed = _config_of(path, meta, infer_config(path, tensors)), not meta
    stage = str(meta.get("stage") or _stage_of(path, tensors))
    return Checkpoint(path, tensors, config, stage, ignored, guessed)


def _sniff(path: Path) -> str:
    """Tell what a file is by its first bytes; refuse what is no weights file."""
    with path.open("rb") as file:
        head = file.read(512)
    if not head:
        raise WeightsError(f"{path}: the file is empty — download it again")
    if head[8:9] == b"{":  # first of all: the length before it may begin with the byte of a pickle
        return "safetensors"
    if head[:4] == b"PK\x03\x04" or head[:1] == b"\x80":
        return "pth"
    text = head.removeprefix(codecs.BOM_UTF8).lstrip()
    if text.startswith(b"<"):
        raise WeightsError(
            f"{path}: this is an HTML page, not weights — a link to the file's page was saved "
            f"(`/blob/` in the address); take the `/resolve/` address, or `mmv download`"
        )
    if text.startswith(b"version https://git-lfs"):
        raise WeightsError(
            f"{path}: this is a git-lfs pointer, not the weights — run `git lfs pull`, or `mmv download`"
        )
    raise WeightsError(f"{path}: neither a torch nor a safetensors file — download it again")


def _read_pth(path: Path) -> dict[str, Tensor]:
    try:
        # A file, not its name: torch goes by the ending of a name. Its warnings are about files that are refused here.
        with path.open("rb") as file, warnings.catch_warnings(action="ignore"):
            found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's reader raises a dozen kinds on damaged files
        raise WeightsError(f"{path}: {_why_unreadable(error)}") from None
    for key in ("state_dict", "model"):
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in found.items()
    ):
        raise WeightsError(
            f"{path}: holds no state dict (names and tensors), so it is not a weights file of this model"
        )
    return dict(found)


def _why_unreadable(error: Exception) -> str:
    """Why torch would not read a file, and what to do about it."""
    reason = str(error)
    if named := re.search(r"GLOBAL ([\w.]+)", reason):
        return (
            f"the file wants to run code when it is opened ({named[1]}), so it was not opened — "
            f"a weights file holds tensors only; get it from a source that you trust"
        )
    if isinstance(error, pickle.UnpicklingError):
        return (
            "damaged, or no plain file of tensors, whose opening could run code, so it was not opened — "
            "download it again, from a source that you trust"
        )
    first = textwrap.shorten((reason or type(error).__name__).splitlines()[0], 100, placeholder=" …")
    return f"truncated or damaged ({first}) — download it again"


def _check_numbers(path: Path, name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point() or tensor.layout is not torch.strided or tensor.is_meta:
        kind = str(tensor.dtype if tensor.layout is torch.strided else tensor.layout).removeprefix("torch.")
        raise WeightsError(
            f"{path}: {name} does not hold plain floating-point numbers ({kind}); quantised weights cannot be read"
        )
    numbers = tensor.half() if tensor.element_size() == 1 else tensor  # torch cannot test 8-bit floats
    if not bool(numbers.isfinite().all()):
        raise WeightsError(f"{path}: {name} holds NaN or infinite values — this file cannot be used")


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as file:
            meta = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError, ValueError) as error:
        raise WeightsError(f"{path}: truncated or damaged ({error}) — download it again") from None
    return tensors, _parse_meta(path, meta["minimind_v"]) if "minimind_v" in meta else {}


def _read_beside(path: Path) -> dict[str, Any]:
    beside = path.with_suffix(".json")
    return _parse_meta(beside, beside.read_bytes()) if beside.is_file() else {}


def _parse_meta(path: Path, text: str | bytes) -> dict[str, Any]:
    try:
        meta = json.loads(text)
    except ValueError:  # neither JSON nor, perhaps, text
        raise WeightsError(f"{path}: the description of the weights is not JSON — delete it and try again") from None
    return meta if isinstance(meta, dict) and isinstance(meta.get("model"), dict) else {}


def infer_config(path: Path, tensors: Mapping[str, Tensor]) -> TextConfig:
    """Sizes of the language model, from the shapes of its tensors.

    Shapes do not tell the number of heads; all published models have two key-value heads, so two are taken.
    Raises WeightsError where the tensors are not those of a MiniMind model.
    """
    try:
        vocab, hidden = tensors["model.embed_tokens.weight"].shape
        kv_width = tensors["model.layers.0.self_attn.k_proj.weight"].shape[0]
        moe = "model.layers.0.mlp.gate.weight" in tensors
        ff = "model.layers.0.mlp." + ("experts.0." if moe else "") + "gate_proj.weight"
        intermediate = tensors[ff].shape[0]
        kv_heads = 2
        return TextConfig(
            hidden_size=hidden,
            num_hidden_layers=_count_layers(tensors),
            num_attention_heads=max(1, hidden * kv_heads // kv_width),
            num_key_value_heads=kv_heads,
            intermediate_size=intermediate,
            vocab_size=vocab,
            **(_count_experts(tensors) if moe else {}),
        )
    except (KeyError, ValueError, IndexError, ZeroDivisionError, UsageError):
        some = ", ".join(sorted(tensors)[:3]) or "nothing"
        raise WeightsError(f"{path}: not the weights of a MiniMind model (it holds {some} …)") from None


def _count_layers(tensors: Mapping[str, Tensor]) -> int:
    numbers = {int(name.split(".")[2]) for name in tensors if re.match(r"model\.layers\.\d+\.", name)}
    if numbers != set(range(len(numbers))):
        raise ValueError("layers are missing")
    return len(numbers)


def _count_experts(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    routed = tensors["model.layers.0.mlp.gate.weight"].shape[0]
    shared = {name.split(".")[5] for name in tensors if name.startswith("model.layers.0.mlp.shared_experts.")}
    return {
        "use_moe": True,
        "n_routed_experts": routed,
        "n_shared_experts": len(shared),
        "num_experts_per_tok": min(TextConfig.num_experts_per_tok, routed),
    }


def _config_of(path: Path, meta: dict[str, Any], inferred: TextConfig) -> TextConfig:
    """The described sizes, where there is a description. Raises WeightsError where it is one of other weights."""
    known = {item.name for item in fields(TextConfig)}
    told = {name: value for name, value in meta.get("model", {}).items() if name in known}
    try:
        config = TextConfig(**(asdict(inferred) | told))
        wrong = [
            f"{name} {getattr(config, name)}, not {getattr(inferred, name)}"
            for name in (*_SHAPED, *(_SHAPED_EXPERTS if inferred.use_moe else ()))
            if getattr(config, name) != getattr(inferred, name)
        ]
        if config.num_key_value_heads * config.head_dim != inferred.num_key_value_heads * inferred.head_dim:
            wrong.append("heads of another width")
    except (TypeError, UsageError) as error:
        wrong = [str(error)]
    if wrong:
        raise WeightsError(
            f"{path}: its description tells of other weights ({'; '.join(wrong)}) — "
            f"is {path.with_suffix('.json').name} that of an older file?"
        )
    return config


def _stage_of(path: Path, tensors: Mapping[str, Tensor]) -> str:
    if not any(name.startswith(PROJECTOR) for name in tensors):
        return "lm"
    return next((stage for stage in ("pretrain", "sft") if path.name.startswith(stage)), "unknown")


def name_preset(config: TextConfig) -> str | None:
    """The preset of exactly these sizes, if there is one."""
    return next((name for name, preset in PRESETS.items() if preset == config), None)


def load_into(model: nn.Module, checkpoint: Checkpoint, new_projector: bool = False) -> Receipt:
    """Copy a checkpoint into a model, strictly.

    With `new_projector` a text-only base may lack exactly the projector's tensors, which then keep their fresh values.
    Raises WeightsError with the receipt, and the preset that would fit, where anything else is missing, unexpected or
    of another shape.
    """
    wanted = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(VISION)}
    given = dict(checkpoint.tensors)
    if "lm_head.weight" not in given and "model.embed_tokens.weight" in given:
        given["lm_head.weight"] = given["model.embed_tokens.weight"]  # tied
    receipt = Receipt(str(checkpoint.path), ignored=checkpoint.ignored)
    absent = [name for name in wanted if name not in given]
    projector = [name for name in wanted if name.startswith(PROJECTOR)]
    if new_projector and absent == projector:
        receipt.new = projector
    else:
        receipt.missing = absent
    for name, tensor in given.items():
        if name not in wanted:
            receipt.unexpected.append(name)
        elif tensor.shape != wanted[name].shape:
            receipt.wrong_shape.append(f"{name} {list(tensor.shape)} for {list(wanted[name].shape)}")
        else:
            receipt.loaded.append(name)
    config = getattr(model, "config", checkpoint.config)
    if receipt.missing or receipt.unexpected or receipt.wrong_shape:
        raise WeightsError(f"the weights do not fit. {receipt}{_advice(checkpoint, receipt, config)}")
    for name in _UNSHAPED:
        told = getattr(checkpoint.config, name)
        if not checkpoint.guessed and told != getattr(config, name):
            raise WeightsError(
                f"{checkpoint.path} was trained with {name} {told}, the model has {getattr(config, name)} — "
                f"say --set model.{name}={told}"
            )
    if not torch.equal(given["lm_head.weight"], given["model.embed_tokens.weight"]):
        raise WeightsError(f"{checkpoint.path}: lm_head.weight and model.embed_tokens.weight differ, but must be tied")
    model.load_state_dict({name: given[name] for name in receipt.loaded}, strict=False)
    return receipt


def _advice(checkpoint: Checkpoint, receipt: Receipt, config: TextConfig) -> str:
    trouble = receipt.missing + receipt.unexpected + receipt.wrong_shape
    if all(name.startswith(PROJECTOR) for name in trouble):
        if checkpoint.vision_width is None:
            return " — this is a text-only base without a projector; `mmv train pretrain` makes one"
        return (
            f" — it was trained with a vision model whose features are {checkpoint.vision_width} wide (--vision-model)"
        )
    preset = name_preset(checkpoint.config)
    if checkpoint.config == config:
        return ""
    if preset:
        return f" — its sizes are those of --preset {preset}"
    return f" — its sizes are {checkpoint.config.hidden_size} × {checkpoint.config.num_hidden_layers} layers"


def export_tensors(model: nn.Module, dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
    """The tensors of a checkpoint under their published names: no vision encoder; tied tensors stay one.

    Raises RunError where a weight does not fit in the type.
    """
    cast: dict[int, Tensor] = {}
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name.startswith(VISION):
            continue
        if tensor.data_ptr() not in cast:
            cast[tensor.data_ptr()] = tensor.detach().to("cpu", dtype, copy=True).contiguous()
            if not bool(cast[tensor.data_ptr()].isfinite().all()):
                raise RunError(
                    f"{name} does not fit in {str(dtype).removeprefix('torch.')}: it holds NaN or too large values"
                )
        tensors[name] = cast[tensor.data_ptr()]
    return tensors


def write_checkpoint(path: Path, tensors: Mapping[str, Tensor], config: TextConfig, stage: str) -> None:
    """Write a `.pth` (with a JSON beside it) or a `.safetensors` (which carries it inside), atomically."""
    meta = json.dumps({"stage": stage, "model": asdict(config)}, indent=1)
    if path.suffix == ".safetensors":
        # The format knows neither shared storage nor strides.
        apart = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
        data = save_safetensors(apart, metadata={"format": "pt", "minimind_v": meta})
        write_atomically(path, lambda file: file.write(data))
        return

    def write(file: BinaryIO) -> None:
        torch.save(dict(tensors), file)
        file.flush()  # there is room for the weights: only now may their description change
        write_text(path.with_suffix(".json"), meta + "\n")

    write_atomically(path, write)
