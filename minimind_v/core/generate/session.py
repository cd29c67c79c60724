"""A conversation: remembers what was said and seen, and turns token ids into text as they come."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch

from minimind_v.core.data.images import load_pixels
from minimind_v.core.data.prompt import IMAGE_MARK, PromptEncoder, Tokens
from minimind_v.core.data.tokenizer import Tokenizer
from minimind_v.core.errors import UsageError
from minimind_v.core.formats.inputs import check_marks
from minimind_v.core.generate.detokenize import TextStream
from minimind_v.core.generate.engine import generate
from minimind_v.core.generate.picture_names import Picture, read_picture
from minimind_v.core.generate.prompt_cache import position_keys, ready
from minimind_v.core.generate.sampling import Sampler, Sampling
from minimind_v.core.model.vlm import VLM

Image = Picture | Path | str | np.ndarray  # a file read already, its name, or uint8 [3, S, S]

CONTEXT = 4096  # tokens of a conversation; the published models were trained on at most 1536


class Session:
    """Keeps the keys and values of all earlier turns, so that a further question costs only its own tokens.

    A new conversation about a picture that was asked about lately, in this session or another one with the same model,
    begins behind the picture (`ready`).
    """

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
        self.cache = ready(self.model).decoder.new_cache(1, self.context)
        self._pending: list[int] = []  # said, but not yet read by the model
        self.questions = 0  # that the model has read

    def ask(self, question: str, images: Iterable[Image] = (), max_new_tokens: int = 512) -> Generator[str]:
        """Ask, with pictures, and get the answer piece by piece.

        A question without `<image>` marks gets one per picture in front. Raises UsageError or RowError where the
        pictures do not fit the marks or cannot be read, and where the conversation has become too long.
        """
        question, pictures = open_question(question, images, self.model.spec.image_size)
        tokens = self._encode(question)
        room = self.cache.max_length - self.cache.used - len(tokens)
        if room < 1:
            raise UsageError(f"the conversation is longer than {self.cache.max_length} tokens — start a new one")
        return self._answer(tokens, pictures, min(room, max_new_tokens))

    def look(self, image: Image) -> np.ndarray:
        """Open a picture and look at it before a question is known, whose answer then begins sooner.

        Returns the picture as `ask` takes it. Raises MissingInput, UsageError or RowError where it cannot be read.
        """
        picture = _open(image, self.model.spec.image_size)
        ready(self.model).features(self.model, [picture])
        return picture

    def _encode(self, question: str) -> Tokens:
        if not self.questions:
            return self.prompts.prompt([{"role": "user", "content": question}])
        tokens = Tokens([*self._pending], [False] * len(self._pending), [False] * len(self._pending))
        tokens += self.prompts.follow_up(question)
        return tokens

    def _answer(self, tokens: Tokens, pictures: list[np.ndarray], max_new_tokens: int) -> Generator[str]:
        ids: list[int] = []
        start, ended = self.cache.used, False
        text = TextStream(self.tokenizer)
        try:
            for token in self._read(tokens, pictures, max_new_tokens):
                ids.append(token)
                if piece := text.add(token):
                    yield piece
            if rest := text.rest():
                yield rest
            ended = True
        finally:  # however the answer ended, even inside a layer: the next question follows a closed turn
            if ids or ended:
                read = max(0, len(ids) - 1)  # the latest token may be half read, and is read again
                self.cache.rewind(start + len(tokens) + read)
                self._pending = [*ids[read:], *self.prompts.answer_end().input_ids]
                self.questions += 1
            else:  # the question itself was not read: as if it had never been asked
                self.cache.rewind(start)
            self.new_tokens = len(ids)

    def _read(self, tokens: Tokens, pictures: list[np.ndarray], max_new_tokens: int) -> Iterator[int]:
        """The ids of an answer. The beginning of a first question is recalled, as far as it is known."""
        memory, first = ready(self.model), not self.questions
        signs = position_keys(tokens.input_ids, tokens.image_mask, pictures)
        known = memory.recall(signs, self.cache) if first else 0
        seen = sum(tokens.image_mask[:known]) // self.prompts.tokens_per_image
        device = self.model.device
        answer = generate(
            self.model,
            self.cache,
            torch.tensor([tokens.input_ids[known:]], device=device),
            self.sampler,
            self.tokenizer.eos_id,
            max_new_tokens,
            memory.features(self.model, pictures[seen:]),
            torch.tensor([tokens.image_mask[known:]], device=device),
        )
        for count, token in enumerate(answer):
            if first and not count:
                memory.remember(signs, self.cache)
            yield token


def open_question(question: str, images: Iterable[Image], size: int) -> tuple[str, list[np.ndarray]]:
    """A question with a mark for each picture, and the pictures as uint8 [3, S, S].

    Raises UsageError, MissingInput or RowError where marks and pictures differ, or one cannot be read.
    """
    pictures = [_open(image, size) for image in images]
    if pictures and IMAGE_MARK not in question:
        question = f"{IMAGE_MARK}\n" * len(pictures) + question
    check_marks(question, len(pictures))
    return question, pictures


def _open(image: Image, size: int) -> np.ndarray:
    if isinstance(image, np.ndarray):
        return image
    picture = image if isinstance(image, Picture) else read_picture(str(image))
    return load_pixels(picture.data, picture.name, size)
