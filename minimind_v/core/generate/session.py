"""A conversation with a model: it keeps earlier turns, encodes each further question, and yields the answer as text."""

from __future__ import annotations

from collections.abc import Generator, Iterator

import numpy as np
import torch

from minimind_v.core.data.processor import Image, Images, Processor
from minimind_v.core.data.prompt import Tokens
from minimind_v.core.data.thinking import split_answer
from minimind_v.core.data.tokenizer import Tokenizer
from minimind_v.core.errors import UsageError
from minimind_v.core.generate.detokenize import TextStream
from minimind_v.core.generate.engine import generate
from minimind_v.core.generate.prompt_cache import position_keys, ready
from minimind_v.core.generate.sampling import Sampler, Sampling
from minimind_v.core.model.vlm import VLM

CONTEXT = 4096  # tokens of a conversation; the published models were trained on at most 1536


class Session:
    """Keeps the keys and values of all earlier turns, so that a further question costs only its own tokens.

    A new conversation about a recent image, of this session or of another with the same model, starts after that image
    (`ready`).
    """

    def __init__(
        self, model: VLM, tokenizer: Tokenizer, sampling: Sampling, context: int = CONTEXT, think: bool = False
    ) -> None:
        """With `think` each answer begins with reasoning, up to `</think>`, which later turns do not contain.

        Raises UsageError where the chat layout has no reasoning.
        """
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.processor = Processor(tokenizer, model.spec)
        self.think = think
        self._start = len(self.processor.prompts.answer_start(think))  # tokens of a prompt that begin its answer
        self.sampler = Sampler(sampling)
        self.context = min(context, model.config.max_position_embeddings)
        self.new_tokens = 0  # of the latest answer
        self.restart()

    def restart(self) -> None:
        """Forget the conversation."""
        self.cache = ready(self.model).decoder.new_cache(1, self.context)
        self._pending: list[int] = []  # ids of the latest answer that the model has not read yet
        self.questions = 0  # number of questions so far

    def ask(self, question: str, images: Images = (), max_new_tokens: int = 512) -> Generator[str]:
        """Ask, with images, and get the answer piece by piece.

        A question without `<image>` marks gets one for each image, in front. Raises MissingInput, UsageError or
        RowError where images do not fit the marks or cannot be read, and where the conversation has become too long.
        """
        text, pixels = self.processor.question(question, images)
        tokens = self._encode(text)
        room = self.cache.max_length - self.cache.used - len(tokens)
        if room < 1:
            raise UsageError(f"the conversation is longer than {self.cache.max_length} tokens — start a new one")
        return self._answer(tokens, pixels, min(room, max_new_tokens))

    def encode(self, image: Image) -> np.ndarray:
        """Open an image and encode it before its question comes, whose answer then begins sooner.

        Returns the image as `ask` takes it. Raises MissingInput, UsageError or RowError where it cannot be read.
        """
        pixels = self.processor.pixels(image)
        ready(self.model).features(self.model, [pixels])
        return pixels

    def _encode(self, question: str) -> Tokens:
        prompts = self.processor.prompts
        if not self.questions:
            return prompts.prompt([{"role": "user", "content": question}], self.think)
        tokens = Tokens([*self._pending], [False] * len(self._pending), [False] * len(self._pending))
        tokens += prompts.follow_up(question, self.think)
        return tokens

    def _answer(self, tokens: Tokens, images: list[np.ndarray], max_new_tokens: int) -> Generator[str]:
        ids: list[int] = []
        start, ended = self.cache.used, False
        text = TextStream(self.tokenizer)
        try:
            for token in self._read(tokens, images, max_new_tokens):
                ids.append(token)
                if piece := text.add(token):
                    yield piece
            if rest := text.rest():
                yield rest
            ended = True
        finally:  # however the answer ended, even inside a layer: the next question follows a closed turn
            if ids or ended:
                self._close(start + len(tokens), ids)
                self.questions += 1
            else:  # the question itself was not read: as if it had never been asked
                self.cache.rewind(start)
            self.new_tokens = len(ids)

    def _close(self, end: int, ids: list[int]) -> None:
        """Close the turn of an answer whose prompt ends at this position of the cache."""
        prompts = self.processor.prompts
        if self.think:  # the next prompt has the answer without its reasoning
            _, answer = split_answer(self.tokenizer.decode(ids))
            self.cache.rewind(end - self._start)
            self._pending = prompts.answer(answer).input_ids
            return
        read = max(0, len(ids) - 1)  # the latest token may be half read, and is read again
        self.cache.rewind(end + read)
        self._pending = [*ids[read:], *prompts.answer_end().input_ids]

    def _read(self, tokens: Tokens, images: list[np.ndarray], max_new_tokens: int) -> Iterator[int]:
        """The ids of an answer. The beginning of a first question comes from the prompt cache, as far as it is kept."""
        prompt_cache, first = ready(self.model), not self.questions
        keys = position_keys(tokens.input_ids, tokens.image_mask, images)
        start = prompt_cache.recall(keys, self.cache) if first else 0
        images_kept = sum(tokens.image_mask[:start]) // self.processor.prompts.tokens_per_image
        device = self.model.device
        answer = generate(
            self.model,
            self.cache,
            torch.tensor([tokens.input_ids[start:]], device=device),
            self.sampler,
            self.tokenizer.eos_id,
            max_new_tokens,
            prompt_cache.features(self.model, images[images_kept:]),
            torch.tensor([tokens.image_mask[start:]], device=device),
        )
        for count, token in enumerate(answer):
            if first and not count:
                prompt_cache.remember(keys, self.cache)
            yield token
