"""A model of this package in lmms-eval, by its entry point: `lmms-eval --model mmv --model_args pretrained=FILE`.

lmms-eval imports this module; nothing else does. Answers are those of `mmv eval`: images are encoded once, and answers
are computed side by side.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest

from minimind_v.api import load
from minimind_v.core.data.feature_cache import FeatureEncoder
from minimind_v.core.evaluate.answering import Answering, Features
from minimind_v.core.evaluate.ask import Ask, Reply

GROUP = 64  # requests that are answered together
MOST_TOKENS = 512  # of an answer, where the task does not say


class Mmv(lmms):
    """Answers and likelihoods for lmms-eval.

    `pretrained` is whatever `--model` takes; `vision_model`, `tokenizer` and `device` are as in `mmv.load`.
    """

    def __init__(
        self,
        pretrained: str,
        vision_model: str | None = None,
        tokenizer: str | None = None,
        device: str = "auto",
        batch_size: int = 1,  # lmms-eval always gives one; it changes nothing here
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        model = load(pretrained, vision_model, tokenizer, device or "auto")
        assert model.model.vision_encoder is not None, "a loaded model has one"
        encoder = FeatureEncoder(model.model.vision_encoder, model.device, "auto")
        self.processor = model.processor
        self._pixels: dict[str, np.ndarray] = {}  # of the images of one group, by digest

        def encode(digest: str) -> torch.Tensor:
            return encoder.encode(torch.from_numpy(np.stack([self._pixels[digest]])).to(model.device))[0]

        features = Features(encode)
        self._answering = Answering(model.model, model.tokenizer, features, [], "auto")

    def generate_until(self, requests: list[Any]) -> list[str]:
        """The likeliest answer to each request, up to the first of its `until`."""

        def ask(context: str, settings: Mapping[str, Any], *source: Any) -> Ask:
            if settings.get("do_sample") or settings.get("temperature") or (settings.get("num_beams") or 1) != 1:
                raise ValueError("mmv takes the likeliest answer — set temperature 0, do_sample false and num_beams 1")
            return self._ask(context, source, most_tokens=settings.get("max_new_tokens") or MOST_TOKENS)

        replies = self._replies(requests, ask)
        return [_until(reply.text, request.args[1]) for reply, request in zip(replies, requests, strict=True)]

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """The loss of each continuation, nats per token, its end included, and whether it is the likeliest answer.

        lmms-eval takes the choice with the smallest: its own models return a loss as well.
        """

        def text_of(continuation: Any, source: Sequence[Any]) -> str:
            text = continuation if isinstance(continuation, str) else continuation(self._document(source))
            return str(text).strip()

        def scored(context: str, continuation: Any, *source: Any) -> Ask:
            return self._ask(context, source, method="likelihood", candidates=(text_of(continuation, source),))

        def answered(context: str, continuation: Any, *source: Any) -> Ask:
            return self._ask(context, source, most_tokens=len(text_of(continuation, source)) + 1)

        losses = [-reply.logprobs[0] / reply.tokens[0] for reply in self._replies(requests, scored)]
        answers = [reply.text for reply in self._replies(requests, answered)]
        return [
            (loss, answer == text_of(request.args[1], request.args[2:]))
            for loss, answer, request in zip(losses, answers, requests, strict=True)
        ]

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        """Not offered."""
        raise NotImplementedError("mmv answers one question at a time")

    def _document(self, source: Sequence[Any]) -> Any:
        _, document, task, split = source
        return self.task_dict[task][split][document]

    def _ask(self, context: str, source: Sequence[Any], **how: Any) -> Ask:
        """The question about the images of a document, whose pixels are kept for the next group."""
        images = [image for image in source[0](self._document(source)) or [] if image is not None]
        text, pixels = self.processor.question(context, images)
        digests = tuple(hashlib.blake2b(image.tobytes(), digest_size=16).hexdigest() for image in pixels)
        self._pixels |= zip(digests, pixels, strict=True)
        return Ask((("user", text),), images=digests, **how)

    def _replies(self, requests: Sequence[Any], ask: Callable[..., Ask]) -> Iterator[Reply]:
        for begin in range(0, len(requests), GROUP):
            yield from self._answering.reply([ask(*request.args) for request in requests[begin : begin + GROUP]])
            self._pixels.clear()


def _until(text: str, settings: Mapping[str, Any]) -> str:
    """An answer up to the first text that ends it; one that begins with it stays empty."""
    ends = settings.get("until") or []
    for end in [ends] if isinstance(ends, str) else ends:
        text = text.split(end, maxsplit=1)[0] if end else text
    return text


def manifest() -> ModelManifest:
    """What lmms-eval's entry point reads."""
    return ModelManifest(model_id="mmv", simple_class_path=f"{__name__}.Mmv")
