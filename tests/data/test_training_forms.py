"""The form of a training row depends on the run's seed and the row alone, whoever reads it and however often."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from minimind_v.core.data.dataset import RowDataset
from minimind_v.core.data.loader import BatchPlan, load_batches, load_steps
from minimind_v.core.data.prompt import PromptEncoder
from minimind_v.core.data.token_store import identify, keep_tokens
from minimind_v.core.data.tokenizer import Tokenizer
from minimind_v.core.rows.stores import open_rows
from tests.tokenizers_made import thinking_tokenizer

ROWS = 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    rows = [
        {"conversations": [
            {"role": "user", "content": f"question {n} " + "word " * (n % 7)},
            {"role": "assistant", "content": f"answer {n}"},
        ]}
        for n in range(ROWS)
    ]  # fmt: skip
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    thinking_tokenizer(folder / "tokenizer")
    return folder


def plain(folder: Path, layout: str | None = None) -> RowDataset:
    encoder = PromptEncoder(Tokenizer.load(folder / "tokenizer", layout), 4)
    return RowDataset(open_rows(folder / "rows.jsonl"), encoder, 8, 200)


def plan_of(dataset: RowDataset, batch_size=4, processes=1, rank=0, tokens=None) -> BatchPlan:
    return BatchPlan(
        dataset, batch_size, 0, seed=3, rows_per_step=8, processes=processes, rank=rank, tokens=tokens, epochs=2
    )


def ids_of_rows(batches) -> dict[str, list[int]]:
    """The ids of each row by its location."""
    rows = {}
    for batch in batches:
        for location, ids, mask in zip(batch.locations, batch.input_ids, batch.attention_mask, strict=True):
            rows[location] = ids[mask].tolist()
    return rows


def test_a_seed_decides_the_forms(folder):
    first, again, other = (
        [tuple(dataset.text(n).tokens.input_ids) for n in range(ROWS)]
        for dataset in (plain(folder).for_training(1), plain(folder).for_training(1), plain(folder).for_training(2))
    )
    plain_rows = [tuple(plain(folder).text(n).tokens.input_ids) for n in range(ROWS)]
    assert first == again
    assert first != other
    assert 0.2 < sum(a != b for a, b in zip(first, plain_rows, strict=True)) / ROWS < 0.55, "0.36 are expected"


def test_a_layout_of_one_form_has_no_training_rows_of_its_own(folder):
    dataset = plain(folder, "chatml")
    assert dataset.for_training(1) is dataset


def test_workers_change_no_bit(folder):
    plan = plan_of(plain(folder).for_training(1))
    for alone, spread in zip(load_batches(plan, 0), load_batches(plan, 2), strict=True):
        assert alone.locations == spread.locations
        assert all(torch.equal(alone.tokens[name], spread.tokens[name]) for name in alone.tokens)


def test_processes_change_no_row(folder):
    dataset = plain(folder).for_training(1)
    alone = ids_of_rows(load_batches(plan_of(dataset), 0))
    plans = [plan_of(dataset, 2, 2, rank) for rank in (0, 1)]
    assert ids_of_rows(batch for plan in plans for batch in load_batches(plan, 0)) == alone
    assert len(alone) == ROWS


def test_a_resumed_run_reads_the_same_rows(folder):
    plan = plan_of(plain(folder).for_training(1))
    steps = [ids_of_rows(step) for step in load_steps(plan, 0)]
    resumed = plan_of(plain(folder).for_training(1))
    assert [ids_of_rows(step) for step in load_steps(resumed, 0, start=5)] == steps[5:]


def test_stored_tokens_are_those_of_the_seed(folder, tmp_path):
    for seed in (1, 2, 1):
        dataset = plain(folder).for_training(seed)
        tokens = keep_tokens(dataset, "the data", tmp_path, pytest.fail)
        assert ids_of_rows(load_batches(plan_of(dataset, tokens=tokens), 0)) == ids_of_rows(
            load_batches(plan_of(dataset), 0)
        )
    names = {identify(dataset, "the data")[0] for dataset in (plain(folder), *map(plain(folder).for_training, (1, 2)))}
    assert len(names) == 3


def test_the_seed_is_no_setting_of_tokens_where_rows_have_one_form(folder):
    dataset = plain(folder, "chatml")
    assert identify(dataset, "the data") == identify(dataset.for_training(7), "the data")
