"""A conversation: remembers what was said and seen, and turns token ids into text as they come."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch

from minimind_v.core.data.images import load_pixels
from minimind_v.core.data.prompt import IMAGE_MARK, PromptEncoder, Tokens
from minimind_v.core.data.tokenizer import Tokenizer
from minimind_v.core.errors import MissingInput, UsageError
from minimind_v.core.generate.engine import generate
from minimind_v.core.generate.sampling import Sampler, Sampling
from minimind_v.core.model.vlm import VLM

CONTEXT = 4096  # tokens of a conversation; the published models were trained on at most 1536


class Session:
    """Keeps the keys and values of all earlier turns, so that a further question costs only its own tokens."""

    def __init__(self, model: VLM, tokenizer: Tokenizer, sampling: Sampling, context: int = CONTEXT) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.prompts = PromptEncoder(tokenizer, model.spec.tokens_per_image)
        self.sampler = Sampler(sampling)
        self.context = min(context, model.config.max_position_embeddings)
        self.new_tokens = 0  # of the latest answer
        self.restart()

    def restart(self) -> None:
        """Forget the conversation."""
        self.cache = self.model.new_cache(1, self.context)
        self._pending: list[int] = []  # said, but not yet read by the model
        self._begun = False

    def ask(self, question: str, images: Iterable[Path | np.ndarray] = (), max_new_tokens: int = 512) -> Iterator[str]:
        """Ask, with pictures (files, or uint8 [3, S, S]), and get the answer piece by piece.

        A question without `<image>` marks gets one per picture in front. Raises UsageError or RowError where the
        pictures do not fit the marks or cannot be read, and where the conversation has become too long.
        """
        pictures = [picture if isinstance(picture, np.ndarray) else self._look(picture) for picture in images]
        if pictures and IMAGE_MARK not in question:
            question = f"{IMAGE_MARK}\n" * len(pictures) + question
        if question.count(IMAGE_MARK) != len(pictures):
            raise UsageError(
                f"the question has {question.count(IMAGE_MARK)} {IMAGE_MARK} marks for {len(pictures)} pictures"
            )
        tokens = self._encode(question)
        room = self.cache.max_length - self.cache.used - len(tokens)
        if room < 1:
            raise UsageError(f"the conversation is longer than {self.cache.max_length} tokens — start a new one")
        return self._answer(tokens, pictures, min(room, max_new_tokens))

    def _encode(self, question: str) -> Tokens:
        if not self._begun:
            return self.prompts.prompt([{"role": "user", "content": question}])
        tokens = Tokens([*self._pending], [False] * len(self._pending), [False] * len(self._pending))
        tokens += self.prompts.follow_up(question)
        return tokens

    def _answer(self, tokens: Tokens, pictures: list[np.ndarray], max_new_tokens: int) -> Iterator[str]:
        device = self.model.device
        features = None
        if pictures:
            if self.model.vision_encoder is None:
                raise UsageError("this model was loaded without its vision model")
            features = self.model.vision_encoder(torch.from_numpy(np.stack(pictures)).to(device))
        ids: list[int] = []
        produced = generate(
            self.model,
            self.cache,
            torch.tensor([tokens.input_ids], device=device),
            self.sampler,
            self.tokenizer.eos_id,
            max_new_tokens,
            features,
            torch.tensor([tokens.image_mask], device=device),
        )
        shown, start, ended = "", self.cache.used, False
        try:
            for token in produced:
                ids.append(token)
                text = self.tokenizer.decode(ids)
                if not text.endswith(
                    "\N{REPLACEMENT CHARACTER}"
                ):  # the bytes of a character may come in several tokens
                    yield text[len(shown) :]
                    shown = text
            if rest := self.tokenizer.decode(ids)[len(shown) :]:
                yield rest
            ended = True
        finally:  # however the answer ended, even inside a layer: the next question follows a closed turn
            if ids or ended:
                read = max(0, len(ids) - 1)  # the latest token may be half read, and is read again
                self.cache.rewind(start + len(tokens) + read)
                self._pending = [*ids[read:], self.tokenizer.eos_id, *self.tokenizer.encode("\n").ids]
                self._begun = True
            else:  # the question itself was not read: as if it had never been asked
                self.cache.rewind(start)
            self.new_tokens = len(ids)

    def _look(self, path: Path) -> np.ndarray:
        if not path.is_file():
            raise MissingInput(f"no picture at {path}")
        return load_pixels(path.read_bytes(), str(path), self.model.spec.image_size)
