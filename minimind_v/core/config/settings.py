"""Settings from YAML by dotted key; reading is limited by the file's size, also for hostile files.

PyYAML parses the text; the tree is walked here, so that every refusal names its key and its line, and so that aliases,
which let two kilobytes stand for a billion values, are counted as what they stand for. No tag makes an object. A date
is a text: no key has one.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from minimind_v.core.errors import MissingInput, UsageError, unusable

MOST_BYTES = 1 << 18  # of a file; a complete configuration has 2 kB
MOST_KEYS = 10_000
DEEPEST = 20  # mappings in mappings
LONGEST_NUMBER = 40  # characters; a longer one stays a text, which no key of a number takes
_TAG = "tag:yaml.org,2002:"
_DATE = f"{_TAG}timestamp"


@dataclass(frozen=True)
class Setting:
    """A value of a file, and the line that it stands in."""

    key: str
    value: Any
    line: int


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {  # noqa: RUF012 — PyYAML's own way
        first: [(tag, pattern) for tag, pattern in rules if tag != _DATE]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def is_settings(name: str) -> bool:
    """Whether a name is that of a YAML file."""
    return name.endswith((".yaml", ".yml"))


def read_settings(path: Path) -> dict[str, Any]:
    """The values of a YAML file by dotted key. Raises MissingInput for no file, UsageError for one that is no YAML."""
    settings: dict[str, Any] = {}
    for setting in _settings(path):
        if setting.key in settings:
            raise UsageError(f"{path}:{setting.line}: {setting.key} is given twice — keep one of them")
        settings[setting.key] = setting.value
    return settings


def parse_value(text: str, where: str) -> Any:
    """The value of `--set key=value`, Written where it is a list or a mapping. Raises UsageError."""
    if len(text) > MOST_BYTES:
        raise UsageError(f"{where}: {len(text):,} characters; the maximum is {MOST_BYTES:,}")
    try:
        node = yaml.compose(text, Loader=_Loader)
        return None if node is None else _value(node, where, text)
    except (yaml.YAMLError, RecursionError):
        raise UsageError(f"{where}: the value is not YAML") from None


def _settings(path: Path) -> list[Setting]:
    text = read_yaml_text(path)
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        problem = str(error.problem or error.context)
        advice = " — write spaces in place of the tab" if r"'\t'" in problem else ""
        raise UsageError(f"{path}{line}: not YAML ({problem}){advice}") from None
    except yaml.YAMLError as error:
        raise UsageError(f"{path}: not YAML ({error})") from None
    except RecursionError:
        raise UsageError(f"{path}: not readable YAML (nested deeper than {DEEPEST} levels)") from None
    if node is None:
        return []
    if not node.tag.startswith(_TAG) or "/" in node.tag.removeprefix(_TAG):
        raise UsageError(
            f"{path}:{node.start_mark.line + 1}: the YAML tag {node.tag} is not supported — use plain values"
        )
    if not isinstance(node, yaml.MappingNode):
        raise UsageError(f"{path}: not a mapping of keys to values")
    return _Walk(path, text).mapping(node, "", 0)


def limit_tree(path: Path, node: yaml.Node) -> None:
    """Raises UsageError for a tree that is too deep or too large, what an alias stands for counted each time."""
    _Walk(path, "").limit(node, 0)


def read_yaml_text(path: Path) -> str:
    """The text of a YAML file of a usual size. Raises MissingInput or UsageError."""
    if not path.is_file():
        raise MissingInput(f"no configuration file {path}")
    with path.open("rb") as file:
        raw = file.read(MOST_BYTES + 1)
    if len(raw) > MOST_BYTES:
        raise UsageError(f"{path}: {path.stat().st_size:,} bytes; a configuration has at most {MOST_BYTES:,}")
    wide = raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))  # as PowerShell writes text
    try:
        text = raw.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise UsageError(f"{path}:{line}: not YAML (the text is not UTF-8) — save the file as UTF-8") from None
    if odd := yaml.reader.Reader.NON_PRINTABLE.search(text):
        line = text.count("\n", 0, odd.start()) + 1
        raise UsageError(f"{path}:{line}: not YAML (it contains the character U+{ord(odd[0]):04X}) — remove it")
    return text


class _Walk:
    """From the tree of one file to its settings; what an alias stands for is counted each time."""

    def __init__(self, path: Path, text: str) -> None:
        self.path, self.text, self.keys = path, text, 0

    def mapping(self, node: yaml.MappingNode, prefix: str, depth: int) -> list[Setting]:
        """The settings below a mapping. Those that are merged into it (`<<`) do not replace its own."""
        own: list[Setting] = []
        merged: list[Setting] = []
        names: set[str] = set()
        for key_node, value in node.value:
            self._count(key_node, prefix, depth)
            if key_node.tag == f"{_TAG}merge":
                merged += self._merged(value, prefix, depth)
                continue
            name = self._name(key_node, prefix)
            names.add(name)
            if isinstance(value, yaml.MappingNode) and value.tag == f"{_TAG}map":
                own += self.mapping(value, f"{name}.", depth + 1)
            else:
                own.append(Setting(name, _value(value, self._at(value, name), self.text), value.start_mark.line + 1))
        first = {setting.key: setting for setting in reversed(merged)}
        return own + [setting for key, setting in first.items() if not names & set(_beginnings(key))]

    def limit(self, node: yaml.Node, depth: int) -> None:
        """Count a node and all below it."""
        self._count(node, "", depth)
        if isinstance(node, yaml.CollectionNode):
            for entry in node.value:
                for inner in entry if isinstance(entry, tuple) else (entry,):
                    self.limit(inner, depth + 1)

    def _merged(self, node: yaml.Node, prefix: str, depth: int) -> list[Setting]:
        sources = node.value if isinstance(node, yaml.SequenceNode) else [node]
        settings: list[Setting] = []
        for source in sources:
            self._count(source, prefix, depth)
            if not isinstance(source, yaml.MappingNode):
                raise UsageError(f"{self._at(source, prefix + '<<')}: only a mapping of keys can be merged")
            settings += self.mapping(source, prefix, depth + 1)
        return settings

    def _name(self, node: yaml.Node, prefix: str) -> str:
        if not isinstance(node, yaml.ScalarNode):
            raise UsageError(
                f"{self._at(node, prefix or 'the top level')}: a key must be text, not a list or a mapping"
            )
        return f"{prefix}{node.value}"

    def _count(self, node: yaml.Node, prefix: str, depth: int) -> None:
        self.keys += 1
        where = self._at(node, prefix.rstrip(".") or "the top level")
        if depth > DEEPEST:
            raise UsageError(f"{where}: nested deeper than {DEEPEST} levels, or an alias of itself")
        if self.keys > MOST_KEYS:
            raise UsageError(f"{where}: more than {MOST_KEYS:,} keys, aliases included")

    def _at(self, node: yaml.Node, key: str) -> str:
        return f"{self.path}:{node.start_mark.line + 1}: {key}"


def _beginnings(key: str) -> Iterator[str]:
    """`a.b.c`, `a.b`, `a`."""
    while key:
        yield key
        key = key.rpartition(".")[0]


def _value(node: yaml.Node, where: str, text: str) -> Any:
    """The value of a scalar; a list or a mapping becomes a Written of its part of `text`."""
    if not isinstance(node, yaml.ScalarNode) and node.tag in (f"{_TAG}seq", f"{_TAG}map"):
        return Written(text[node.start_mark.index : node.end_mark.index])
    kind = node.tag.removeprefix(_TAG)
    try:
        if not isinstance(node, yaml.ScalarNode):
            raise ValueError
        if kind == "null":
            return None
        if kind == "bool":
            return yaml.SafeLoader.bool_values[node.value.lower()]
        if kind in ("int", "float"):
            return _number(node, kind)
        if kind in ("str", "value", "merge"):
            if trouble := unusable(node.value):
                raise UsageError(f"{where} {trouble}: {node.value!r}")
            return node.value
    except (ValueError, KeyError, IndexError):
        pass
    shown = repr(node.value) if isinstance(node, yaml.ScalarNode) else "a list or a mapping"
    raise UsageError(f"{where}: {shown} with the tag {node.tag} is not supported — write a plain value")


def _number(node: yaml.ScalarNode, kind: str) -> int | float | str:
    if len(node.value) > LONGEST_NUMBER:
        return str(node.value)
    make = yaml.constructor.SafeConstructor()
    number = make.construct_yaml_int(node) if kind == "int" else make.construct_yaml_float(node)
    too_large = kind == "float" and abs(number) == float("inf") and "inf" not in node.value.lower()
    return str(node.value) if too_large else number


class Written:
    """A list or a mapping as it is written: no key takes one."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text
