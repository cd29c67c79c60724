"""Convert weights between `.pth` and `.safetensors`; read the result back and compare it."""

from __future__ import annotations

from pathlib import Path

from minimind_v.core.errors import RunError
from minimind_v.core.export.prove.report import Report
from minimind_v.core.formats.checkpoint import read_checkpoint, write_checkpoint
from minimind_v.core.formats.request import ExportFacts, ExportRequest
from minimind_v.core.formats.tensor_files import cast
from minimind_v.core.wording import plural


def write_weights(request: ExportRequest, target: Path) -> tuple[ExportFacts, Report]:
    """Write the weights of a request as `target`, by its ending, in `request.dtype` or unchanged.

    Raises MissingInput, WeightsError, and RunError where the file cannot be written or reads back differently.
    """
    checkpoint = read_checkpoint(request.model)
    tensors = checkpoint.tensors
    if request.dtype is not None:
        tensors = {name: cast(name, tensor, request.dtype) for name, tensor in tensors.items()}
    write_checkpoint(target, tensors, checkpoint.model_config, checkpoint.stage, checkpoint.companions)
    again = read_checkpoint(target)
    if again.tensors.keys() != tensors.keys() or again.model_config != checkpoint.model_config:
        raise RunError(f"{target}: the file read back has other tensors or sizes")
    difference = max(
        float((tensor.double() - again.tensors[name].double()).abs().max())
        for name, tensor in checkpoint.tensors.items()
    )
    if request.dtype is None and difference:
        raise RunError(f"{target}: the file read back differs by {difference:g}")
    size = target.stat().st_size
    summary = f"{plural(len(tensors), 'tensor')}, {size:,} bytes; read back and compared, "
    facts = {"tensors": len(tensors), "bytes": size, "largest_difference": difference}
    report = Report(f"{summary}largest difference {difference:g}", facts=facts)
    return ExportFacts.of(checkpoint), report
