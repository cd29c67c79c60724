"""The words that identifiers must not use, read from docs/glossary.md, and where the code uses them.

`python -m tests.glossary` lists every place.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from tests.structure import PACKAGE, ROOT, modules

PAGE = ROOT / "docs" / "glossary.md"


def forbidden_words(page: str) -> dict[str, str]:
    """Each word of the column `not` with what to say instead; from the table of the section `## Words in code`.

    Only what stands in backticks counts: a whole identifier, or a pattern of one, as `word_*`.
    """
    section = re.split(r"^## ", page.split("## Words in code", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")][2:]
    return {word: say.strip() for say, instead_of in rows for word in re.findall(r"`([^`]+)`", instead_of)}


def identifiers(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Every name that a module gives to a class, a function, an argument, a variable or an attribute, with its line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr, node.lineno


def misnamed(root: Path, words: dict[str, str]) -> list[tuple[str, str]]:
    """The identifiers that use a forbidden word: the module of each, and a complaint `file:line: name …`."""
    return [
        (module.name, f"{module.at(line)}: {name}: say {say} instead of {word}")
        for module in modules(root)
        for name, line in identifiers(module.tree)
        for word, say in words.items()
        if fnmatchcase(name.lstrip("_"), word)
    ]


def package_of(module: str) -> str:
    """The folder of a module below the package or its `core`; `.` for a module that is in neither's folders."""
    first, _, rest = module.removeprefix("core/").partition("/")
    return first if rest else "."


if __name__ == "__main__":
    complaints = misnamed(PACKAGE, forbidden_words(PAGE.read_text(encoding="utf-8")))
    print(*(complaint for _, complaint in complaints), sep="\n")
    print(dict(sorted(Counter(package_of(module) for module, _ in complaints).items())))
