"""Build a validated RunConfig from a recipe, a YAML file and `key=value` overrides; write it as YAML."""

from __future__ import annotations

import math
import os
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from minimind_v.core.config.presets import PRESETS, weights_name
from minimind_v.core.config.recipes import OWN_KEYS, RECIPES
from minimind_v.core.config.schema import DataConfig, RunConfig, usual_workers
from minimind_v.core.config.settings import parse_value, read_settings
from minimind_v.core.errors import UsageError, nearest, unusable
from minimind_v.core.hub.sources import METADATA, ROWS, dataset_files
from minimind_v.core.paths import DATASET_DIR, SAMPLE_DIR, STANDARD_PRESET

# Options of the command line that are not named as their configuration key.
FLAG_KEYS = {
    "data": "data.file",
    "split": "data.split",
    "images": "data.images",
    "tokenizer": "data.tokenizer",
    "batch_size": "data.batch_size",
    "max_length": "data.max_length",
    "workers": "data.workers",
}
AUTO = "auto"  # in place of a batch size: the largest that fits in memory


@dataclass(frozen=True)
class Resolved:
    """A configuration, and the source of each of its values."""

    config: RunConfig
    sources: dict[str, str]
    auto: bool = False  # the batch size is not chosen yet: that of `config` gives the rows of a step


def build_config(
    stage: str, yaml_file: Path | None = None, options: Mapping[str, Any] | None = None, sets: Iterable[str] = ()
) -> RunConfig:
    """The configuration of `resolve`."""
    return resolve(stage, yaml_file, options, sets).config


def resolve(
    stage: str, yaml_file: Path | None = None, options: Mapping[str, Any] | None = None, sets: Iterable[str] = ()
) -> Resolved:
    """The stage's recipe, changed by the YAML file, then by options (flag → value; None: not given), then by sets.

    The keys of YAML and sets are those of RunConfig, nested ones dotted (`data.batch_size`, which may be `auto`),
    `preset` and `recipe`; `train.` before a key of the run itself may be left out. A recipe that an option or a set
    names also replaces what the YAML file says of the keys that this recipe is made of. Rows of another file than the
    recipe's have their pictures in the zip beside it, or none, unless a key names them.
    Raises UsageError naming the key, with the nearest one that exists.
    """
    changes, sources = _collect(yaml_file, options or {}, sets)
    name = _recipe_name(stage, changes.pop("recipe", stage))
    own = OWN_KEYS.get(name, set())
    if sources.get("recipe", str(yaml_file)) != str(yaml_file):  # an option or a set named it
        for key in [key for key in own if sources.get(key) == str(yaml_file)]:
            changes.pop(AUTO if key == "data.batch_size" else key, None)
            changes.pop(key, None)
            del sources[key]
    auto = changes.pop(AUTO, False)
    if isinstance(changes.get("data.file"), str | Path):
        changes["data.file"] = published_file(Path(changes["data.file"]), stage)
        if "data.images" not in changes:
            changes["data.images"] = images_beside(changes["data.file"])
            sources["data.images"] = "found beside data.file"
    if "eval_data" in changes and "eval_images" not in changes and changes["eval_data"]:
        changes["eval_images"] = images_beside(Path(changes["eval_data"]))
        sources["eval_images"] = "found beside eval_data"
    preset = changes.pop("preset", STANDARD_PRESET)
    if not isinstance(preset, str) or preset not in PRESETS:
        raise UsageError(f"preset {preset!r} must be one of {', '.join(PRESETS)}{nearest(str(preset), PRESETS)}")
    if (yaml_stage := changes.pop("stage", stage)) != stage:
        raise UsageError(f"the configuration is for stage {yaml_stage}, the command for {stage} — use one of the two")
    # The model comes first: the recipe names its files after its size.
    recipe = RECIPES[name]
    sizes = {key: value for key, value in changes.items() if key.startswith("model.")}
    files = {key: f"{source}: " for key, source in sources.items() if source == str(yaml_file)}
    if "model.hidden_size" in sizes:
        sizes.setdefault("model.intermediate_size", 0)
    sized = recipe(_change(recipe(PRESETS[preset]), sizes, files).model)
    config = _change(sized, {key: value for key, value in changes.items() if key not in sizes}, files)
    if "data.file" not in changes and (data := _find_data(config)) != config.data:
        config = replace(config, data=data)
        sources |= dict.fromkeys(("data.file", "data.images"), "found on disk")
    if "init" not in changes and (init := _find_init(config)) != config.init:
        config, sources["init"] = replace(config, init=init), "found on disk"
    if "data.workers" not in sources:
        config = replace(config, data=replace(config.data, workers=usual_workers(config.gpus)))
    given = f"preset {preset}" + (f", {sources['preset']}" if "preset" in sources else "")
    default = {key: given if key.startswith("model.") else f"recipe {stage}" for key in _keys(config, "")}
    default |= dict.fromkeys(own | {"init", "out"} if own else (), f"recipe {name}")
    default["data.workers"] = "this machine's cores"
    del default["stage"]  # the command itself
    return Resolved(config, default | {key: source for key, source in sources.items() if key in default}, auto)


