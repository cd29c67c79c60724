"""A digest of source code that is the same where only comments, docstrings or messages differ."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

REPORTING = {"message", "warning", "warn", "say", "info"}  # functions whose texts decide nothing


def source_digest(files: Iterable[Path]) -> str:
    """The digest of what these files of Python compute, under every version of Python the same.

    Docstrings and the texts of errors and reports count as absent; the names of variables count.
    """
    digest = hashlib.blake2b(digest_size=8)
    for file in files:
        pieces: list[str] = []
        _add_pieces(pieces, ast.parse(file.read_bytes()), True)
        digest.update(" ".join(pieces).encode())
    return digest.hexdigest()


def _add_pieces(pieces: list[str], node: ast.AST, text: bool) -> None:
    """Add a syntax tree: types of nodes, names and values; without `text` no strings."""
    if not text and (isinstance(node, ast.JoinedStr) or isinstance(getattr(node, "value", None), str)):
        return
    if isinstance(node, ast.Expr):
        if isinstance(node.value, ast.Constant):  # a docstring
            return
        text = not _reports(node.value)
    elif isinstance(node, ast.Raise | ast.Assert):
        text = False
    pieces.append(type(node).__name__)
    for name in node._fields:
        value = getattr(node, name, None)
        for item in value if type(value) is list else (value,):
            if isinstance(item, ast.expr_context) or item is None:
                continue
            if isinstance(item, ast.AST):
                _add_pieces(pieces, item, text)
            else:
                pieces.append(f"{name}={item!r}")
    pieces.append(".")


def _reports(call: ast.expr) -> bool:
    """Whether an expression only reports a text."""
    if not isinstance(call, ast.Call):
        return False
    name: Any = getattr(call.func, "attr", None) or getattr(call.func, "id", None)
    return name in REPORTING
