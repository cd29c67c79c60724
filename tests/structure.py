"""Checks of how the package is built: its floors, imports, functions and tree.

`python -m tests.structure` updates the tree in docs/architecture.md. Each check takes the folder of a package and
returns complaints, one line each: `file:line: what is wrong`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE, PAGE = ROOT / "minimind_v", ROOT / "docs" / "architecture.md"
LONGEST_FUNCTION = 60
PRINTING = ("cli", "serve")


@dataclass(frozen=True)
class Module:
    """A module of the package, named by its path below it: `core/rows/row`; a package by its folder: `core/rows`."""

    root: Path
    path: Path

    @cached_property
    def name(self) -> str:
        path_parts = self.path.relative_to(self.root).with_suffix("").parts
        return "/".join(path_parts[:-1] if path_parts[-1] == "__init__" and len(path_parts) > 1 else path_parts)

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.path.read_text(encoding="utf-8"))

    def at(self, line: int) -> str:
        return f"{self.root.name}/{self.path.relative_to(self.root)}:{line}"


@dataclass(frozen=True)
class Import:
    """One module that imports another, both by name, and the line that does; a line inside a function counts too."""

    importer: str
    imported: str
    at: str


@cache
def modules(root: Path) -> list[Module]:
    return [Module(root, path) for path in sorted(root.rglob("*.py"))]


@cache
def imports(root: Path) -> list[Import]:
    """All imports inside the package, also those in functions and for types; not those of the package's version."""
    names = {module.name for module in modules(root)}
    return [
        Import(module.name, imported, module.at(line))
        for module in modules(root)
        for imported, line in _imported(module, names)
        if imported != module.name
    ]


def _imported(module: Module, names: set[str]) -> Iterator[tuple[str, int]]:
    """The names of the package's modules that a module imports, each with its line."""
    package = module.root.name
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            dotted = [alias.name for alias in node.names if alias.name.startswith(f"{package}.")]
        elif isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith(f"{package}."):
            dotted = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for full_name in dotted:
            path = full_name.removeprefix(f"{package}.").replace(".", "/")
            if path != "__version__":
                yield next((name for name in (path, path.rpartition("/")[0]) if name in names), "__init__"), node.lineno


# --- floors -----------------------------------------------------------------------------------------------------------


def floors(page: str) -> list[str]:
    """The floors that a page lists in its block `floors`, highest first."""
    (block,) = re.findall(r"```floors\n(.*?)```", page, re.DOTALL)
    return [line.split()[0] for line in block.splitlines()]


def floor_of(module: str, names: list[str]) -> str:
    """The floor that a module belongs to: its first folder, or itself; what the list does not name is `ground`."""
    first = module.removeprefix("core/").split("/")[0]
    return first if first in names else "ground"


def upward_imports(root: Path, names: list[str]) -> list[str]:
    """Imports of a floor above one's own."""
    complaints = []
    for line in imports(root):
        below, above = floor_of(line.importer, names), floor_of(line.imported, names)
        if names.index(below) > names.index(above):
            complaints.append(f"{line.at}: {below} is below {above}: {line.importer} must not import {line.imported}")
    return complaints


def imports_between(root: Path, importer: str, imported: list[str]) -> list[str]:
    """Imports of the packages `imported` by the package `importer`."""
    return [
        f"{line.at}: {line.importer} must not import {line.imported}"
        for line in imports(root)
        if line.importer.startswith(f"{importer}/") and any(f"{line.imported}/".startswith(f"{n}/") for n in imported)
    ]


def circles(root: Path) -> list[set[str]]:
    """The sets of modules that import each other, directly or through others."""
    graph: dict[str, set[str]] = {module.name: set() for module in modules(root)}
    for line in imports(root):
        graph[line.importer].add(line.imported)
    below = {name: _reachable(graph, name) for name in graph}
    sets = ({other for other in below[name] if name in below[other]} for name in graph)
    return [set(names) for names in sorted({tuple(sorted(names)) for names in sets if names})]


def _reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    """What a module imports, directly or through others."""
    names: set[str] = set()
    queue = [start]
    while queue:
        new = graph[queue.pop()] - names
        names |= new
        queue += new
    return names


# --- modules and functions --------------------------------------------------------------------------------------------


def prints(root: Path) -> list[str]:
    """Calls of `print` outside the packages that talk to people."""
    return [
        f"{module.at(node.lineno)}: only {' and '.join(PRINTING)} print"
        for module in modules(root)
        if floor_of(module.name, list(PRINTING)) == "ground"
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]


