"""The tokenizer: text to ids and character offsets, ids to text, and the special ids."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

from tokenizers import Encoding
from tokenizers import Tokenizer as FastTokenizer

from minimind_v.core.data.layouts import CHAT_LAYOUTS, ChatLayout, find_layout
from minimind_v.core.errors import MissingInput, RowError, WeightsError
from minimind_v.core.hub.sources import how_to_get
from minimind_v.core.paths import STANDARD_PRESET

MOST_BYTES = 64 << 20  # of a tokenizer.json: twice the largest vocabularies of today
PROBE = "Is it 1?\n它是。"  # a text that any tokenizer can encode
MOST_STEPS, MOST_GROWTH = 16, 64  # of a normalizer
IMAGE_TOKEN = "<|image|>"  # the placeholder of an export for transformers, after the vocabulary


@dataclass(frozen=True)
class Tokenizer:
    """A `tokenizer.json`; the names of its added tokens in a user's text stay ordinary text.

    Its chat layout decides which tokens end an answer and reserve positions for an image.
    """

    backend: FastTokenizer
    pad_id: int
    bos_id: int
    eos_id: int
    placeholder_id: int
    layout: str = "chatml"  # one of CHAT_LAYOUTS

    @classmethod
    def load(cls, folder: Path, layout: str | None = None, preset: str = STANDARD_PRESET) -> Tokenizer:
        """Load `tokenizer.json` from a folder; without `layout` it has the one that its tokens are made for.

        Raises MissingInput or WeightsError, each with the next step: the download of `preset`.
        """
        path = find_tokenizer(folder, preset)
        try:
            text = _read(path)
            backend = FastTokenizer.from_str(_without_image_token(text))
            _check_ids(backend)
            if backend.normalizer is not None:
                _check_growth(json.loads(text)["normalizer"])
            backend.encode(PROBE, add_special_tokens=False)
        except BaseException as error:  # the Rust library raises Exception, and panics as BaseException
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            get = how_to_get("tokenizer", folder, preset)
            raise WeightsError(f"{path}: not a tokenizer ({error}) — {get}") from None
        layout = layout or usual_layout(backend)
        chat_layout = find_layout(layout)
        ids: list[int] = []
        for token in ("<|endoftext|>", "<|im_start|>", chat_layout.end_token, chat_layout.placeholder):
            id = backend.token_to_id(token)
            if id is None:
                get = how_to_get("tokenizer", folder, preset)
                raise WeightsError(f"{path}: not a MiniMind-V tokenizer (it has no {token!r} token) — {get}")
            ids.append(id)
        backend.encode_special_tokens = True
        backend.no_truncation()
        backend.no_padding()
        pad, bos, eos, placeholder = ids
        return cls(backend, pad, bos, eos, placeholder, layout)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__dict__.pop("_text_backend", None)
        self.backend.encode_special_tokens = True  # pickling loses it

    @property
    def chat_layout(self) -> ChatLayout:
        return find_layout(self.layout)

    def token_id(self, token: str) -> int:
        """The id of a token by its name. Raises WeightsError."""
        id = self.backend.token_to_id(token)
        if id is None:
            raise WeightsError(f"the tokenizer has no {token!r} token, which the layout {self.layout} needs")
        return int(id)

    @cached_property
    def _text_backend(self) -> FastTokenizer:
        """The backend without added tokens that are not special, which it would find in every text."""
        added = self.backend.get_added_tokens_decoder().values()
        if all(token.special for token in added):
            return self.backend
        description = json.loads(self.backend.to_str())
        for token in description["added_tokens"]:
            token["special"] = True
        backend = FastTokenizer.from_str(json.dumps(description, ensure_ascii=False))
        backend.encode_special_tokens = True
        return backend

    @cached_property
    def last_token(self) -> str:
        """The token with the largest id."""
        ids = self.backend.get_vocab()
        return max(ids, key=ids.__getitem__)

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding: the largest id plus one, not the number of tokens."""
        return int(self.backend.token_to_id(self.last_token) or 0) + 1

    def encode(self, text: str) -> Encoding:
        """Ids and character offsets of ordinary text. Raises RowError for text that cannot be encoded."""
        try:
            return self._text_backend.encode(text, add_special_tokens=False)
        except TypeError:  # JSON can write half of a surrogate pair, UTF-8 cannot
            raise RowError("the text contains half a character (a lone surrogate)", "conversations") from None
        except Exception as error:  # the Rust library's own
            raise RowError(f"the tokenizer cannot encode the text ({error})", "conversations") from None

    def decode(self, ids: list[int]) -> str:
        """Text of ids, without the special tokens."""
        return self.backend.decode(ids, skip_special_tokens=True)


def usual_layout(backend: FastTokenizer) -> str:
    """The chat layout that a tokenizer is made for: minimind-3v has a token for images, 2025 an ordinary `@`."""
    thinking = CHAT_LAYOUTS["chatml-think"].placeholder
    return "chatml" if backend.token_to_id(thinking) is None else "chatml-think"


def _read(path: Path) -> str:
    """The text of a `tokenizer.json`. Raises ValueError if it is longer than that of any model."""
    if (size := path.stat().st_size) > MOST_BYTES:
        raise ValueError(f"it has {size:,} bytes; the maximum is {MOST_BYTES:,}")
    return path.read_text(encoding="utf-8")


def _check_growth(normalizer: Any) -> None:
    """Raises ValueError for a normalizer that can multiply a text's length many times."""
    steps = list(_steps(normalizer))
    growth = prod(max(len(str(step.get("content") or step.get("prepend") or "")), 1) for step in steps)
    if len(steps) > MOST_STEPS or growth > MOST_GROWTH:
        raise ValueError(f"its normalizer could make a text {growth:,} times as long in {len(steps)} steps")


def _steps(normalizer: Any) -> Iterator[dict[str, Any]]:
    """The steps of a normalizer."""
    if isinstance(normalizer, dict):
        yield normalizer
        for step in normalizer.get("normalizers") or []:
            yield from _steps(step)


def _check_ids(backend: FastTokenizer) -> None:
    """Raises ValueError if two tokens have the same id."""
    ids = backend.get_vocab()
    if len(set(ids.values())) < len(ids):
        id = Counter(ids.values()).most_common(1)[0][0]
        raise ValueError(f"{' and '.join(repr(token) for token in ids if ids[token] == id)} have the id {id}")


def find_tokenizer(folder: Path, preset: str = STANDARD_PRESET) -> Path:
    """The `tokenizer.json` of a folder. Raises MissingInput with the download of `preset`."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        get = how_to_get("tokenizer", folder, preset)
        raise MissingInput(f"no tokenizer in {folder} (tokenizer.json is missing) — {get}")
    return path


def with_image_token(text: str, number: int) -> str:
    """The JSON of a tokenizer with the image token under an id after its vocabulary."""
    description = json.loads(text)
    description["model"]["vocab"][IMAGE_TOKEN] = number
    description["added_tokens"].append({
        "id": number, "content": IMAGE_TOKEN, "single_word": False, "lstrip": False, "rstrip": False,
        "normalized": False, "special": True,
    })  # fmt: skip
    return json.dumps(description, ensure_ascii=False, indent=1)


def _without_image_token(text: str) -> str:
    if IMAGE_TOKEN not in text:
        return text
    description = json.loads(text)
    description["model"]["vocab"].pop(IMAGE_TOKEN, None)
    description["added_tokens"] = [token for token in description["added_tokens"] if token["content"] != IMAGE_TOKEN]
    return json.dumps(description, ensure_ascii=False)