def _recipe_name(stage: str, name: Any) -> str:
    """The name of a recipe, if it is one for this stage. Raises UsageError."""
    if not isinstance(name, str) or name not in RECIPES:
        raise UsageError(f"recipe {name!r} must be one of {', '.join(RECIPES)}{nearest(str(name), RECIPES)}")
    if (meant := RECIPES[name]().stage) != stage:
        raise UsageError(f"recipe {name} is for {meant} — run `mmv train {meant} --recipe {name}`")
    return name


def _collect(
    yaml_file: Path | None, options: Mapping[str, Any], sets: Iterable[str]
) -> tuple[dict[str, Any], dict[str, str]]:
    """All given values, the last for each key, and their sources."""
    changes: dict[str, Any] = {}
    sources: dict[str, str] = {}

    def put(key: str, value: Any, source: str) -> None:
        key = key.strip().removeprefix("train.")
        if key == "data.batch_size":
            changes[AUTO] = value == AUTO
        if not (key == "data.batch_size" and value == AUTO):  # `auto` keeps the number that was given before
            changes[key] = value
        sources[key] = source

    for key, value in (read_settings(yaml_file) if yaml_file else {}).items():
        put(key, value, str(yaml_file))
    for flag, value in options.items():
        if value is not None:
            put(FLAG_KEYS.get(flag, flag), value, f"--{flag.replace('_', '-')}")
    for item in sets:
        key, equals, value = item.partition("=")
        if not equals:
            raise UsageError(f"--set {item!r} must have the form key=value")
        put(key, parse_value(value, f"--set {item!r}"), "--set")
    return changes, sources


def published_file(path: Path, stage: str) -> Path:
    """The stage's rows in a folder that `mmv download dataset` filled; any other path as it is."""
    return next(iter(_published_files(path, stage)), path)


def _published_files(folder: Path, stage: str) -> list[Path]:
    """The files of the first published layout of the stage's rows that a folder has; none without one."""
    layouts = ([folder / file.name for file in files] for files in dataset_files(stage))
    return next((paths for paths in layouts if all(map(os.path.isfile, paths))), [])


def images_beside(data: Path) -> Path | None:
    """The pictures that stand beside a file of rows, if any.

    `x_images.zip`, the folder `x_images` or `x_images.tar` beside `x_data.jsonl` (or another ending, with or without
    `_data`), as published data has it; of a `metadata.…` its own folder.
    """
    data = data if data.name not in ("", "..") else data.resolve()
    if not data.name:  # the root
        return None
    ending = next((ending for ending in ROWS if data.name.endswith(ending)), "")
    stem = data.with_name(data.name.removesuffix(ending).removesuffix("_data") + "_images")
    paths = (stem.with_name(stem.name + ".zip"), stem, stem.with_name(stem.name + ".tar"))
    of_metadata = data.parent if data.name in METADATA and os.path.isfile(data) else None
    return next((path for path in paths if os.path.exists(path)), of_metadata)  # of any name, also one too long


def to_yaml(config: RunConfig, sources: Mapping[str, str] | None = None) -> str:
    """A configuration as YAML that `--config` reads back to the same; with sources, each value's as a comment."""
    return "".join(_yaml_lines(as_settings(config), sources or {}))


def _yaml_lines(tree: Mapping[str, Any], sources: Mapping[str, str], prefix: str = "") -> Iterator[str]:
    for key, value in tree.items():
        indent = "  " * prefix.count(".")
        if isinstance(value, dict):
            yield f"{indent}{key}:\n"
            yield from _yaml_lines(value, sources, f"{prefix}{key}.")
            continue
        line = yaml.safe_dump({key: value}, allow_unicode=True, width=10**9).rstrip("\n").replace("\n", "\n" + indent)
        source = " ".join(sources.get(prefix + key, "").split())
        yield f"{indent + line:<46}  # {source}\n" if source and "\n" not in line else f"{indent}{line}\n"


