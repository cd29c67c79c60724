"""One table of forms: whatever form a row is written in, and in whatever file, the same row is read."""

from __future__ import annotations

import base64
import json
import pickle
import random
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from minimind_v.core.curate.check import check, summary
from minimind_v.core.curate.convert import convert
from minimind_v.core.data.batch import collate
from minimind_v.core.data.dataset import BrokenRow, Example, RowDataset
from minimind_v.core.data.prompt import PromptEncoder
from minimind_v.core.errors import DataError, RowError
from minimind_v.core.rows.cells import decode_base64
from minimind_v.core.rows.forms import check_form, read_row
from minimind_v.core.rows.row import (
    ANSWER_FIRST,
    MARK_IN_ANSWER,
    MARK_PER_TURN,
    NOTES,
    SEVERAL_ANSWERS,
    SEVERAL_CAPTIONS,
)
from minimind_v.core.rows.stores import open_rows
from tests.rows.made import PATCHES, SIZE, picture

CASES = Path("../shared/cases")
CIRCLE = "<image>\nWhat colour is the circle?"


def talk(*texts, roles=("user", "assistant"), keys=("role", "content")):
    return [{keys[0]: roles[n % 2], keys[1]: text} for n, text in enumerate(texts)]


def text_of(number):
    return base64.b64encode(picture(number)).decode()


@dataclass
class Written:
    """How a row is written, and what it is read as; a picture is `picture(n)`, and is a file `n.png` too."""

    fields: dict[str, Any]
    messages: list[dict[str, str]] = field(default_factory=lambda: talk(CIRCLE, "red"))
    pictures: list[int] = field(default_factory=lambda: [1])
    notes: tuple[str, ...] = ()
    form: str = ""
    name: str = "1.png"  # of the first picture, where it has one


