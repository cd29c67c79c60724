"""An export target: `mmv convert --to npz` writes the weights as a file that NumPy opens."""

from pathlib import Path

import numpy as np

from minimind_v.core.export.prove.report import Report
from minimind_v.core.export.targets import TARGETS, Target
from minimind_v.core.files import write_atomically
from minimind_v.core.formats.checkpoint import read_checkpoint
from minimind_v.core.formats.request import ExportFacts, ExportRequest


def write_npz(request: ExportRequest, path: Path, check: bool) -> tuple[ExportFacts, Report]:
    """Write the tensors under their published names and, if asked to, prove that they read back the same."""
    checkpoint, report = read_checkpoint(request.model), Report()
    arrays = {name: tensor.numpy() for name, tensor in checkpoint.tensors.items()}
    write_atomically(path, lambda file: np.savez(file, **arrays))
    if check:
        with np.load(path, allow_pickle=False) as saved:
            same = saved.files == list(arrays) and all(np.array_equal(saved[name], arrays[name]) for name in arrays)
        report.add("weights", "the same" if same else "not the same", same)
    return ExportFacts.of(checkpoint), report


TARGETS["npz"] = Target("a file for NumPy", write_npz, ending=".npz")
