"""A `tokenizer.json` of anybody: its largest id counts, and it makes no more of a text than it should."""

import json
import random

import pytest

from minimind_v.core.data.tokenizer import IMAGE_TOKEN, Tokenizer
from minimind_v.core.errors import MmvError, WeightsError
from minimind_v.core.formats.load import load
from tests.cli.harness import ASSETS, EYE, run_mmv, sighted, tiny_data
from tests.hostile import check_refused

TEXT = (ASSETS / "tokenizer.json").read_text(encoding="utf-8")


def changed(folder, change):
    """The folder of a tokenizer like the demo's."""
    folder.mkdir(exist_ok=True)
    data = json.loads(TEXT)
    change(data)
    (folder / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    return folder


def added(token, id):
    def change(data):
        data["added_tokens"].append({**data["added_tokens"][0], "id": id, "content": token})

    return change


def moved(id):
    """The last token under another id: as many tokens as before."""

    def change(data):
        vocab = data["model"]["vocab"]
        vocab[max(vocab, key=vocab.__getitem__)] = id

    return change


def test_the_largest_id_counts_not_the_number_of_tokens(tmp_path):
    assert Tokenizer.load(ASSETS).vocab_size == 600
    tokenizer = Tokenizer.load(changed(tmp_path, moved(5000)))
    assert tokenizer.backend.get_vocab_size() == 600
    assert tokenizer.vocab_size == 5001
    with pytest.raises(WeightsError, match=r"has 600 tokens, the tokenizer in .* has 5001: '\S+' has no embedding"):
        load(sighted(), EYE, tmp_path)
    line = run_mmv(*tiny_data().train(tmp_path / "out", tokenizer=tmp_path)).error
    assert "has 5001 tokens, but the model has only 600: " in line
    assert "would have no embedding" in line


def test_the_image_token_of_an_exported_folder_does_not_count(tmp_path):
    def change(data):
        data["model"]["vocab"][IMAGE_TOKEN] = 600
        added(IMAGE_TOKEN, 600)(data)

    assert Tokenizer.load(changed(tmp_path, change)).vocab_size == 600


def test_two_tokens_of_one_id_are_refused(tmp_path):
    with pytest.raises(WeightsError, match=r"not a tokenizer \('.+' and '.+' have the id 400\)"):
        Tokenizer.load(changed(tmp_path, moved(400)))


@pytest.mark.parametrize(
    "normalizer", [{"type": "NFC"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
)
def test_usual_normalizers_are_read(tmp_path, normalizer):
    assert Tokenizer.load(changed(tmp_path, lambda data: data.update(normalizer=normalizer))).encode("a b").ids


def doubling(data):
    step = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    data["normalizer"] = {"type": "Sequence", "normalizers": [step] * 12}


def long(data):
    data["normalizer"] = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000}


def test_tokenizers_that_ask_for_more_than_they_say(tmp_path):
    texts = {
        "deep": "[" * 200_000,
        "long_number": f'{{"model": {"9" * 6000}}}',
        "nul": "\0",
        "list": "[]",
        "mark": f'{{"{IMAGE_TOKEN}": ' + "[" * 50_000,
        "mark_list": f'["{IMAGE_TOKEN}"]',
    }
    files = {
        changed(tmp_path / "double", doubling): "4,096 times as long",
        changed(tmp_path / "long", long): "1,000 times as long",
        changed(tmp_path / "twice", moved(1)): "have the id 1",
        changed(tmp_path / "huge", moved(2**32)): "not a tokenizer",
        changed(tmp_path / "negative", moved(-1)): "not a tokenizer",
        changed(tmp_path / "merges", lambda data: data["model"]["merges"].append(["zz", "yy"])): "not a tokenizer",
        changed(tmp_path / "model", lambda data: data.update(model=5)): "not a tokenizer",
        changed(tmp_path / "none", lambda data: data["model"].update(vocab={})): "not a tokenizer",
    }
    for name, text in texts.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.json").write_text(text)
        files[tmp_path / name] = "not a tokenizer"
    (tmp_path / "large").mkdir()
    with (tmp_path / "large" / "tokenizer.json").open("wb") as file:
        file.truncate(1 << 36)
    files[tmp_path / "large"] = "it has 68,719,476,736 bytes; the maximum is"
    check_refused("minimind_v.core.data.tokenizer:Tokenizer.load", files)


def test_any_changed_byte_ends_in_words_or_in_a_tokenizer(tmp_path):
    draw, whole = random.Random(1), TEXT.encode()
    for _ in range(100):
        damaged = bytearray(whole)
        for _ in range(draw.choice((1, 2, 8))):
            damaged[draw.randrange(len(damaged))] = draw.choice(b'09"{}[],:-.\0\xff')
        (tmp_path / "tokenizer.json").write_bytes(damaged)
        try:
            tokenizer = Tokenizer.load(tmp_path)
        except MmvError:
            continue
        assert max(tokenizer.encode("a cat and 3 dogs").ids) < tokenizer.vocab_size


def test_a_tokenizer_that_cannot_encode_is_refused_when_it_is_loaded(tmp_path):
    def words_only(data):
        vocab = {token["content"]: token["id"] for token in data["added_tokens"]} | {"@": 34}
        data["model"] = {"type": "WordLevel", "vocab": vocab, "unk_token": "none"}

    with pytest.raises(WeightsError, match=r"not a tokenizer \(WordLevel error: Missing \[UNK\]"):
        Tokenizer.load(changed(tmp_path, words_only))
