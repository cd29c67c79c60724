"""The generated reference is that of the program as it is."""

import importlib.util

import pytest

from tests.cli.harness import ROOT

spec = importlib.util.spec_from_file_location("generate_reference", ROOT / "docs" / "generate_reference.py")
generator = importlib.util.module_from_spec(spec)
spec.loader.exec_module(generator)


@pytest.mark.parametrize(("path", "page"), generator.pages().items(), ids=["command line", "Python"])
def test_the_reference_is_up_to_date(path, page):
    assert path.read_text(encoding="utf-8") == page, f"{path.name} is stale: run `make reference`"
