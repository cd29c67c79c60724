"""MiniMind-V: train, understand and use a tiny vision-language model.

`import minimind_v as mmv` costs milliseconds: each name below is imported, and torch with it, when it is first used.
"""

from __future__ import annotations

from minimind_v.core.version import __version__

TYPE_CHECKING = False  # so read by mypy and editors; the module `typing` itself takes longer to import than this one
if TYPE_CHECKING:
    from typing import Any

    from minimind_v.api import Conversation, Evaluation, LoadedVLM, config, evaluate, load, train
    from minimind_v.core.config.schema import RunConfig
    from minimind_v.core.data.processor import Processor
    from minimind_v.core.errors import MmvError
    from minimind_v.core.model.vlm import VLM
    from minimind_v.core.train.run import Summary

_MODULES = {
    "load": "api",
    "LoadedVLM": "api",
    "Conversation": "api",
    "config": "api",
    "train": "api",
    "evaluate": "api",
    "Evaluation": "api",
    "Processor": "core.data.processor",
    "RunConfig": "core.config.schema",
    "Summary": "core.train.run",
    "VLM": "core.model.vlm",
    "MmvError": "core.errors",
}

__all__ = [
    "VLM",
    "Conversation",
    "Evaluation",
    "LoadedVLM",
    "MmvError",
    "Processor",
    "RunConfig",
    "Summary",
    "__version__",
    "config",
    "evaluate",
    "load",
    "train",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module 'minimind_v' has no attribute {name!r}")
    from importlib import import_module

    value = globals()[name] = getattr(import_module(f"minimind_v.{_MODULES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return __all__
