"""A parquet file of 2026 with every oddity: all commands read it, and its ids and labels are those of the template.

The independent implementation is the published chat template, rendered by transformers and encoded as a whole, with the
published search for the labels.
"""

from __future__ import annotations

import io
import json
from functools import cache
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from minimind_v.core.data.layouts import SYSTEM_PROMPTS
from minimind_v.core.data.prompt import PromptEncoder
from minimind_v.core.data.tokenizer import Tokenizer
from minimind_v.core.rows.forms import read_row
from minimind_v.core.rows.stores import open_rows
from tests.cli.harness import read_rows, run_mmv
from tests.conformance.published import open_set

PUBLISHED = open_set("MMV_CONFORMANCE_3V", "conformance-3v", "tokenizer-3v")
CONFIG, PATCHES = PUBLISHED.record["dense.config"], PUBLISHED.record["tokens_per_image"]
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
FOLDERS = ("--vision-model", PUBLISHED.folder / "tower", "--tokenizer", PUBLISHED.tokenizer)
BLOCK, LIMIT = "<think>\n\n</think>\n\n", 768


def jpeg(width: int, height: int, colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(buffer, "JPEG")
    return buffer.getvalue()


def talk(*texts: str, **last) -> list[dict]:
    messages = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]
    messages[-1] |= last
    return messages


BLACK, RED, BLUE = jpeg(8, 8, "black"), jpeg(40, 20, "red"), jpeg(20, 50, "blue")
TOOLS = [{"type": "function", "function": {"name": "数", "parameters": {"what": {"type": "string"}}}}]
CALL = [{"name": "数", "arguments": {"what": "杯子"}}, {"function": {"name": "sum", "arguments": '{"a": [1, 2]}'}}]
WORDS = "An old harbour wall with nine boats, and a dog that waits. "
ROWS: dict[str, tuple[list[dict], list[bytes] | None]] = {  # name: the conversation, its pictures
    "image": (talk("<image>\nWhat?", "A cup."), [RED]),
    "a black picture without a mark": (talk("Hello", "Hi."), [BLACK]),
    "no picture": (talk("Hello", "Hi."), None),
    "an empty list of pictures": (talk("Hello", "Hi."), []),
    "two pictures": (talk("<image>\n<image>\nSame?", "No."), [RED, BLUE]),
    "pictures of two turns": (talk("<image> Red?", "Yes.", "<image> Red?", "No."), [RED, BLUE]),
    "an empty answer": (talk("<image>\nWhat?", ""), [RED]),
    "an answer of newlines": (talk("<image>\nWhat?", "\n\n"), [RED]),
    "an empty question": (talk("", "Hm?"), [BLACK]),
    "reasoning in the content": (talk("<image>\n1+1", "<think>\none more\n</think>\n\n2"), [RED]),
    "reasoning in a field": (talk("<image>\n1+1", "2", reasoning_content="\none more\n"), [RED]),
    "reasoning alone": (talk("<image>\n1+1", "", reasoning_content="one more"), [RED]),
    "an empty block": (talk("<image>\n1+1", f"{BLOCK}2"), [RED]),
    "null fields": (talk("<image>\nWhat?", "A cup.", reasoning_content=None, tools=None, tool_calls=None), [BLUE]),
    "tools": (
        [
            {"role": "system", "content": "Count.", "tools": json.dumps(TOOLS)},
            *talk("<image>\nHow many?", "Let me count.", tool_calls=json.dumps(CALL)),
            {"role": "tool", "content": '{"count": 3}'},
            {"role": "tool", "content": "3"},
            {"role": "assistant", "content": "Three."},
        ],
        [RED],
    ),
    "an empty system message": ([{"role": "system", "content": ""}, *talk("<image>", "Red.")], [RED]),
    "own system": ([{"role": "system", "content": "请简短。"}, *talk("<image>", "红色。")], [RED]),
    "unicode": (talk("<image>\r\n👩‍👩‍👧 é ﷽ \u200f\u202e \x00 𝔘", "ﬁ ½ — 「」 e\u0301 \t\x7f"), [RED]),
    "long text": (talk("<image>\n" + WORDS, WORDS * 9), [RED]),
}  # fmt: skip
CUT = {
    "a long answer": (talk("<image>\nWhat?", WORDS * 90), [RED]),
    "turns that are too many": (talk(*["<image>\nWhat?", WORDS * 6, *["And?", WORDS * 6] * 12]), [RED]),
    "an image that is cut off": (talk("Hello", WORDS * 30, "<image>\nWhat?", WORDS * 30), [RED]),
}
BROKEN = {
    "a long question": (talk("<image>\n" + WORDS * 90, "What?"), [RED]),
    "no answer": (talk("<image>\nWhat?"), [RED]),
    "a mark too many": (talk("<image><image>", "No."), [RED]),
    "half a character": (talk("<image>", "\ud83d"), [RED]),
    "a null answer": (talk("<image>", None), [RED]),
    "no messages": ([], [RED]),
}
EVERY = ROWS | CUT | BROKEN