def turns(*pictures, text="What colour is the circle?"):
    shown = [picture if isinstance(picture, dict) else {"type": "image"} for picture in pictures]
    return [
        {"role": "user", "content": [*shown, {"type": "text", "text": text}]},
        {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
    ]


URI = f"data:image/png;base64,{text_of(1)}"
DESCRIBED = talk("<image>\nDescribe this image.", "a red circle")
NAMED = {
    "as published": Written({"conversations": talk(CIRCLE, "red"), "image": "1.png"}, form="conversations + image"),
    "LLaVA": Written(
        {"conversations": talk(CIRCLE, "red", roles=("human", "gpt"), keys=("from", "value")), "image": "1.png"}
    ),
    "messages and images": Written(
        {"messages": talk(CIRCLE, "red"), "images": ["1.png"]}, form="messages + images"
    ),
    "conversations and images": Written(
        {
            "conversations": talk("<image>\n<image>\nWhich?", "two", roles=("human", "gpt"), keys=("from", "value")),
            "images": ["2.png", "1.png"],
        },
        talk("<image>\n<image>\nWhich?", "two"),
        [2, 1],
        name="2.png",
    ),
    "messages as JSON text": Written({"messages": json.dumps(talk(CIRCLE, "red")), "images": ["1.png"]}),
    "roles in capitals": Written({"conversations": talk(CIRCLE, "red", roles=("User", "GPT")), "image": "1.png"}),
    "a bot": Written(
        {"messages": talk(CIRCLE, "red", roles=("HUMAN", "Bot"), keys=("from", "content")), "image": "1.png"}
    ),
    "nulls in messages": Written(
        {"messages": [message | {"weight": None} for message in talk(CIRCLE, "red")], "images": ["1.png"]}
    ),
    "a record of lists": Written(
        {"conversations": {"role": ["user", "assistant"], "content": [CIRCLE, "red"]}, "image": "1.png"}
    ),
    "a record of lists of LLaVA": Written(
        {"conversations": {"from": ["human", "gpt"], "value": [CIRCLE, "red"]}, "images": ["1.png"]}
    ),
    "path without bytes": Written({"messages": talk(CIRCLE, "red"), "images": [{"bytes": None, "path": "1.png"}]}),
    "a record of a path": Written({"messages": talk(CIRCLE, "red"), "image": {"path": "1.png"}}),
    "a record of an address": Written({"messages": talk(CIRCLE, "red"), "images": [{"url": "1.png"}]}),
    "image_path": Written({"conversations": talk(CIRCLE, "red"), "image_path": "1.png"}),
    "bare parts": Written(
        {"messages": turns(0), "images": ["1.png"]}, form="messages of parts + images"
    ),
    "parts with names": Written({"messages": turns({"type": "image", "image": "1.png"})}),
    "parts with names that the row repeats": Written(
        {"messages": turns({"type": "image", "image": "1.png"}), "images": ["1.png"]}
    ),
    "parts with paths": Written({"messages": turns({"type": "image_url", "image_url": {"url": "1.png"}})}),
    "parts with a text": Written({"messages": turns({"type": "image_url", "image_url": "1.png"})}),
    "parts by number": Written(
        {"messages": turns({"type": "image", "index": 1}, {"type": "image", "index": 0}), "images": ["1.png", "2.png"]},
        talk("<image>\n<image>\nWhat colour is the circle?", "red"),
        [2, 1],
        name="2.png",
    ),
    "caption": Written({"image": "1.png", "caption": "a red circle"}, DESCRIBED, form="image + caption"),
    "Chinese caption": Written(
        {"image_path": "1.png", "caption": "一个红色的圆"}, talk("<image>\n描述这张图片。", "一个红色的圆")
    ),
    "file name and text": Written({"file_name": "1.png", "text": "a red circle"}, DESCRIBED),
    "captions": Written(
        {"image": "1.png", "captions": ["a red circle", "a circle"]}, DESCRIBED, notes=(SEVERAL_CAPTIONS,)
    ),
    "question and answer": Written(
        {"image": "1.png", "question": "What colour is the circle?", "answer": "red"}, form="question + answer + image"
    ),
    "a query after others": Written(
        {
            "query": "Sure?",
            "response": "yes",
            "history": [[CIRCLE, "red"], ["And now?", "red"]],
            "images": ["1.png"],
        },
        talk(CIRCLE, "red", "And now?", "red", "Sure?", "yes"),
        form="query + response + images",
    ),
    "a query after none": Written(
        {"query": CIRCLE, "response": "red", "history": [], "images": ["1.png"]}, form="query + response + images"
    ),
    "file_names of imagefolder": Written(
        {"file_names": ["1.png", "2.png"], "question": "Which?", "answer": "two"},
        talk("<image>\n<image>\nWhich?", "two"),
        [1, 2],
    ),
    "question and answers": Written(
        {"image": "1.png", "question": "What colour is the circle?", "answers": ["red", "dark red"]},
        notes=(SEVERAL_ANSWERS,),
    ),
    "begins with an answer": Written(
        {"conversations": [{"role": "gpt", "content": "Hello."}, *talk(CIRCLE, "red")], "image": "1.png"},
        notes=(ANSWER_FIRST,),
    ),
    "a mark in an answer": Written(
        {"conversations": talk("What is it?", "<image>\nred"), "image": "1.png"},
        talk("What is it?", "<image>\nred"),
        notes=(MARK_IN_ANSWER,),
    ),
    "a mark in every question": Written(
        {"conversations": talk(CIRCLE, "red", "<image>\nWhere?", "there", "Why <image>?", "so"), "image": "1.png"},
        talk(CIRCLE, "red", "Where?", "there", "Why ?", "so"),
        notes=(MARK_PER_TURN,),
    ),
    "no mark": Written({"conversations": talk("Two and two?", "four"), "image": "1.png"}, talk("Two and two?", "four")),
    "no picture": Written({"messages": talk("Two and two?", "four"), "images": None}, talk("Two and two?", "four"), []),
}  # fmt: skip
INLINE = {
    "base64": Written({"conversations": talk(CIRCLE, "red"), "image": text_of(1)}),
    "a list of base64": Written({"messages": talk(CIRCLE, "red"), "images": [text_of(1)]}),
    "a data URI": Written({"messages": talk(CIRCLE, "red"), "images": [URI]}),
    "base64 in bytes": Written({"messages": talk(CIRCLE, "red"), "images": [{"bytes": text_of(1), "path": None}]}),
    "parts with a data URI": Written({"messages": turns({"type": "image_url", "image_url": {"url": URI}})}),
    "parts with base64": Written({"messages": turns({"type": "image", "base64": text_of(1)})}),
    "caption of base64": Written({"image": text_of(1), "caption": "a red circle"}, DESCRIBED),
}
CELLS = [{"bytes": picture(1), "path": None}]
TWO = [*CELLS, {"bytes": picture(2), "path": None}]
TEXTS = [{"user": "What colour is the circle?", "assistant": "red", "source": "made"}]
PACKED = {
    "bytes": Written({"conversations": talk(CIRCLE, "red"), "image_bytes": picture(1)}),
    "a list of bytes": Written({"messages": talk(CIRCLE, "red"), "images": [picture(1)]}, form="messages + images"),
    "a record": Written({"messages": talk(CIRCLE, "red"), "image": CELLS[0]}),
    "records": Written({"messages": talk(CIRCLE, "red"), "images": CELLS}),
    "texts": Written({"texts": TEXTS, "images": CELLS}, form="texts + images"),
    "texts of two": Written(
        {"texts": [*TEXTS, {"user": "Where?", "assistant": "there", "source": None}], "images": TWO},
        talk("<image>\n<image>\nWhat colour is the circle?", "red", "Where?", "there"),
        [1, 2],
    ),
    "parts": Written({"messages": turns(0), "images": CELLS}),
    "parts by number": Written(
        {"messages": turns({"type": "image", "index": 1}, {"type": "image", "index": 0}), "images": TWO},
        talk("<image>\n<image>\nWhat colour is the circle?", "red"),
        [2, 1],
    ),
    "parts with bytes": Written({"messages": turns({"type": "image", "image": CELLS[0]})}),
    "caption": Written({"image": CELLS[0], "caption": "a red circle"}, DESCRIBED, form="image + caption"),
    "caption of a tar": Written({"jpg": picture(1), "txt": "a red circle"}, DESCRIBED),
    "a mark in every question": Written(
        {"messages": talk(CIRCLE, "red", "<image>Where?", "there"), "images": CELLS},
        talk(CIRCLE, "red", "Where?", "there"),
        notes=(MARK_PER_TURN,),
    ),
    "a mark in every question of a list": Written(
        {"messages": talk(CIRCLE, "red", "<image>Where?", "there"), "images": [picture(1)]},
        talk(CIRCLE, "red", "Where?", "there"),
        notes=(MARK_PER_TURN,),
    ),
    "a picture for every question": Written(
        {"messages": talk(CIRCLE, "red", "<image>Where?", "there"), "images": [picture(1), picture(2)]},
        talk(CIRCLE, "red", "<image>Where?", "there"),
        [1, 2],
    ),
    "no mark": Written({"messages": talk("Two and two?", "four"), "images": CELLS}, talk("Two and two?", "four")),
    "no picture": Written({"messages": talk("Two and two?", "four"), "images": []}, talk("Two and two?", "four"), []),
}  # fmt: skip


def write_rows(folder, kind, rows):
    """A file or folder of these rows."""
    if kind in ("jsonl", "json", "pretty", "below a key"):
        path = folder / ("rows.jsonl" if kind in ("jsonl", "pretty") else "rows.json")
        text = {
            "jsonl": lambda: "\n".join(map(json.dumps, rows)),
            "json": lambda: json.dumps(rows),
            "pretty": lambda: "\n".join(json.dumps(row, indent=2) for row in rows),
            "below a key": lambda: json.dumps({"version": 1, "data": rows}),
        }[kind]()
        path.write_text(text)
        return path
    if kind == "saved":
        datasets = pytest.importorskip("datasets", reason="the extra `datasets` is not installed")
        datasets.Dataset.from_list(rows).save_to_disk(folder / "set")
        return folder / "set"
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet", row_group_size=2)
    return folder / "rows.parquet"


def assert_read(rows, written, named):
    for index in (2, 0, 1):
        row = rows.row(index)
        names = [f"{number}.png" for number in written.pictures]
        assert row.conversations == written.messages
        assert row.images == (names if named else [f"image {n}" for n in range(1, len(names) + 1)])
        assert (row.notes, row.extra) == (written.notes, {"id": 7})
        assert written.form in ("", row.form)
        contents = [rows.picture(index, position, name) for position, name in enumerate(row.images)]
        assert contents == [picture(number) for number in written.pictures]


TEXT_KINDS = ["jsonl", "json", "pretty", "below a key"]


@pytest.mark.parametrize("kind", [*TEXT_KINDS, "parquet", "saved"])
@pytest.mark.parametrize("form", NAMED)
def test_a_row_with_names_is_the_same_in_every_file(tmp_path, form, kind):
    for number in (1, 2):
        (tmp_path / f"{number}.png").write_bytes(picture(number))
    path = write_rows(tmp_path, kind, [NAMED[form].fields | {"id": 7}] * 3)
    assert_read(open_rows(path, tmp_path), NAMED[form], named=True)


@pytest.mark.parametrize("kind", [*TEXT_KINDS, "parquet", "saved"])
@pytest.mark.parametrize("form", INLINE)
def test_a_row_with_pictures_as_text_is_the_same_in_every_file(tmp_path, form, kind):
    path = write_rows(tmp_path, kind, [INLINE[form].fields | {"id": 7}] * 3)
    assert_read(open_rows(path), INLINE[form], named=False)


@pytest.mark.parametrize("kind", ["parquet", "saved"])
@pytest.mark.parametrize("form", PACKED)
def test_a_row_with_pictures_as_bytes_is_the_same_in_every_file(tmp_path, form, kind):
    path = write_rows(tmp_path, kind, [PACKED[form].fields | {"id": 7}] * 3)
    rows = open_rows(path)
    assert_read(rows, PACKED[form], named=False)
    assert_read(pickle.loads(pickle.dumps(rows)), PACKED[form], named=False)


@pytest.mark.parametrize("form", PACKED)
@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_a_conversion_gives_the_row_in_the_usual_form(tmp_path, form, ending):
    rows = open_rows(write_rows(tmp_path, "parquet", [PACKED[form].fields | {"id": 7}] * 3))
    converted = open_rows(*convert(rows, tmp_path / f"out.{ending}").files)
    for index in range(3):
        row = converted.row(index)
        assert (row.conversations, row.extra, row.notes) == (PACKED[form].messages, {"id": 7}, ())
        assert [converted.picture(index, n, name) for n, name in enumerate(row.images)] == [
            picture(number) for number in PACKED[form].pictures
        ]


# --- what is not read -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "kind", "message"),
    [
        ({"messages": turns({"type": "image", "index": 5}), "images": ["1.png"]}, "placeholders", "to image 5, but"),
        ({"messages": turns({"type": "image", "index": 0}), "images": ["1.png", "2.png"]}, "placeholders", "2"),
        ({"messages": turns({"type": "image", "image": "1.png"}), "images": ["3.png", "4.png"]}, "placeholders", "own"),
        ({"messages": [{"role": "user", "content": [5]}]}, "conversations", "message 1"),
        ({"conversations": {"role": ["user"], "content": []}}, "conversations", "different lengths"),
        ({"conversations": "[{"}, "json", "conversations"),
        ({"texts": [{"user": "?"}, {"assistant": "!"}]}, "conversations", "texts"),
        ({"image": "1.png", "caption": [3]}, "conversations", "caption"),
        ({"messages": talk(CIRCLE, "red"), "image": "1.png", "images": ["2.png"]}, "image", "different"),
        ({"messages": talk(CIRCLE, "red"), "images": [{"width": 3}]}, "image", "needs bytes, path or url"),
        ({"messages": talk(CIRCLE, "red"), "image": 5}, "image", "image"),
        ({"query": "?", "response": "!", "history": ["a"], "image": "1.png"}, "conversations", "history"),
        ({"image": "1.png", "question": "?", "answer": 0}, "conversations", "`answer` is the number 0"),
        ({"image": "1.png", "question": "?", "answer": 3}, "conversations", "`answer` is the number 3"),
        ({"image": "http://example.org/1.png", "caption": "a"}, "images not read", "does not download images"),
    ],
)  # fmt: skip
def test_what_a_row_says_wrongly_is_named(fields, kind, message):
    with pytest.raises(RowError, match=message) as caught:
        read_row(fields)
    assert caught.value.kind == kind
    assert len(str(caught.value)) < 300


