"""Configurations from strangers: each ends in one line with file and key, before time or memory is taken."""

import time
from pathlib import Path

import pytest

from minimind_v.core.config import limits
from minimind_v.core.config.limits import check_memory
from minimind_v.core.config.load import build_config, resolve
from minimind_v.core.config.schema import MOST, MOST_SIZES, TextConfig
from minimind_v.core.config.settings import read_settings
from minimind_v.core.errors import UsageError
from minimind_v.core.machine import check_workers
from tests.cli.harness import run_mmv


def bomb(first, use):
    """Eleven levels of aliases that stand for four to the power of eleven values."""
    levels = [f"a0: &a0 {first}"]
    levels += [f"a{level}: &a{level} {use.format(f'*a{level - 1}')}" for level in range(1, 12)]
    return "\n".join(levels)


CASES = {
    "mappings of aliases": (bomb("{x: 1}", "{{p: {0}, q: {0}, r: {0}, s: {0}}}"), r":\d+: a\d+.*more than 10,000 keys"),
    "lists of aliases": ("lr: 1e-3\n" + bomb("[1]", "[{0}, {0}, {0}, {0}]"), "unknown configuration key a0"),
    "a list in itself": ("lr: &a [*a]", r"lr must be of type float, not .*\*a"),
    "a mapping in itself": ("data: &a {file: x, more: *a}", ":1: data.more.*an alias of itself"),
    "a merge of itself": ("&a\n<<: *a\nlr: 1", "an alias of itself"),
    "an alias of nothing": ("lr: *nothing", ":1: not YAML .*undefined alias"),
    "nested lists": ("lr: " + "[" * 50_000, "nested deeper"),
    "nested mappings": ("a: " * 1 + "{a: " * 100 + "1" + "}" * 100, ":1: a.*nested deeper than 20"),
    "a date that is none": ("seed: 2024-13-45", "seed must be of type int, not '2024-13-45'"),
    "a date": ("epochs: 2024-01-01", "epochs must be of type int, not '2024-01-01'"),
    "a tagged date": ("seed: !!timestamp 2024-13-45", ":1: seed.*timestamp is not supported"),
    "a thousand digits": ("seed: " + "9" * 1000, r"seed must be of type int|--seed must be below 2\^63"),
    "ten thousand digits": ("seed: " + "9" * 10_000, "seed must be of type int"),
    "ten thousand hex digits": ("seed: 0x" + "f" * 10_000, "seed must be of type int"),
    "digits as text": ("seed: '" + "9" * 10_000 + "'", "seed must be of type int"),
    "a large seed": ("seed: 1" + "0" * 36, r"--seed must be below 2\^63, not a number of 37 digits"),
    "a float too large": ("lr: 1.0e+400", r"lr must be of type float, not '1.0e\+400'"),
    "no clipping is not too large": ("grad_clip: 1e400", "grad_clip must be of type float"),
    "an int too large for a float": ("lr: 1" + "0" * 35, "--lr must be between 0 and 1"),
    "NUL": ("out: a\0b", r":1: not YAML \(it contains the character U\+0000"),
    "an escaped NUL": ('lr: 1e-3\nout: "a\\0b"', r"out contains a NUL character"),
    "half a character": ('data: {file: "\\ud800"}', "data.file contains half of a character"),
    "NUL in a key": ('"o\\0ut": 1', r"unknown configuration key o\\x00ut"),
    "an escape sequence": ('"\\e[2Jout": 1', r"unknown configuration key \\x1b\[2Jout"),
    "a tab": ("data:\n\tfile: x", ":2: not YAML .*spaces in place of the tab"),
    "not UTF-8": ("lr: 1\nout: \udcff", ":2: not YAML .*not UTF-8"),
    "twice": ("lr: 1e-3\nepochs: 1\nlr: 1e-4", ":3: lr is given twice"),
    "twice in two ways": ("data: {batch_size: 1}\ndata.batch_size: 2", ":2: data.batch_size is given twice"),
    "a key that is a list": ("[a, b]: 1", ":1: the top level: a key must be text"),
    "a key that is a mapping": ("data: {{a: 1}: 2}", ":1: data.*a key must be text"),
    "a key that is a truth": ("yes: 1", "unknown configuration key yes"),
    "a merge of a value": ("<<: 3", ":1: <<: only a mapping"),
    "a number of no digits": ('seed: !!int ""', ":1: seed: '' with the tag"),
    "a number of a sign": ('seed: !!int "-"', ":1: seed: '-' with the tag"),
    "binary": ("out: !!binary aGFsbG8=", ":1: out.*binary is not supported"),
    "an unknown tag": ("lr: !mine 1e-3", ":1: lr.*!mine is not supported"),
    "an object": (
        "lr: 1\nout: !!python/object/apply:os.system ['touch owned']",
        ":2: out.*python/object.*not supported",
    ),
    "an object of keys": ("data: !!python/object:os.Mine {file: x}", ":1: data.*not supported"),
    "a set": ("data: !!set {a, b}", ":1: data.*not supported"),
    "a number that is none": ("epochs: !!int many", ":1: epochs.*not supported"),
    "a truth that is none": ("deterministic: !!bool perhaps", ":1: deterministic.*not supported"),
    "no number": ("lr: .nan", "--lr must be between 0 and 1"),
    "two documents": ("lr: 1e-3\n---\nlr: 1e-4", ":2: not YAML .*another document"),
    "a huge file": ("lr: 1e-3\n# " + "x" * (1 << 20), "1,048,.* bytes; a configuration has at most 262,144"),
    "a key that has a wrong type": ("data: {max_length: long}", "data.max_length must be of type int"),
    "a true number": ("epochs: true", "epochs must be of type int, not True"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_file_from_a_stranger_ends_in_one_line_with_file_and_key(tmp_path, name):
    content, message = CASES[name]
    path = tmp_path / "mine.yaml"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    started = time.process_time()
    ended = run_mmv("train", "sft", "--config", path)
    assert ended.code == 2, ended.err
    assert ended.error.startswith(f"{path}")
    with pytest.raises(UsageError, match=message) as caught:
        build_config("sft", path)
    assert str(caught.value) == ended.error
    assert not Path("owned").exists()
    assert time.process_time() - started < 5


def test_what_yaml_offers_and_does_no_harm_is_read(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "data: &d {batch_size: 3, max_length: 99}\n"
        "model: {<<: [{num_hidden_layers: 2, vocab_size: 777}, {vocab_size: 1}], vocab_size: 888}\n"
        "seed: !!int 7\nlr: !!float 1e-4\ndtype: !!str float32\n"
    )
    assert read_settings(path) == {
        "data.batch_size": 3, "data.max_length": 99, "model.num_hidden_layers": 2, "model.vocab_size": 888,
        "seed": 7, "lr": 1e-4, "dtype": "float32",
    }  # fmt: skip
    path.write_text("one: &one {a: {b: 1, c: 2}, d: 3}\ntwo: {<<: *one, a: {b: 4}}\n")
    assert read_settings(path) == {"one.a.b": 1, "one.a.c": 2, "one.d": 3, "two.a.b": 4, "two.d": 3}


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_file_that_windows_has_saved_is_read(tmp_path, encoding):
    path = tmp_path / "mine.yaml"
    path.write_bytes("data: {file: 数据.jsonl}\r\nlr: 1e-5\r\n".encode(encoding))
    config = build_config("sft", path)
    assert (config.data.file.name, config.lr) == ("数据.jsonl", 1e-5)


SETS = {
    "out=a\0b": "--set 'out=a.*the value is not YAML",
    'out="a\\0b"': "out.*contains a NUL character",
    "o\0ut=1": r"unknown configuration key o\\x00ut",
    "seed=2024-13-45": "seed must be of type int",
    "lr=&a [*a]": "lr must be of type float",
    "lr=" + "[" * 50_000: "the value is not YAML",
    "lr=!!python/name:os.system ''": "lr.*python/name.*not supported",
    "seed=" + "9" * 5000: "seed must be of type int",
    "epochs=1e400": "epochs must be of type int",
    "model.rope_theta=.inf": "model.rope_theta must be between 0 and",
    "model.aux_loss_alpha=.inf": "model.aux_loss_alpha must be between 0 and",
}


@pytest.mark.parametrize("setting", SETS)
def test_a_set_that_is_no_value_ends_in_one_line(setting):
    ended = run_mmv("train", "sft", "--set", setting)
    assert ended.code == 2
    with pytest.raises(UsageError, match=SETS[setting]):
        build_config("sft", sets=[setting])
    assert len(ended.error) < 2000


# --- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [*MOST_SIZES, *MOST])
@pytest.mark.parametrize("value", [10**9 * 3, 10**12, 10**50])
def test_an_absurd_size_is_refused_with_key_value_and_bound(tmp_path, key, value):
    most = MOST_SIZES.get(key) or MOST[key][0]
    prefix = "model." if key in MOST_SIZES else "data." if key in ("max_length", "batch_size") else ""
    path = tmp_path / "mine.yaml"
    path.write_text(f"{prefix}{key}: {value}")
    shown = str(value) if value < 10**30 else "a number of 51 digits"
    with pytest.raises(UsageError) as caught:
        build_config("sft", path)
    assert str(caught.value).startswith(f"{path}: ")
    assert key in str(caught.value).replace("-", "_")
    assert shown in str(caught.value)
    assert f"{most:,}" in str(caught.value)


@pytest.mark.parametrize(
    "key", ["max_steps", "save_every", "log_every", "val_every", "val_rows", "keep", "recall_rows", "eval_every"]
)
def test_other_numbers_of_a_run_fit_into_64_bits(key):
    assert getattr(build_config("sft", sets=[f"{key}={10**18}"]), key) == 10**18
    with pytest.raises(UsageError, match="must be at most 9,223,372,036,854,775,807, not 1000"):
        build_config("sft", sets=[f"{key}={10**20}"])


@pytest.mark.parametrize("size", [True, 2.0, "8", None])
def test_a_size_is_a_whole_number(size):
    with pytest.raises(UsageError, match=r"model\.num_hidden_layers must be a whole number"):
        TextConfig(num_hidden_layers=size)


def test_the_parameters_are_those_of_the_published_models():
    projector = 768 * 512 + 512
    assert TextConfig().parameters + projector == 26_223_616
    moe = TextConfig(hidden_size=640, num_hidden_layers=8, use_moe=True)
    assert moe.parameters + 768 * 640 + 640 == 145_521_920


def test_a_model_that_this_machine_cannot_hold_is_refused(monkeypatch):
    large = TextConfig(hidden_size=4096, num_attention_heads=32, num_hidden_layers=8)
    monkeypatch.setattr(limits, "total_memory", lambda: 2**32)
    with pytest.raises(UsageError, match=r"model.num_hidden_layers 8 .* parameters. It needs \d\.\d GiB, and this"):
        check_memory(large)
    monkeypatch.setattr(limits, "total_memory", lambda: None)  # a system that does not tell
    check_memory(large)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["train", "sft", "--workers", "1000000"], "--workers must be at most 64 on this machine, which has 16 cores"),
        (["train", "sft", "--set", "data.workers=1000000"], "--workers must be at most 64 on this machine"),
        (["plan", "sft", "--workers", "1000000"], "--workers must be at most 64 on this machine"),
        (["train", "sft", "--gpus", "100000", "--device", "cpu"], "--gpus must be at most 1,024, not 100000"),
        (["data", "check", "rows.jsonl", "--workers", "65"], "--workers must be at most 64 on this machine"),
    ],
)
def test_absurd_numbers_of_processes_are_refused_before_one_is_started(monkeypatch, command, message):
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    ended = run_mmv(*command)
    assert ended.code == 2
    assert message in ended.error


def test_more_processes_than_cores_can_make_use_of_are_refused(tmp_path, tiny_data, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    ended = run_mmv(*tiny_data.train(tmp_path / "out", gpus=17))
    assert ended.code == 2
    assert ended.error == "--gpus must be at most 16 on this machine, which has 4 cores, not 17"
    assert not (tmp_path / "out").exists()


def test_a_configuration_for_a_larger_machine_can_be_printed(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    with pytest.raises(UsageError):
        check_workers(100)
    assert run_mmv("train", "sft", "--workers", "100", "--print-config").code == 0
    assert resolve("sft", options={"workers": 100}).config.data.workers == 100
