"""Build modules without random initial weights, because the weights come from a file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.overrides import TorchFunctionMode


class NoInit(TorchFunctionMode):
    """Inside, torch's random initialisations do nothing: the values of a module are undefined until it is loaded."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":  # some functions have none
            return given["tensor"] if "tensor" in given else args[0]
        return func(*args, **given)