@pytest.fixture
def write(tmp_path):
    def write_parquet(rows: dict) -> Path:
        columns = {
            "conversations": pa.array([json.dumps(messages) for messages, _ in rows.values()]),
            "image_bytes": pa.array([pictures for _, pictures in rows.values()], pa.list_(pa.binary())),
            "image_names": pa.nulls(len(rows), pa.string()),
        }
        pq.write_table(pa.table(columns), tmp_path / "sft_i2t.parquet", row_group_size=5)
        return tmp_path / "sft_i2t.parquet"

    return write_parquet


@cache
def published_tokenizer():
    transformers = pytest.importorskip("transformers")
    return transformers.PreTrainedTokenizerFast.from_pretrained(PUBLISHED.tokenizer)


def published(messages: list[dict], prompt: str | None = None, blocks: bool = False) -> tuple[list[int], list[int]]:
    """The ids and labels of the published code: with a system prompt, and with or without empty think blocks."""
    words = published_tokenizer()
    messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
    for message in messages:
        if "tool_calls" in message:
            message["tool_calls"] = json.loads(message["tool_calls"])
    if prompt and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": prompt}, *messages]
    tools = json.loads(messages[0].get("tools", "null"))
    text = words.apply_chat_template(messages, tokenize=False, tools=tools)
    text = text.replace("<image>", "<|image_pad|>" * PATCHES)
    ids = words(text if blocks else text.replace(BLOCK, "")).input_ids
    begin, end = words("<|im_start|>assistant\n").input_ids, words("<|im_end|>\n").input_ids
    labels, at = [-100] * len(ids), 0
    while at < len(ids):
        if ids[at : at + len(begin)] != begin:
            at += 1
            continue
        first = at = at + len(begin)
        while ids[at : at + len(end)] != end:
            at += 1
        at += len(end)
        labels[first:at] = ids[first:at]
    return ids, labels


def shown_rows(path: Path, count: int) -> dict:
    options = ("--html", path.with_suffix(".html"), "--rows", count, "--start", 1, "--json")
    rows = run_mmv("data", "preview", path, *FOLDERS, *options).json["rows"]
    return dict(zip(EVERY, rows, strict=True))


def labels_of(ids: list[int], ranges: list[list[int]]) -> list[int]:
    labels = [-100] * len(ids)
    for begin, end in ranges:
        labels[begin:end] = ids[begin:end]
    return labels


@pytest.mark.parametrize("name", ROWS)
def test_plain_rows_are_those_of_the_template(write, name):
    path = write(ROWS)
    row = open_rows(path).row([*ROWS].index(name))
    encoder = PromptEncoder(Tokenizer.load(PUBLISHED.tokenizer), PATCHES)
    tokens = encoder.row(row.conversations, len(row.images), LIMIT)
    ranges = [[n, n + 1] for n, supervised in enumerate(tokens.loss_mask) if supervised]
    assert (tokens.input_ids, labels_of(tokens.input_ids, ranges)) == published(ROWS[name][0])
    assert tokens.images == sum(message["content"].count("<image>") for message in ROWS[name][0])


def test_the_tools_of_sharegpt_are_written_as_the_template_writes_them():
    texts = {"human": "How many?", "function_call": json.dumps(CALL), "observation": "3", "gpt": "Three."}
    row = read_row({"conversations": [{"from": role, "value": text} for role, text in texts.items()], "tools": TOOLS})
    encoder = PromptEncoder(Tokenizer.load(PUBLISHED.tokenizer), PATCHES)
    words = published_tokenizer()
    messages = [
        *talk("How many?", "", tool_calls=CALL),
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "Three."},
    ]
    text = words.apply_chat_template(messages, tokenize=False, tools=TOOLS).replace(BLOCK, "")
    assert encoder.row(row.conversations, 0, LIMIT).input_ids == words(text).input_ids