def test_a_field_of_the_system_is_the_first_message():
    row = read_row({"system": "Answer in one word.", "conversations": talk(CIRCLE, "red"), "image": "a.jpg"})
    assert row.conversations == [{"role": "system", "content": "Answer in one word."}, *talk(CIRCLE, "red")]
    assert (row.images, row.extra) == (["a.jpg"], {})
    own = [{"role": "system", "content": "Be brief."}, *talk(CIRCLE, "red")]
    row = read_row({"system": "Answer in one word.", "messages": own, "images": ["a.jpg"]})
    assert (row.conversations, row.extra) == (own, {"system": "Answer in one word."})
    assert read_row({"system": "", "messages": talk("What?", "A.")}).conversations == talk("What?", "A.")


TOOLS = [{"name": "count", "parameters": {"image_path": "string"}}]
CALL = {"name": "count", "arguments": {"what": "cups"}}


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS)])
@pytest.mark.parametrize("call", [json.dumps(CALL), json.dumps([CALL]), CALL, [CALL]])
def test_the_tools_of_sharegpt_are_those_of_messages(tools, call):
    texts = {"human": "How many?", "function_call": call, "observation": "3", "gpt": "Three."}
    row = read_row({"conversations": [{"from": role, "value": text} for role, text in texts.items()], "tools": tools})
    system, question, answer, response, last = row.conversations
    assert system == {"role": "system", "content": None, "tools": TOOLS}
    assert (question, last) == tuple({"role": role, "content": text} for role, text in
                                     (("user", "How many?"), ("assistant", "Three.")))  # fmt: skip
    assert answer == {"role": "assistant", "content": None, "tool_calls": [CALL]}
    assert response == {"role": "tool", "content": "3"}
    assert row.extra == {}


