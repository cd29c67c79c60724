"""Rows with pictures that a model would not be shown: text rows, which are fine, and names that are not read."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from minimind_v.core.curate.convert import convert
from minimind_v.core.data.batch import collate
from minimind_v.core.data.dataset import BrokenRow, Example, RowDataset
from minimind_v.core.data.prompt import PromptEncoder
from minimind_v.core.errors import RowError
from minimind_v.core.rows.heldout import digests_of, group_by_picture
from minimind_v.core.rows.stores import open_rows
from minimind_v.core.rows.unread import KIND
from tests.rows.made import PATCHES, SIZE, picture


def talk(question="What colour is it?", answer="Red.", **more):
    return [{"role": "user", "content": question, **more}, {"role": "assistant", "content": answer}]


def line(question="What colour is it?", answer="Red.", **keys):
    return {"conversations": talk(question, answer)} | keys


NOT_READ = {
    "image_path": line(image_path="a"),
    "beside an empty image": line(image="", image_path="a.jpg"),
    "fetched from elsewhere": line("<image>What?", image="https://example.org/a.jpg"),
    "fetched from elsewhere, in a list": line("<image>What?", images=[{"url": "s3://bucket/a.jpg"}]),
    "a part of a video": {"messages": [{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}]},
    "a part of sound": {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]},
    "a part whose picture has another name": {
        "messages": [{"role": "user", "content": ["What?", {"type": "image", "image_id": 17}]}]
    },
    "imagePath": line(imagePath="a.bmp"),
    "img": line(img="000012"),
    "Picture_Files": line(Picture_Files=["a", "b"]),
    "photo1": line(photo1="x"),
    "video": line(video="clip.mp4"),
    "videos": line(videos=["clip"]),
    "image_id": line(image_id=458752),
    "image_url": line(image_url={"url": "https://example.org/a"}),
    "bytes and path": line(pictures=[{"bytes": None, "path": "a.png"}]),
    "base64": line(image_base64="/9j/4AAQSkZJRg"),
    "base64 under another key": line(blob="iVBORw0KGgoAAAANSUhEUg"),
    "data URI": line(blob="data:image/png;base64,AAAA"),
    "a file under another key": line(file="train2017/000000033471.jpg"),
    "an address": line(url="https://example.org/a.webp?width=3"),
    "deep": line(meta={"source": {"image": "a"}}),
    "图片": line(**{"图片": "甲"}),
    "in a message": {"conversations": talk(image="a.jpg")},
    "in a message of LLaVA": {
        "conversations": [{"from": "human", "value": "What?", "images": ["a.jpg"]}, {"from": "gpt", "value": "Red."}]
    },
    "Qwen-VL": line("Picture 1: <img>a.jpg</img>\nWhat colour is it?"),
    "Qwen-VL beside a picture": line("<image><img>b.jpg</img>", image="a.jpg"),
    "numbered": line("Compare <image1> with <image2>."),
    "numbered, with the pictures": line("<image_1>\nWhat?", image="a.jpg"),
    "numbered, spaced": line("<image 1> What?"),
    "pipes": line("<|image_1|>\nWhat?"),
    "Qwen2-VL": line("<|vision_start|><|image_pad|><|vision_end|>What?"),
    "video mark": line("<video>\nWhat happens?"),
    "video mark inside": line("What happens in <video>?"),
    "bare img": line("<img>\nWhat?"),
    "capitals": line("<IMAGE>\nWhat?", image="a.jpg"),
    "InternLM": line("<ImageHere>What?"),
    "placeholder": line("<image_placeholder>What?"),
    "Gemma": line("<start_of_image>What?"),
    "Pixtral": line("[IMG]What?"),
    "HTML": line('<img src="a.jpg">\nWhat colour is it?'),
    "Markdown": line("![a shape](pictures/a.png) What colour is it?"),
}
READ = {
    "text": line(),
    "empty keys": line(images=[], video=None, image_path="", img="none", pictures=[{"bytes": None, "path": None}]),
    "about pictures": line(image_width=640, image_count=0, has_image=False, n_images=3, image_caption="A dog on grass"),
    "no id": line(image_id=-1),
    "other keys": line(id="x17", source="alpaca", file="main.py", url="https://example.org/page.html", score=0.3),
    "a page": line("Why is this not centred?\n<div><img src='a.jpg'></div>"),
    "a tag": line("How does the <video> tag of HTML work?"),
    "types": line("std::vector<Image> v; List<Picture> w; what is wrong? And a Map<String, Video>?"),
    "words": line("Is <topic> or <television> or <division> right? a[img] = {image}"),
    "an answer about tags": line("How do I embed it?", "Use <video> or <image1> or ![x](y.png)."),
    "a picture with more keys": line("<image>What?", image="a.jpg", image_path="x/a.jpg", video="v.mp4"),
}


@pytest.fixture
def opened(tmp_path, demo_tokenizer):
    (tmp_path / "a.jpg").write_bytes(picture(1))

    def make(rows, name="rows.jsonl"):
        path = tmp_path / name
        text = json.dumps(rows) if name.endswith(".json") else "\n".join(map(json.dumps, rows))
        path.write_text(text, encoding="utf-8")
        return RowDataset(open_rows(path, tmp_path), PromptEncoder(demo_tokenizer, PATCHES), SIZE, 200)

    return make


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
@pytest.mark.parametrize("form", NOT_READ)
def test_a_row_whose_picture_is_not_read_is_named_and_left_out(opened, form, name):
    rows = opened([line(), NOT_READ[form]], name)
    result = rows.text(1)
    assert isinstance(result, BrokenRow), form
    assert result.kind == KIND
    assert len(result.message) < 250
    assert isinstance(rows.text(0), Example)


@pytest.mark.parametrize("form", READ)
def test_a_row_that_only_speaks_of_pictures_is_trained_on(opened, form):
    result = opened([READ[form]]).text(0)
    assert isinstance(result, Example), result


@pytest.mark.parametrize("column", ["picture", "jpg", "blob", "video_bytes"])
def test_a_column_of_pictures_that_is_not_read_is_named(tmp_path, column):
    columns = {"conversations": [json.dumps(talk(f"{n}?")) for n in range(4)]}
    columns[column] = pa.array([picture(1), None, b"", picture(2)], pa.binary())
    pq.write_table(pa.table(columns), tmp_path / "rows.parquet")
    rows = open_rows(tmp_path / "rows.parquet")
    for index in (0, 3):
        with pytest.raises(RowError, match=column) as error:
            rows.row(index)
        assert error.value.kind == KIND
    assert rows.row(1).images == rows.row(2).images == []


def test_a_column_of_bytes_beside_the_pictures_is_reported(tmp_path):
    columns = {"conversations": [json.dumps(talk("<image>?"))], "image_bytes": [picture(1)], "thumbnail": [picture(2)]}
    pq.write_table(pa.table(columns), tmp_path / "rows.parquet")
    messages = []
    assert open_rows(tmp_path / "rows.parquet", say=messages.append).row(0).images == ["image 1"]
    assert messages == [f"{tmp_path / 'rows.parquet'}: the bytes in thumbnail are ignored and not copied"]


def test_a_video_beside_the_pictures_of_a_saved_set_is_reported(tmp_path):
    datasets = pytest.importorskip("datasets", reason="the extra `datasets` is not installed")
    columns = {"question": ["?"], "answer": ["!"], "image": [picture(1)], "clip": [{"bytes": b"abc", "path": None}]}
    kinds = {name: datasets.Value("string") for name in ("question", "answer")}
    features = datasets.Features(kinds | {"image": datasets.Value("binary"), "clip": datasets.Video()})
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(tmp_path / "set")
    messages = []
    row = open_rows(tmp_path / "set", say=messages.append).row(0)
    assert (row.images, row.extra) == (["image 1"], {})
    assert messages == [f"{tmp_path / 'set'}: the bytes in clip are ignored and not copied"]


def test_a_column_of_pictures_may_be_called_as_a_file_name(tmp_path):
    columns = {"conversations": [json.dumps(talk("<image>?"))], "photo_file_name": [picture(1)]}
    pq.write_table(pa.table(columns), tmp_path / "rows.parquet")
    rows = open_rows(tmp_path / "rows.parquet")
    assert rows.row(0).images == ["image 1"]
    assert rows.picture(0, 0, "image 1") == picture(1)


def test_names_in_a_column_of_parquet_are_named(tmp_path):
    columns = {"messages": [talk(), talk("!")], "img_path": ["a.jpg", "b.jpg"]}
    pq.write_table(pa.table(columns), tmp_path / "rows.parquet")
    with pytest.raises(RowError, match="`img_path`"):
        open_rows(tmp_path / "rows.parquet").row(1)


@pytest.mark.parametrize("kind", ["pictures", "video"])
def test_a_saved_column_that_is_not_read_is_named(tmp_path, kind):
    datasets = pytest.importorskip("datasets", reason="the extra `datasets` is not installed")
    cells = [{"bytes": picture(1), "path": None}]
    feature = datasets.Image() if kind == "pictures" else datasets.Video(decode=False)
    dataset = datasets.Dataset.from_dict({"messages": [talk()], kind: cells}).cast_column(kind, feature)
    dataset.save_to_disk(tmp_path / "set")
    with pytest.raises(RowError, match=kind) as error:
        open_rows(tmp_path / "set").row(0)
    assert error.value.kind == KIND


# --- text rows --------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["jsonl", "parquet"])
def text_rows(request, tmp_path, demo_tokenizer):
    """Rows with a picture, and every third without a mark: these carry one and the same file, which is no picture."""
    talks = [talk("<image>?" if n % 3 else f"Number {n}?") for n in range(12)]
    data = [picture(n) if n % 3 else b"not a picture" for n in range(12)]
    if request.param == "parquet":
        columns = {"conversations": list(map(json.dumps, talks)), "image_bytes": data}
        pq.write_table(pa.table(columns), tmp_path / "rows.parquet")
        return RowDataset(open_rows(tmp_path / "rows.parquet"), PromptEncoder(demo_tokenizer, PATCHES), SIZE, 200)
    for n, content in enumerate(data):
        (tmp_path / f"{n if n % 3 else 0}.png").write_bytes(content)
    lines = [
        json.dumps({"conversations": conversation, "image": f"{n if n % 3 else 0}.png"})
        for n, conversation in enumerate(talks)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    return RowDataset(open_rows(tmp_path / "rows.jsonl", tmp_path), PromptEncoder(demo_tokenizer, PATCHES), SIZE, 200)


def test_a_text_row_is_trained_on_without_its_picture(text_rows):
    examples = [text_rows.text(n) for n in range(12)]
    for n, example in enumerate(examples):
        read = text_rows.load(example)
        assert isinstance(read, Example), read
        assert (read.tokens.unmarked, len(read.images)) == ((0, 1) if n % 3 else (1, 0))
    batch = collate(examples, [], 0)
    assert (batch.text_rows, len(batch.pixel_values)) == (4, 8)


def test_text_rows_are_held_out_by_their_text(text_rows):
    groups = group_by_picture(text_rows.rows, lambda index, error: pytest.fail(str(error)))
    assert len(np.unique(groups)) == 12, "one black picture in many rows does not bind them together"
    assert len({digest for n in range(12) for digest in digests_of(text_rows.rows, n)}) == 12


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_a_conversion_keeps_the_pictures_of_text_rows(text_rows, tmp_path, ending):
    rows = text_rows.rows
    files = convert(rows, tmp_path / f"out.{ending}").files
    converted = open_rows(*files)
    for n in range(12):
        before, after = rows.row(n), converted.row(n)
        assert after.conversations == before.conversations
        assert converted.picture(n, 0, after.images[0]) == rows.picture(n, 0, before.images[0])
        assert after.shown == [] if n % 3 == 0 else len(after.shown) == 1
