"""What the tests of the data path share: both tokenizers, and small files made on the spot."""

from __future__ import annotations

from pathlib import Path

import pytest

from minimind_v.core.data.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
TOKENIZERS = {
    "demo": ROOT / "minimind_v" / "core" / "demo" / "assets",
    "published": ROOT.parent / "shared" / "tokenizer",
}


@pytest.fixture(scope="session", params=list(TOKENIZERS))
def tokenizer_folder(request) -> Path:
    folder = TOKENIZERS[request.param]
    if not (folder / "tokenizer.json").is_file():
        pytest.skip(f"the {request.param} tokenizer is not there ({folder})")
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder) -> Tokenizer:
    return Tokenizer.load(tokenizer_folder)


@pytest.fixture(scope="session")
def demo_tokenizer() -> Tokenizer:
    return Tokenizer.load(TOKENIZERS["demo"])
