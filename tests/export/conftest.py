"""What tests of exports share."""

import pytest

from minimind_v.core.export.prove.worker import Worker
from tests.cli.conftest import tiny_data  # noqa: F401


@pytest.fixture(scope="module")
def prover():
    """One process for all: the import of transformers takes longer than the rest."""
    with Worker("minimind_v.core.export.prove.ask_hf") as worker:
        yield worker
