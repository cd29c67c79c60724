"""The same tensors in another file: `.pth` and `.safetensors`, both ways, read back and compared."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from minimind_v.core.errors import RunError
from minimind_v.core.files import only_writer
from minimind_v.core.formats.checkpoint import read_checkpoint, write_checkpoint
from minimind_v.core.formats.tensor_files import cast
from minimind_v.core.outputs import check_weights


@dataclass(frozen=True)
class Conversion:
    """What was written, and how far it is from its source."""

    path: Path
    tensors: int
    bytes: int
    difference: float  # largest absolute difference of a weight, 0 unless the type was changed


def convert(source: Path, target: Path, to: str, dtype: str | None = None, overwrite: bool = False) -> Conversion:
    """Write `source` as `to` (pth or safetensors), in `dtype` or as it is.

    Raises MissingInput, WeightsError, UsageError where the target is in the way, RunError where it cannot be written.
    """
    check_weights(target, source, to, overwrite)
    with only_writer(target):
        check_weights(target, source, to, overwrite)  # another run may have written it meanwhile
        return _convert(source, target, dtype)


def _convert(source: Path, target: Path, dtype: str | None) -> Conversion:
    checkpoint = read_checkpoint(source)
    tensors = checkpoint.tensors
    if dtype is not None:
        tensors = {name: cast(name, tensor, dtype) for name, tensor in tensors.items()}
    write_checkpoint(target, tensors, checkpoint.model_config, checkpoint.stage, checkpoint.companions)
    again = read_checkpoint(target)
    if again.tensors.keys() != tensors.keys() or again.model_config != checkpoint.model_config:
        raise RunError(f"{target}: reads back with other tensors or sizes than were written")
    difference = max(
        float((tensor.double() - again.tensors[name].double()).abs().max())
        for name, tensor in checkpoint.tensors.items()
    )
    if dtype is None and difference:
        raise RunError(f"{target}: reads back with values that differ by {difference:g}")
    return Conversion(target, len(tensors), target.stat().st_size, difference)
