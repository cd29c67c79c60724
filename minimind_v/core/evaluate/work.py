"""What is needed to answer groups of asks, as plain data: for this process, or for several that share them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from minimind_v.core.curate.workers import each_row
from minimind_v.core.data.feature_store import FeatureStore
from minimind_v.core.errors import RunError
from minimind_v.core.evaluate.answering import Answering, Features
from minimind_v.core.evaluate.ask import Ask, Reply
from minimind_v.core.evaluate.images import Images
from minimind_v.core.evaluate.measure import Source
from minimind_v.core.formats.load import LoadedModel
from minimind_v.core.rows.row import RowStore

OpenModel = Callable[[], LoadedModel]


@dataclass(frozen=True)
class Work:
    """The images of the asks, and what else their answers depend on besides the model."""

    rows: RowStore
    sources: Mapping[str, Source]  # of images, by digest
    guesses: Sequence[str]
    dtype: str
    store: FeatureStore | None  # features that were encoded before

    def features(self, images: Images) -> Features:
        """The features of the images, each encoded when it is asked for."""
        return Features(lambda digest: images.encode(digest, self.rows, self.sources))

    def answering(self, loaded: LoadedModel, features: Features) -> Answering:
        """A model that replies to these asks."""
        return Answering(loaded.model, loaded.tokenizer, features, self.guesses, self.dtype)


def answer_in_processes(
    work: Work, models: Sequence[OpenModel], groups: Sequence[Sequence[Ask]]
) -> Iterator[list[Reply]]:
    """The replies to groups in their order, by a process for each of `models`.

    Raises RunError where a process is killed, and what opening its model raises.
    """
    processes = [Process(work, open_model, torch.get_num_threads()) for open_model in models]
    return each_row(processes, list(groups), _killed, together=1)


class Process:
    """What a process does: it opens its model for the first group."""

    def __init__(self, work: Work, open_model: OpenModel, threads: int) -> None:
        """`threads` are those of the parent: with others the last bits of sums differ."""
        self.work, self.open_model, self.threads = work, open_model, threads
        self._answering: Answering | None = None

    def __call__(self, groups: Sequence[Sequence[Ask]], number: int) -> list[Reply]:
        """The replies to a group."""
        if self._answering is None:
            torch.set_num_threads(self.threads)
            loaded = self.open_model()
            features = self.work.features(Images(loaded.model, self.work.dtype, self.work.store))
            self._answering = self.work.answering(loaded, features)
        return self._answering.reply(groups[number])


def _killed(group: int) -> list[Reply]:
    raise RunError(
        "a process of --gpus was killed, often because memory ran out — run the same command again: it continues there"
    )