def test_tools_stand_in_the_system_message():
    own = {"role": "system", "content": "Be brief."}
    messages = talk("What?", "A.")
    assert read_row({"messages": [own, *messages], "tools": TOOLS}).conversations[0] == own | {"tools": TOOLS}
    assert read_row({"messages": messages, "system": "Be brief.", "tools": TOOLS}).conversations[0] == own | {
        "tools": TOOLS
    }
    for listed in (own | {"tools": TOOLS}, {"role": "system", "content": "You have <tools>\n[]</tools>"}):
        row = read_row({"messages": [listed, *messages], "tools": [{"name": "f"}]})
        assert row.conversations[0] == listed


@pytest.mark.parametrize("tools", [None, "", [], "[]", "hammer, saw", ["hammer"], '["hammer"]', "[draft] saw"])
def test_a_field_of_tools_without_objects_is_not_read(tools):
    row = read_row({"conversations": talk("What?", "A."), "tools": tools})
    assert (row.conversations, row.extra) == (talk("What?", "A."), {"tools": tools})


def test_a_call_that_is_not_json_is_named():
    conversation = [{"from": "human", "value": "q"}, {"from": "function_call", "value": "count(cups)"}]
    with pytest.raises(RowError, match="a message of the role function_call is not JSON"):
        read_row({"conversations": conversation})


