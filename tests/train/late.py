"""Steps as on a GPU, computed by a CPU: its branches of the code, and a mode that refuses what a GPU waits for."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from minimind_v.core.config.schema import DataConfig, RunConfig
from minimind_v.core.data.batch import Batch
from minimind_v.core.data.feature_cache import FeatureCache, FeatureEncoder
from minimind_v.core.model.kernels import cuda_moe
from minimind_v.core.model.kernels.accelerate import accelerate
from minimind_v.core.model.loss import IGNORE, supervised
from minimind_v.core.model.vlm import VLM
from minimind_v.core.train.distributed import ALONE, World
from minimind_v.core.train.graph import StepGraphs
from minimind_v.core.train.step import TrainStep
from tests.model.conftest import NORMED, NORMED_EXPERTS, PLACEHOLDER_ID, SPEC, tiny_vlm

MODELS = {
    "small": {},
    "moe": {"use_moe": True},
    "3v": NORMED | {"projector": "mlp"},
    "3v-moe": NORMED_EXPERTS | {"projector": "mlp"},
}
POLICIES = {"pretrain": "projector+last", "sft": "all"}
P = SPEC.tokens_per_image
# Operators and methods whose result a host needs before it can go on. On a CPU they cost nothing.
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "bincount", "_unique2", "repeat_interleave"}
READING = {Tensor.tolist, Tensor.numpy, Tensor.cpu}  # of which a CPU's dispatcher does not hear


class _Operators(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put", "index_put_", "_index_put_impl_") else ()
        waits = name in WAITING or any(index is not None and index.dtype == torch.bool for index in indices)
        assert not waits, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


class _Methods(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        assert func not in READING, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


@contextmanager
def no_waits():
    """Fails where a GPU would have to answer first."""
    with _Operators(), _Methods():
        yield


def make_batch(lengths: list[int], images: list[int], answers: list[int], pixels: bool = False) -> Batch:
    """Rows of these lengths with so many images at the beginning and so many supervised tokens at the end."""
    columns, longest = torch.arange(max(lengths)), max(lengths)
    ends, begins = torch.tensor(lengths)[:, None], torch.tensor(images)[:, None] * P
    ids = torch.randint(6, 61, (len(lengths), longest))
    image_mask = columns < begins
    ids[image_mask] = PLACEHOLDER_ID
    labels = torch.where((columns < ends) & (columns >= ends - torch.tensor(answers)[:, None]), ids, IGNORE)
    positions = image_mask.flatten().nonzero()[:, 0]
    pictures = torch.randint(0, 256, (sum(images), 3, SPEC.image_size, SPEC.image_size), dtype=torch.uint8)
    features = torch.randn(sum(images), P, SPEC.width)
    supervised_positions, targets = supervised(labels)
    return Batch(
        ids, columns < ends, labels, image_mask, pictures if pixels and sum(images) else None,
        features if sum(images) and not pixels else None, keys=[b""] * sum(images), image_positions=positions,
        supervised_positions=supervised_positions, targets=targets,
    )  # fmt: skip


def make_config(model: VLM, tmp_path, **options) -> RunConfig:
    given = {"stage": "sft", "dtype": "float32", "device": "cpu", "save_every": 0} | options
    return RunConfig(model=model.config, data=DataConfig(batch_size=2, workers=0), out=tmp_path, **given)


def make_step(tmp_path, kind: str = "small", freeze: str = "all", seed: int = 0, **options) -> TrainStep:
    """A step of a model with the kernels of a GPU, whose micro-batches stay whole as there."""
    model = tiny_vlm(seed, with_tower=True, **MODELS[kind]).train()
    accelerate(model, torch.device("cuda"))
    config = make_config(model, tmp_path, freeze=freeze, **options)
    train_step = TrainStep(config, model, FeatureCache(FeatureEncoder(model.vision_encoder, model.device, "float32")))
    train_step.divisible = False
    return train_step


def group_experts(monkeypatch) -> None:
    """Compute experts as on a GPU whose torch multiplies them in one kernel."""

    def one_hot(chosen: Tensor, classes: int) -> Tensor:
        """`F.one_hot`, which reads its input on a CPU only."""
        return (chosen[..., None] == torch.arange(classes)).long()

    monkeypatch.setattr(cuda_moe, "is_grouped", lambda x, *widths: True)
    monkeypatch.setattr(F, "one_hot", one_hot)


def tensors_of(train_step: TrainStep) -> dict[str, torch.Tensor]:
    """Copies of all that a step changes."""
    named = dict(train_step.model.named_parameters())
    return {
        f"{name}.{key}": tensor.detach().clone()
        for name, parameter in named.items()
        for key, tensor in {"": parameter, **train_step.optimiser.state.get(parameter, {})}.items()
    }


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Whether two such copies are equal to the bit."""
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


class Tape(TorchDispatchMode):
    """Notes torch's operators and repeats them on the same tensors, as a CUDA graph does.

    No number is complex: rotations of real ones are what a compiler turns into few kernels.
    """

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        assert not any(isinstance(leaf, Tensor) and leaf.is_complex() for leaf in pytree.tree_leaves(result))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    @torch.no_grad()
    def replay(self):
        for func, args, kwargs, result in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(pytree.tree_leaves(result), pytree.tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                    old.copy_(new)  # else a view, or in place


class Tapes:
    """Records with tapes. To record is not to do: what the work changes is put back."""

    def __init__(self, changed: Callable[[], list[Tensor]]):
        self.changed, self.made, self.replayed = changed, 0, 0
        self.spoil = lambda tape: None

    def __call__(self, work, device, pool):
        tape, changed = Tape(), self.changed()
        before = [tensor.clone() for tensor in changed]
        with no_waits(), tape:
            work()
        with torch.no_grad():
            for tensor, copy in zip(changed, before, strict=True):
                tensor.copy_(copy)
        self.spoil(tape)
        self.made += 1

        def replay():
            self.replayed += 1
            tape.replay()

        return replay


def record_steps(train_step: TrainStep, warn: Callable[[str], None], world: World = ALONE) -> Tapes:
    """Let a step use recordings, as on a GPU; with other processes, as on several."""

    def changed() -> list[Tensor]:
        moments = [tensor for state in train_step.optimiser.state.values() for tensor in state.values()]
        graphs = train_step.graphs
        results = graphs._share_of_loss, graphs._correct, graphs._norm, graphs._skipped
        return [*(weight.detach() for weight in graphs.trainable), *moments, *graphs._gradients.views, *results]

    tapes = Tapes(changed)
    train_step.late, train_step.world = True, world
    train_step.graphs = StepGraphs(train_step.config, train_step.model, train_step.optimiser, tapes, warn, world)
    return tapes