def test_preview_shows_the_template_in_one_of_the_forms_of_training(write):
    shown = shown_rows(write(EVERY), len(EVERY))
    for name, (messages, _) in ROWS.items():
        row = shown[name]
        forms = [published(messages, prompt, blocks) for prompt in (None, *SYSTEM_PROMPTS) for blocks in (False, True)]
        assert (row["input_ids"], labels_of(row["input_ids"], row["supervised"])) in forms, name
    for name, (messages, _) in CUT.items():
        ids, labels = published(messages)
        length = shown[name]["tokens"]
        assert shown[name]["used"]
        assert shown[name]["tokens_before_truncation"] == len(ids) > LIMIT >= length
        assert shown[name]["input_ids"] == ids[:length]
        assert labels_of(ids[:length], shown[name]["supervised"]) == labels[:length]
    assert {name for name, row in shown.items() if not row["used"]} == set(BROKEN)


@pytest.mark.long
def test_check_and_stats_agree_with_what_is_broken_and_cut(write):
    path = write(EVERY)
    ended = run_mmv("data", "check", path, *FOLDERS, "--json", "--workers", 1)
    summary, names = json.loads(ended.out), [*EVERY]
    kinds = {
        kind: {names[problem["row"] - 1] for problem in summary["problems"] if problem["kind"] == kind}
        for kind in summary["kinds"]
    }
    skipped = set().union(*(kinds[kind] for kind in kinds if summary["kinds"][kind]["training"] == "skips the row"))
    assert skipped == set(BROKEN)
    assert kinds["cut"] == set(CUT)
    assert kinds["empty answer"] == {"an empty answer", "an answer of newlines", "reasoning alone"}
    assert summary["text_rows"]["count"] == 2
    report = run_mmv("data", "stats", path, *FOLDERS, "--json").json
    assert report["skipped"]["rows"] == len(BROKEN) - 1, "it opens no picture, so it trusts the marks"
    assert report["cut"]["rows"] == len(CUT)


@pytest.mark.long
def test_a_run_reads_as_many_tokens_as_stats_counts(write, tmp_path):
    path = write({name: row for name, row in EVERY.items() if name != "a mark too many"})
    sizes = [word for name in SIZES for word in ("--set", f"model.{name}={CONFIG[name]}")]
    ended = run_mmv(
        "train", "sft", "--preset", "3v", *sizes, *FOLDERS, "--data", path, "--init", PUBLISHED.folder / "dense.pth",
        "--out", tmp_path / "out", "--epochs", 1, "--batch-size", 4, "--log-every", 1, "--set", "data.bad_rows=0.9",
        "--device", "cpu", "--workers", 0,
    )  # fmt: skip
    assert ended.code == 0, ended.err
    [metrics] = (tmp_path / "out").glob("*/metrics.jsonl")
    steps = read_rows(metrics)
    report = run_mmv("data", "stats", path, *FOLDERS, "--json").json
    assert steps[-1]["samples"] == len(ROWS) + len(CUT)
    supervised = report["training"]["supervised_tokens"] // report["training"]["epochs"]
    assert steps[-1]["supervised_tokens"] == supervised


def test_a_file_that_is_converted_and_back_has_the_same_tokens(write, tmp_path):
    rows = {name: row for name, row in EVERY.items() if name not in ("half a character", "a mark too many")}
    paths = [write(rows), tmp_path / "copy_data.jsonl", tmp_path / "back.parquet"]
    for source, target in pairwise(paths):
        assert run_mmv("data", "convert", source, target).code == 0
    encoder = PromptEncoder(Tokenizer.load(PUBLISHED.tokenizer), PATCHES)
    stores = [open_rows(path, tmp_path / "copy_images.zip" if path.suffix == ".jsonl" else None) for path in paths]
    for number, (name, (_, pictures)) in enumerate(rows.items()):
        read = [store.row(number) for store in stores]
        if name not in BROKEN:
            tokens = [encoder.row(row.conversations, len(row.images), LIMIT) for row in read]
            assert tokens[0] == tokens[1] == tokens[2], name
        for store, row in zip(stores, read, strict=True):
            assert [store.picture(number, *image) for image in enumerate(row.images)] == (pictures or []), name