@pytest.mark.parametrize("empty", ["[]", b"[]", "{}", [], None])
def test_an_empty_conversation_gives_way_to_the_other_field(empty):
    messages = talk("What?", "A.")
    for value in (messages, json.dumps(messages)):
        assert read_row({"conversations": empty, "messages": value}).conversations == messages


@pytest.mark.parametrize(
    "fields",
    [{"image": "a.jpg", "caption": ""}, {"image": "a.jpg", "question": "What?", "answer": None, "id": 3}],
)
def test_an_empty_answer_is_named(tmp_path, fields):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(fields))
    with pytest.raises(DataError, match=r"rows.jsonl:1: `(caption|answer)` is empty"):
        convert(open_rows(path), tmp_path / "out.parquet")
    assert not (tmp_path / "out.parquet").exists()


def test_a_row_of_no_form_is_named_with_what_would_be_read(tmp_path):
    row = read_row({"prompt": "a", "x": 1})
    assert row.form == ""
    with pytest.raises(RowError, match="no conversation in prompt, x — a row needs `conversations`"):
        check_form(row)
    assert read_row({"messages": talk(CIRCLE, "red"), "images": ["a.png"]}).form == "messages + images"
    pq.write_table(pa.table({"prompt": ["a"]}), tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=r"no column `conversations`, only prompt — a row needs"):
        open_rows(tmp_path / "rows.parquet")
    (tmp_path / "one.json").write_text('{"info": {}, "licences": [{"id": 1}]}')
    with pytest.raises(DataError, match="neither a row nor a list of rows"):
        open_rows(tmp_path / "one.json")


