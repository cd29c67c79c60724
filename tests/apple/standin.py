"""A stand-in for Apple's GPU: tensors that say they are on `mps`, whose numbers a CPU works out.

It refuses what the real one refuses: operators that torch's own table of operators gives no MPS kernel to, float64,
and copies that overlap. Complex numbers, attention in one call and the parts that are written for CPUs and CUDA it
refuses as well, since the package means to do without them there. What Apple's kernels compute it cannot tell.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import cache
from importlib.resources import files
from typing import Any
from unittest import mock

import torch
import yaml
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

from minimind_v.core.model.vlm import VLM

MPS = torch.device("mps", 0)
WIDE = (torch.float64, torch.complex64, torch.complex128)
# A tensor on the CPU may meet one on the GPU where it is a number, an index, or copied.
COPIES = ("aten::_to_copy", "aten::copy_")
INDEXING = ("aten::index.Tensor", "aten::index_put_", "aten::index_put", "aten::_index_put_impl_")


class OnApple(torch.Tensor):
    """A tensor on the GPU; `inner` is where its numbers really are."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> OnApple:
        tensor = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device="cpu",  # for autograd, which has no thread for a GPU that is not there
        )  # fmt: skip
        tensor.inner = inner
        return tensor

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return MPS

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnApple({self.inner})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class _Factories(TorchDispatchMode):
    """What is made on the GPU of nothing, and what is copied to it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class _Moves(TorchFunctionMode):
    """What moves tensors, since torch itself takes those that say `mps` for the CPU's."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = pytree.tree_map(_numbered, (args, kwargs or {}))
        if func is torch.tensor and kwargs.get("device") == MPS:
            return func(*args, **(kwargs | {"device": "cpu"})).to(MPS)
        if func in (torch.Tensor.cpu, torch.Tensor.tolist, torch.Tensor.numpy) and isinstance(args[0], OnApple):
            on_cpu = torch.ops.aten._to_copy.default(args[0], device=torch.device("cpu"))
            return on_cpu if func is torch.Tensor.cpu else func(on_cpu, *args[1:], **kwargs)
        if func is torch.Tensor.to and isinstance(args[0], OnApple):
            device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args[1:], **_without_copy(kwargs))
            if device is not None and device.type == "cpu":
                return torch.ops.aten._to_copy.default(args[0], dtype=dtype or args[0].dtype, device=device)
            return args[0] if dtype is None else func(args[0], dtype, non_blocking, **kwargs)
        before, _within[0] = _within[0], any(isinstance(leaf, OnApple) for leaf in pytree.tree_leaves(args))
        try:
            return func(*args, **kwargs)
        finally:
            _within[0] = before


# Whether torch works at something that is on the GPU: what it makes beside it, and believes to be on the CPU, is too.
_within = [False]


def _numbered(leaf: Any) -> Any:
    """`mps` is `mps:0`: to find that out torch would ask a driver."""
    return MPS if isinstance(leaf, torch.device) and leaf.type == "mps" else leaf


def _without_copy(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if name != "copy"}


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """One operator."""
    leaves = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    any_apple = any(isinstance(leaf, OnApple) for leaf in leaves)
    asked = kwargs.get("device")
    moved = func._schema.name == "aten::_to_copy"
    target = (
        torch.device(asked).type if asked is not None and (moved or not any_apple) else "mps" if any_apple else "cpu"
    )
    if not any_apple and target != "mps":
        result = func(*args, **kwargs)
        return pytree.tree_map_only(torch.Tensor, OnApple, result) if _within[0] and not leaves else result
    name = func._schema.name + (f".{func._schema.overload_name}" if func._schema.overload_name else "")
    assert "scaled_dot_product" not in name, f"{name}: attention in one call"
    _check(name, leaves, kwargs)
    copied_out = func._schema.name == "aten::copy_" and not isinstance(args[0], OnApple)
    plain_args, plain_kwargs = pytree.tree_map_only(OnApple, lambda leaf: leaf.inner, (args, kwargs))
    if asked is not None:
        plain_kwargs["device"] = torch.device("cpu")
    result = func(*plain_args, **plain_kwargs)
    if target == "cpu" or copied_out:
        return args[0] if copied_out else result
    for leaf in pytree.tree_leaves(result):
        assert not isinstance(leaf, torch.Tensor) or leaf.dtype not in WIDE, f"{name} makes {leaf.dtype} on MPS"
    wrapped = pytree.tree_map_only(torch.Tensor, OnApple, result)
    return return_and_correct_aliasing(func, args, kwargs, wrapped) if any_apple else wrapped


def _check(name: str, leaves: list[torch.Tensor], kwargs: dict[str, Any]) -> None:
    assert not kwargs.get("non_blocking"), f"{name}: an overlapping copy"
    assert name in kernels(), f"{name} has no kernel on MPS"
    if name.partition(".")[0] not in COPIES:
        strangers = [leaf for leaf in leaves if not isinstance(leaf, OnApple) and leaf.ndim]
        assert not strangers or name in INDEXING, f"{name}: {[leaf.shape for leaf in strangers]} on the CPU"


@cache
def kernels() -> set[str]:
    """The operators that MPS has, by torch's table of them."""
    text = (files("torchgen") / "packaged/ATen/native/native_functions.yaml").read_text()
    table = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # the one in Python takes ten seconds
    by_name = {entry["func"].partition("(")[0]: entry for entry in table}

    def has(entry: dict[str, Any]) -> bool:
        if entry.get("structured_delegate"):
            return has(by_name[entry["structured_delegate"]])
        keys = ", ".join(entry.get("dispatch", {})).split(", ")
        return "MPS" in keys or any(key.startswith("CompositeExplicit") for key in keys)

    return {f"aten::{name}" for name, entry in by_name.items() if has(entry)}


def _no_grad(_: bool) -> torch.no_grad:
    return torch.no_grad()


@contextlib.contextmanager
def apple_gpu() -> Iterator[None]:
    """While this lasts, torch finds Apple's GPU, and nothing else."""
    apply = VLM._apply

    def moved(model: VLM, *args: Any, **kwargs: Any) -> VLM:
        apply(model, *args, **kwargs)
        model.lm_head.weight = model.model.embed_tokens.weight  # a real device keeps them one
        return model

    with (
        mock.patch.object(torch.__future__, "_overwrite_module_params_on_conversion", True),
        mock.patch.object(torch._C, "_InferenceMode", _no_grad),  # of such tensors there are no views
        mock.patch.object(torch.backends.mps, "is_available", return_value=True),
        mock.patch.object(torch.backends.mps, "is_macos_or_newer", return_value=False),
        mock.patch.object(torch.mps, "synchronize"),
        mock.patch.object(VLM, "_apply", moved),
        _Factories(),
        _Moves(),
    ):
        yield
