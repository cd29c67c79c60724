"""Check the arguments of the Python interface by their annotations, so that a wrong type ends as one line."""

from __future__ import annotations

import functools
import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from os import PathLike
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from minimind_v.core.errors import UsageError, unusable

P = ParamSpec("P")
R = TypeVar("R")

NAMES: dict[Any, str] = {
    str: "a text",
    Path: "a path",
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    type(None): "None",
}


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """Raise UsageError where an argument is not of the type of its annotation.

    Arguments that do not exist are a TypeError, as everywhere in Python.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            arguments = signature.bind(*args, **kwargs).arguments
        except TypeError:
            return function(*args, **kwargs)  # its own message names it
        check_arguments(function, arguments)
        return function(*args, **kwargs)

    return call


def check_arguments(function: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    """Raise UsageError for an argument, by name, that is not of the type of its annotation.

    Numbers may be numpy's. Types of images, and whatever else a class or a sequence of one does not express, are not
    checked: their readers do that.
    """
    for name, value in arguments.items():
        kinds = _kinds(function).get(name, ())
        if kinds and not any(_is(value, kind) for kind in kinds):
            names = list(map(_name, kinds))
            choice = ", ".join(names[:-1]) + " or " * (len(names) > 1) + names[-1]
            shown = repr(value) if isinstance(value, str | bytes | int | float | None) else type(value).__name__
            raise UsageError(f"{name} must be {choice}, not {shown}")
        if Path in kinds and value == "":
            raise UsageError(f"{name} is empty — name a file or a folder")
        if Path in kinds and (trouble := unusable(str(value))):
            raise UsageError(f"{name} {trouble}: {str(value)!r}")


@functools.cache
def _kinds(function: Callable[..., Any]) -> dict[str, tuple[Any, ...]]:
    """The types that each argument may have; none for an annotation that is not checked."""
    kinds = {}
    for name, hint in typing.get_type_hints(function).items():
        is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
        union = typing.get_args(hint) if is_union else (hint,)
        kinds[name] = union if all(map(_is_plain, union)) else ()
    return kinds


def _is_plain(kind: Any) -> bool:
    """Whether a type is a class, or a sequence of one."""
    if typing.get_origin(kind) is Sequence:
        (kind,) = typing.get_args(kind)
    return kind is not Any and typing.get_origin(kind) is None and isinstance(kind, type)


def _is(value: Any, kind: Any) -> bool:
    if typing.get_origin(kind) is Sequence:
        (kind,) = typing.get_args(kind)
        return isinstance(value, Sequence) and not isinstance(value, str) and all(_is(item, kind) for item in value)
    if kind in (int, float):
        return isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
    return isinstance(value, PathLike if kind is Path else kind)


def _name(kind: Any) -> str:
    if typing.get_origin(kind) is Sequence:
        (kind,) = typing.get_args(kind)
        return f"a list of {_name(kind).removeprefix('a ')}s"
    return NAMES.get(kind, f"a {kind.__name__}")