def test_a_caption_whose_picture_is_null_is_not_trained_on_blind(tmp_path):
    columns = {"image": pa.array([CELLS[0], None, {"bytes": None, "path": None}]), "caption": ["a", "b", "c"]}
    pq.write_table(pa.table(columns), tmp_path / "rows.parquet")
    rows = open_rows(tmp_path / "rows.parquet")
    assert rows.row(0).images == ["image 1"]
    for index in (1, 2):
        with pytest.raises(RowError, match="no image"):
            rows.row(index)


def some_value(rng, depth=0):
    if depth > 3 or rng.random() < 0.4:
        return rng.choice(
            [None, "", "a.png", CIRCLE, "user", "gpt", 3, -1, 1.5, True, URI[:90], b"x", "http://a/b.png"]
        )
    if rng.random() < 0.5:
        return [some_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    keys = ["role", "content", "from", "value", "type", "text", "image", "bytes", "path", "user", "assistant", "index"]
    return {key: some_value(rng, depth + 1) for key in rng.sample(keys, rng.randrange(5))}


@pytest.mark.parametrize("seed", range(4))
def test_whatever_stands_in_a_row_ends_as_a_row_or_as_its_own_error(seed, demo_tokenizer):
    rng, encoder = random.Random(seed), PromptEncoder(demo_tokenizer, PATCHES)
    names = [
        "conversations",
        "messages",
        "texts",
        "image",
        "images",
        "image_bytes",
        "caption",
        "question",
        "answer",
        "img",
    ]
    for _ in range(3000):
        fields = {name: some_value(rng) for name in rng.sample(names, rng.randrange(1, 4))}
        if rng.random() < 0.5:
            fields[rng.choice(["conversations", "messages"])] = [
                {rng.choice(["role", "from"]): rng.choice(["user", "gpt", some_value(rng)]), "content": some_value(rng)}
                for _ in range(rng.randrange(1, 5))
            ]
        with suppress(RowError):
            row = read_row(fields)
            encoder.row(row.conversations, len(row.images), 200)


def test_deep_nesting_is_one_broken_row():
    cell: Any = "a.png"
    for _ in range(100_000):
        cell = [cell]
    with pytest.raises(RowError, match="too deep"):
        read_row({"messages": talk(CIRCLE, "red"), "images": cell})


# --- parquet ----------------------------------------------------------------------------------------------------------

TYPES = {
    "large binary": pa.large_binary(),
    "fixed-size binary": pa.binary(len(picture(1))),
    "binary view": pa.binary_view(),
    "list": pa.list_(pa.binary()),
    "fixed-size list": pa.list_(pa.binary(), 1),
    "large list": pa.large_list(pa.large_binary()),
    "list view": pa.list_view(pa.binary()),
    "large list view": pa.large_list_view(pa.binary()),
    "fixed-size list of records": pa.list_(pa.struct({"bytes": pa.binary(), "path": pa.string()}), 1),
    "record without a path": pa.struct({"bytes": pa.large_binary()}),
    "record of lists": pa.struct({"bytes": pa.list_(pa.binary()), "path": pa.list_(pa.string())}),
}


@pytest.mark.parametrize("kind", TYPES)
def test_pictures_are_read_from_columns_of_every_type(tmp_path, kind):
    cell: Any = picture(1)
    if kind == "record of lists":
        cell = {"bytes": [cell], "path": [None]}
    elif "record" in kind:
        cell = {"bytes": cell}
    if "list" in kind and kind != "record of lists":
        cell = [cell]
    columns = {
        "conversations": pa.array([json.dumps(talk(CIRCLE, "red"))] * 3, pa.string_view()),
        "image_bytes": pa.array([cell] * 3, TYPES[kind]),
        "id": pa.array([7] * 3),
    }
    pq.write_table(pa.table(columns), tmp_path / "rows.parquet")
    assert_read(open_rows(tmp_path / "rows.parquet"), PACKED["bytes"], named=False)


def test_names_in_a_dictionary_column_are_read(tmp_path):
    (tmp_path / "1.png").write_bytes(picture(1))
    columns = {name: pa.array([cell] * 3) for name, cell in NAMED["as published"].fields.items() if name == "image"}
    columns |= {"conversations": pa.array([json.dumps(talk(CIRCLE, "red"))] * 3), "id": pa.array([7] * 3)}
    encoded = {name: column.dictionary_encode() if name != "id" else column for name, column in columns.items()}
    pq.write_table(pa.table(encoded), tmp_path / "rows.parquet")
    assert_read(open_rows(tmp_path / "rows.parquet", tmp_path), NAMED["as published"], named=True)


def test_bytes_and_names_may_change_from_row_to_row(tmp_path):
    (tmp_path / "1.png").write_bytes(picture(1))
    cells = [{"bytes": picture(1), "path": "x.png"}, {"bytes": None, "path": "1.png"}]
    pq.write_table(pa.table({"messages": [talk(CIRCLE, "red")] * 2, "image": cells}), tmp_path / "rows.parquet")
    rows = open_rows(tmp_path / "rows.parquet", tmp_path)
    assert [rows.picture(n, 0, rows.row(n).images[0]) for n in range(2)] == [picture(1)] * 2


def test_shards_whose_columns_stand_in_another_order_are_one_set(tmp_path):
    columns = {"conversations": [json.dumps(talk(CIRCLE, "red"))] * 2, "image_bytes": [picture(1)] * 2, "id": [7, 7]}
    pq.write_table(pa.table(columns), tmp_path / "train-00000.parquet")
    pq.write_table(pa.table({name: columns[name] for name in reversed(columns)}), tmp_path / "train-00001.parquet")
    assert_read(open_rows(tmp_path), PACKED["bytes"], named=False)
    rows = open_rows(tmp_path)
    assert [rows.picture(n, 0, "image 1") for n in range(4)] == [picture(1)] * 4
    pq.write_table(pa.table(columns | {"image_bytes": ["1.png"] * 2}), tmp_path / "train-00002.parquet")
    with pytest.raises(DataError, match=r"00002\.parquet: `image_bytes` is string, and binary in"):
        open_rows(tmp_path)


@pytest.mark.parametrize("kind", ["text", "records"])
def test_one_bad_byte_of_text_is_one_broken_row(tmp_path, demo_tokenizer, kind):
    talks = [talk(f"<image>\nQuestion {n}?", "red") for n in range(60)]
    cells = talks if kind == "records" else list(map(json.dumps, talks))
    columns = {"conversations": cells, "image_bytes": [picture(1)] * 60}
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table(columns), path, compression="none", use_dictionary=False, row_group_size=20)
    data = path.read_bytes()
    position = data.index(b"Question 25")
    path.write_bytes(data[:position] + b"\xff" + data[position + 1 :])
    rows = RowDataset(open_rows(path), PromptEncoder(demo_tokenizer, PATCHES), SIZE, 200)
    broken = {n: text.message for n in range(60) if isinstance(text := rows.text(n), BrokenRow)}
    assert list(broken) == [25]
    assert "`conversations` cannot be read ('utf-8'" in broken[25]
    assert summary(check(rows, 1), 0.05)["usable"] == 59


