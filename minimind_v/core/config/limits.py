"""Checks that this machine can hold a run, before it takes memory or processes; an error names the key to lower."""

from __future__ import annotations

from minimind_v.core.config.schema import RunConfig, TextConfig
from minimind_v.core.errors import UsageError
from minimind_v.core.machine import check_workers, total_memory
from minimind_v.core.outputs import check_folder

FLOAT = 4  # bytes of a weight while it is trained


def check_machine(config: RunConfig) -> None:
    """Raises UsageError where a run asks for more data workers or weights than this machine can hold, or where its
    folder cannot exist.
    """
    check_folder(config.out)
    check_workers(config.data.workers)
    check_memory(config.model)


def check_memory(model: TextConfig) -> None:
    """Raises UsageError where the weights of a model alone need more memory than this machine, or its limit, has."""
    needed, memory = model.parameters * FLOAT, total_memory()
    if memory is not None and needed > memory:
        raise UsageError(
            f"model.hidden_size {model.hidden_size:,}, model.num_hidden_layers {model.num_hidden_layers:,} and "
            f"model.vocab_size {model.vocab_size:,} make a model of {model.parameters:,} parameters. It needs "
            f"{needed / 2**30:,.1f} GiB, and this machine has {memory / 2**30:,.1f} GiB — lower them or take a --preset"
        )
