"""What a run on few rows knows at its end: of its own rows, and of the rows that its weights learnt before."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minimind_v.core.config.load import build_config
from minimind_v.core.config.schema import RunConfig
from minimind_v.core.config.settings import read_settings
from minimind_v.core.data.dataset import RowDataset
from minimind_v.core.data.feature_store import FeatureStore
from minimind_v.core.data.loader import BatchPlan
from minimind_v.core.errors import MmvError
from minimind_v.core.files import read_notes
from minimind_v.core.model.vlm import VLM
from minimind_v.core.monitor.metrics import Recalled
from minimind_v.core.rows.stores import open_rows
from minimind_v.core.train.validate import See, Validator

BATCH = 8  # rows at a time
OWN_ROWS = 100  # of a run's own rows, so many at most are measured


@dataclass(frozen=True)
class Earlier:
    """Rows like those that the weights of `init` learnt from."""

    file: Path
    images: Path | None
    tokenizer: str | None = None  # the fingerprint of the weights' tokenizer, where it is known


def earlier_run(init: Path | None) -> Earlier | None:
    """What the run that made these weights has left beside them about its data.

    Published weights have no such folder; they learnt from the published rows. None where there are no rows either way.
    """
    if init is None:
        return None
    folder = init.with_suffix("").with_name(init.stem.removesuffix("_best"))
    notes = read_notes(folder / "manifest.json")
    try:
        config = read_settings(folder / "config.yaml")
        file, images = Path(config["data.file"]), config["data.images"] and Path(config["data.images"])
        started = Path(notes["starts"][-1]["folder"])
        if not file.exists():  # relative to where that run was started
            file, images = started / file, images and started / images
        return Earlier(file, images, notes["fingerprints"].get("data.tokenizer"))
    except (OSError, KeyError, TypeError, AttributeError, IndexError, MmvError):
        published = build_config("pretrain" if init.name.startswith("pretrain") else "sft").data
        return Earlier(published.file, published.images) if published.file.exists() else None


class Recall:
    """Measures rows that a model has learnt, without learning from them. It draws no random number."""

    def __init__(self, name: str, plan: BatchPlan, dtype: str) -> None:
        self.name, self.rows = name, plan.rows
        self._validate = Validator(plan, dtype, swapped=False)

    def __call__(self, model: VLM, see: See) -> Recalled | None:
        """Loss and right tokens; None where no row can be used."""
        found = self._validate(model, see, 0, None)
        return None if found is None else Recalled(self.name, found.rows, found.loss, found.hits)


def recall_own(config: RunConfig, plan: BatchPlan) -> Recall:
    """The rows that the run learns from, or the first ones of them."""
    return Recall(
        str(config.data.file),
        BatchPlan(plan.dataset, BATCH, plan.pad_id, keep=plan.kept, limit=OWN_ROWS),
        config.dtype,
    )


def recall_earlier(config: RunConfig, plan: BatchPlan, store: FeatureStore | None) -> Recall | str:
    """A sample of what the weights learnt before, by the run's seed; or why there is none."""
    earlier = earlier_run(config.init)
    if earlier is None:
        return f"nothing beside {config.init} names the rows that it learnt from, and the published ones are not here"
    if not earlier.file.exists():
        return f"{earlier.file}, which {config.init} learnt from, is not there"
    if earlier.file.resolve() == config.data.file.resolve():
        return f"{config.init} learnt from these same rows"
    mine = plan.dataset
    try:
        rows = open_rows(earlier.file, earlier.images)
        keep = np.zeros(len(rows), bool)
        keep[rows.shuffled(np.random.default_rng(config.seed))[: config.recall_rows]] = True
        dataset = RowDataset(rows, mine.encoder, mine.image_size, config.data.max_length)
        dataset.remembered = store
    except MmvError as error:
        return str(error)
    return Recall(str(earlier.file), BatchPlan(dataset, BATCH, plan.pad_id, keep=keep), config.dtype)