def test_tokens_are_made_without_reading_pictures(tmp_path, monkeypatch):
    from minimind_v.core.rows import parquet

    rows = open_rows(write_rows(tmp_path, "parquet", [PACKED["texts"].fields] * 3))
    monkeypatch.setattr(parquet.ParquetRows, "_cells", lambda *args: pytest.fail("a picture was read"))
    assert rows.row(1).conversations == PACKED["texts"].messages


# --- notes ------------------------------------------------------------------------------------------------------------


def test_what_a_row_is_read_as_is_noted_and_counted(tmp_path, demo_tokenizer):
    (tmp_path / "1.png").write_bytes(picture(1))
    written = [form for form in NAMED.values() if form.notes]
    assert {note for form in written for note in form.notes} == set(NOTES)
    path = write_rows(tmp_path, "jsonl", [form.fields for form in written] + [NAMED["as published"].fields])
    rows = RowDataset(open_rows(path, tmp_path), PromptEncoder(demo_tokenizer, PATCHES), SIZE, 200)
    examples = [rows.text(n) for n in range(len(rows))]
    assert all(isinstance(example, Example) for example in examples)
    assert collate(examples, [], 0).notes == dict.fromkeys(NOTES, 1)
    report = summary(check(rows, 1), 0.01)
    assert (report["usable"], report["ok"]) == (6, True)
    assert {note: entry["count"] for note, entry in report["notes"].items()} == dict.fromkeys(NOTES, 1)
    assert report["notes"][MARK_PER_TURN]["message"].startswith("1 of 6 rows have one image and <image> in every")


