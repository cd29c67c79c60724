"""The tokenizers of the data path's tests."""

from tests.data.conftest import demo_tokenizer, tokenizer, tokenizer_folder

__all__ = ["demo_tokenizer", "tokenizer", "tokenizer_folder"]