def without_purpose(root: Path) -> list[str]:
    """Modules whose docstring does not begin with a line about their purpose; an empty file needs none."""
    return [
        f"{module.at(1)}: the first line must say what the module is"
        for module in modules(root)
        if module.tree.body and not (ast.get_docstring(module.tree) or "").strip()
    ]


def long_functions(root: Path, allowed: dict[str, int]) -> list[str]:
    """Functions longer than 60 lines, or than what `allowed` gives for `module:function`."""
    complaints = []
    for module in modules(root):
        for node in ast.walk(module.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                lines = node.end_lineno - node.lineno + 1
                most = allowed.get(f"{module.name}:{node.name}", LONGEST_FUNCTION)
                if lines > most:
                    complaints.append(f"{module.at(node.lineno)}: {node.name} has {lines} lines, more than {most}")
    return complaints


# --- the tree that the page draws -------------------------------------------------------------------------------------

_TREE = re.compile(r"```tree\n(.*?)```", re.DOTALL)
_ITEM = re.compile(r"(\w+)((?: \([^)]*\))?)")


@dataclass
class Folder:
    """A folder as the page draws it: its own line, and its modules, each with what the page says behind it."""

    name: str
    line: str
    items: dict[str, str]


def drawn_folders(page: str) -> list[Folder]:
    """The folders of a page's block `tree`.

    A folder is a line that begins with `name/`, two spaces deeper than its parent; below it lines of modules, parted by
    ` · `, each with an explanation in parentheses behind it or none.
    """
    (block,) = _TREE.findall(page)
    folders: list[Folder] = []
    above: list[str] = []
    for line in block.splitlines():
        text = line.strip()
        if re.match(r"\w+/", text):
            above = [*above[: (len(line) - len(line.lstrip())) // 2], text.split("/")[0]]
            folders.append(Folder("/".join(above[1:]), line, {}))
        else:
            folders[-1].items |= dict(_ITEM.findall(text))
    return folders


def real_folders(root: Path) -> dict[str, list[str]]:
    """The package's folders, each with its modules; `__init__` only where it holds something."""
    folders: dict[str, list[str]] = {}
    for path in sorted(root.rglob("*.py")):
        names = folders.setdefault(str(path.parent.relative_to(root)).removeprefix("."), [])
        if path.stem != "__init__" or path.stat().st_size:
            names.append(path.stem)
    return folders


def tree_differences(root: Path, page: str) -> list[str]:
    """What the page's tree has and the package has not, and the other way round."""
    drawn = {f"{folder.name}/{item}" for folder in drawn_folders(page) for item in ["", *folder.items]}
    real = {f"{name}/{item}" for name, items in real_folders(root).items() for item in ["", *items]}
    return [f"{name} is not in the tree of docs/architecture.md" for name in sorted(real - drawn)] + [
        f"{name} of docs/architecture.md does not exist" for name in sorted(drawn - real)
    ]


def redrawn(root: Path, page: str) -> str:
    """The page with the modules of its tree as they are; new ones come last, new folders at the end."""
    folders, real = drawn_folders(page), real_folders(root)
    depth = {name: 2 * (name.count("/") + 1) for name in real if name} | {"": 0}
    drawn = {folder.name for folder in folders}
    new = [Folder(name, f"{' ' * depth[name]}{name.split('/')[-1]}/", {}) for name in real]
    lines = []
    for folder in [*folders, *(folder for folder in new if folder.name not in drawn)]:
        if folder.name in real:
            names = [*(n for n in folder.items if n in real[folder.name])]
            names += [n for n in real[folder.name] if n not in names]
            lines += [folder.line, *_filled([n + folder.items.get(n, "") for n in names], depth[folder.name] + 4)]
    return _TREE.sub(lambda match: "```tree\n" + "".join(f"{line}\n" for line in lines) + "```", page)


def _filled(items: list[str], indent: int) -> list[str]:
    """Lines of at most 120 characters that hold the items."""
    lines: list[str] = []
    for item in items:
        if lines and len(lines[-1]) + len(item) + 3 <= 118:
            lines[-1] += f" · {item}"
        else:
            if lines:
                lines[-1] += " ·"
            lines.append(" " * indent + item)
    return lines


if __name__ == "__main__":
    PAGE.write_text(redrawn(PACKAGE, PAGE.read_text(encoding="utf-8")), encoding="utf-8")