# --- the cases that people brought ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        *("messages_images/rows.json", "messages_images/rows.jsonl", "conversations_images/rows.json"),
        *("conversations_images/rows.jsonl", "content_parts/conversations.jsonl", "content_parts/messages.jsonl"),
        *("gpt_first/rows.json", "mark_per_turn/rows.jsonl", "captions/array.jsonl", "captions/dict.json"),
        *("captions/lines.json", "captions/pretty.jsonl", "parquet_forms", "t2t_black/sft_i2t.parquet"),
    ],
)
def test_the_cases_are_read(name):
    if not CASES.is_dir():
        pytest.skip("the cases are not beside the checkout")
    path = CASES / name
    beside = (path if path.is_dir() else path.parent) / "pictures"
    pictures = beside if beside.is_dir() else None
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    for file in files:
        rows = open_rows(file, pictures)
        for index in range(len(rows)):
            row = rows.row(index)
            texts = [message["content"] for message in row.conversations if message["role"] != "system"]
            assert len(texts) % 2 == 0, file
            assert sum(text.count("<image>") for text in texts) == len(row.shown), file
            for position, image_digest in enumerate(row.shown):
                data = rows.picture(index, position, image_digest)
                assert data[:2] == b"\xff\xd8", file
                if pictures is not None and len(data) == 2739:
                    assert data in [other.read_bytes() for other in pictures.iterdir()], file
            if texts[0].endswith("What colour is the circle?"):
                assert texts[1] == "red", file


@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_bytes_beside_named_pictures_are_not_copied(tmp_path, kind):
    (tmp_path / "1.png").write_bytes(picture(1))
    written = {"messages": talk("<image>", "red"), "image": "1.png", "png": picture(2), "id": 7}
    rows = open_rows(write_rows(tmp_path, kind, [written] * 3), tmp_path)
    assert rows.row(1).extra == {"id": 7}
    assert rows.picture(1, 0, "1.png") == picture(1)


def test_a_row_has_a_bounded_number_of_pictures_and_messages(demo_tokenizer):
    with pytest.raises(RowError, match="20,000 images; a row has at most 10,000"):
        read_row({"messages": talk("<image>" * 20_000, "Many."), "images": ["a.jpg"] * 20_000})
    conversation = read_row({"messages": talk("What?", "A.") * 10_000}).conversations
    with pytest.raises(RowError, match="20,000 messages; a row has at most 10,000"):
        PromptEncoder(demo_tokenizer, PATCHES).row(conversation, 0, 512)


def test_base64_is_read_on_several_lines_unpadded_and_in_the_alphabet_of_addresses():
    data = bytes(range(256)) + b"\xff"  # whose base64 has both letters of that alphabet, and ends with padding
    plain = base64.b64encode(data).decode()
    for text in (plain, plain.rstrip("="), base64.urlsafe_b64encode(data).decode(), f"{plain[:40]}\r\n {plain[40:]}"):
        assert decode_base64(text) == data
    with pytest.raises(ValueError, match="base64"):
        decode_base64("not base64!")