def as_settings(config: RunConfig) -> dict[str, Any]:
    """A configuration as dicts, texts and numbers."""
    return asdict(config, dict_factory=lambda items: {key: _as_text(value) for key, value in items})


def _find_data(config: RunConfig) -> DataConfig:
    """The stage's data in the layout of its download; else a sample."""
    if config.data.file.is_file():
        return config.data
    for folder in (DATASET_DIR, SAMPLE_DIR):
        if paths := _published_files(folder, config.stage):
            return replace(config.data, file=paths[0], images=paths[1] if len(paths) > 1 else None)
    return config.data


def _find_init(config: RunConfig) -> Path | None:
    """The weights of the stage before, in the run's folder or the standard one; `llm_` is an old name of `lm_`.

    A recipe that starts from fine-tuned weights accepts pretrained ones too, but not the weights that the run writes.
    """
    if config.init is None:
        return None
    name, folders = config.init.name, (config.out, config.init.parent)
    names = (name, f"l{name}") if name.startswith("lm_") else (name,)
    paths = [folder / name for folder in folders for name in names]
    if name == weights_name("sft", config.model):
        paths += [folder / weights_name("pretrain", config.model) for folder in folders]
    own = (config.out / weights_name(config.stage, config.model)).resolve()
    return next((path for path in paths if path.is_file() and path.resolve() != own), config.init)


def _change(config: Any, changes: Mapping[str, Any], files: Mapping[str, str], prefix: str = "") -> Any:
    """A configuration with some keys changed; `files` names the file that gave a key. Raises UsageError."""
    hints = typing.get_type_hints(type(config))
    names = {item.name for item in fields(config)}
    values: dict[str, Any] = {}
    nested: dict[str, dict[str, Any]] = {}
    for key, value in changes.items():
        name, dot, rest = key.partition(".")
        source = files.get(prefix + key, "")
        if name not in names or bool(dot) != is_dataclass(getattr(config, name)):
            near = nearest(prefix + key, _keys(config, prefix))
            raise UsageError(f"{source}unknown configuration key {prefix + key or repr('')}{near}")
        if dot:
            nested.setdefault(name, {})[rest] = value
        else:
            values[name] = _coerce(prefix + name, value, hints[name], source)
    for name, inner in nested.items():
        values[name] = _change(getattr(config, name), inner, files, f"{prefix}{name}.")
    try:
        return replace(config, **values)
    except UsageError as error:
        flags = {name: rf"(?<!\w)({name}|{name.replace('_', '-')})(?![\w-])" for name in values}
        named = (files.get(prefix + name, "") for name, flag in flags.items() if re.search(flag, str(error)))
        raise UsageError(f"{next(filter(None, named), '')}{error}") from None


def _keys(config: Any, prefix: str) -> list[str]:
    names = []
    for item in fields(config):
        value = getattr(config, item.name)
        names += _keys(value, f"{prefix}{item.name}.") if is_dataclass(value) else [prefix + item.name]
    return [*names, "preset", "recipe"]


def _coerce(key: str, value: Any, hint: Any, source: str = "") -> Any:
    """A value of YAML or of an option in the type of the field. Raises UsageError."""
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in kinds:
        return None
    kind = next(k for k in kinds if k is not type(None))
    if kind in (str, Path) and isinstance(value, str | Path):
        if trouble := unusable(str(value)):
            raise UsageError(f"{source}{key} {trouble}: {str(value)!r}")
        if kind is Path or isinstance(value, str):
            return kind(value)
    number = _as_number(value) if kind in (int, float) else None
    if kind is bool and isinstance(value, bool):
        return value
    if kind is float and number is not None:
        return float(number)
    if kind is int and number is not None and (isinstance(number, int) or number.is_integer()):
        return int(number)
    raise UsageError(f"{source}{key} must be of type {kind.__name__}, not {value!r}")


def _as_number(value: Any) -> int | float | None:
    """A number, also one that YAML reads as a text (1e-6); None for all else, and for one that is too large (1e400)."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value if abs(value) < 2**1000 else None
    try:
        number = float(value) if isinstance(value, str | float) else None
    except ValueError:
        return None
    too_large = isinstance(value, str) and number is not None and math.isinf(number) and "inf" not in value.lower()
    return None if too_large else number


def _as_text(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value
