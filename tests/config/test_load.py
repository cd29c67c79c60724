"""From recipe, YAML, options and overrides to a configuration: every key, by every way, and every mistake."""

import typing
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path

import pytest
import yaml

from minimind_v.core.config.load import FLAG_KEYS, build_config, images_beside, resolve, to_yaml
from minimind_v.core.config.presets import PRESETS
from minimind_v.core.config.schema import DataConfig, RunConfig, TextConfig
from minimind_v.core.errors import MissingInput, UsageError
from tests.cli.harness import run_mmv

CHANGED = {
    "model.hidden_size": 48,
    "model.num_hidden_layers": 3,
    "model.num_attention_heads": 4,
    "model.num_key_value_heads": 1,
    "model.intermediate_size": 100,
    "model.vocab_size": 777,
    "model.rms_norm_eps": 1e-6,
    "model.rope_theta": 1e4,
    "model.max_position_embeddings": 4096,
    "model.use_moe": True,
    "model.num_experts_per_tok": 1,
    "model.n_routed_experts": 8,
    "model.n_shared_experts": 2,
    "model.aux_loss_alpha": 0.5,
    "model.aux_loss_scope": "batch",
    "model.qk_norm": True,
    "data.file": "rows.jsonl",
    "data.split": "validation",
    "data.images": "pictures",
    "data.tokenizer": "words",
    "data.max_length": 99,
    "data.batch_size": 3,
    "data.workers": 7,
    "data.bad_rows": 0.5,
    "vision_model": "eye",
    "init": "start.pth",
    "out": "there",
    "freeze": "attention",
    "epochs": 9,
    "lr": 0.25,
    "accumulate": 5,
    "max_steps": 11,
    "weight_decay": 0.2,
    "grad_clip": 0.7,
    "seed": 2**62 + 1,
    "dtype": "bfloat16",
    "reduce_dtype": "bfloat16",
    "device": "cpu",
    "deterministic": True,
    "gpus": 2,
    "features": "int8",
    "features_dir": "seen",
    "save_every": 13,
    "save_minutes": 2.5,
    "keep": 3,
    "log_every": 17,
    "val_every": 7,
    "val_rows": 19,
    "eval_every": 29,
    "eval_task": "yesno",
    "eval_data": "questions.jsonl",
    "eval_images": "shown",
    "eval_limit": 31,
    "best_by": "f1",
    "until_right": True,
    "recall_rows": 23,
    "track": "tensorboard",
}


def keys(kind=RunConfig, prefix=""):
    hints = typing.get_type_hints(kind)
    for item in fields(kind):
        inner = hints[item.name]
        yield from keys(inner, f"{item.name}.") if is_dataclass(inner) else [f"{prefix}{item.name}"]


def value(config, key):
    for name in key.split("."):
        config = getattr(config, name)
    return config


def tree(changes):
    nested = {}
    for key, given in changes.items():
        *path, name = key.split(".")
        node = nested
        for step in path:
            node = node.setdefault(step, {})
        node[name] = given
    return nested


def write(path, changes):
    path.write_text(changes if isinstance(changes, str) else yaml.safe_dump(changes), encoding="utf-8")
    return path


def test_the_tests_know_every_key():
    assert set(CHANGED) == set(keys()) - {"stage", "projector", "data.layout"}  # tables of one entry: docs/extending.md


# --- every key by every way -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", CHANGED)
def test_a_key_can_be_set_alone_by_set_and_by_yaml(tmp_path, key):
    recipe = build_config("pretrain")
    if key in ("model.num_attention_heads", "model.num_key_value_heads"):
        assert value(build_config("pretrain", sets=[f"{key}={CHANGED[key]}"]), key) == CHANGED[key]
        return
    text = str(CHANGED[key]).lower() if isinstance(CHANGED[key], bool) else CHANGED[key]
    by_set = build_config("pretrain", sets=[f"{key}={text}"])
    by_yaml = build_config("pretrain", write(tmp_path / "c.yaml", tree({key: CHANGED[key]})))
    flat = build_config("pretrain", write(tmp_path / "c.yaml", {key: CHANGED[key]}))
    assert by_set == by_yaml == flat
    assert str(value(by_set, key)) == str(CHANGED[key])
    default = value(recipe, key)
    assert default is None or type(value(by_set, key)) is type(default)


def test_all_keys_together(tmp_path):
    config = build_config("sft", write(tmp_path / "c.yaml", tree(CHANGED)))
    assert all(str(value(config, key)) == str(given) for key, given in CHANGED.items())
    assert config == build_config("sft", sets=[f"{key}={given}" for key, given in CHANGED.items()])


@pytest.mark.parametrize("flag", [*FLAG_KEYS, "vision_model", "init", "out", "epochs", "lr", "freeze", "seed", "dtype"])
def test_an_option_sets_its_key(flag):
    key = FLAG_KEYS.get(flag, flag)
    assert str(value(build_config("pretrain", options={flag: CHANGED[key]}), key)) == str(CHANGED[key])


def test_sets_win_over_options_and_options_over_yaml(tmp_path):
    mine = write(tmp_path / "c.yaml", {"lr": 0.1, "epochs": 7, "seed": 1})
    config = build_config("sft", mine, {"lr": 0.2, "epochs": None, "seed": 2}, ["seed=3"])
    assert (config.lr, config.epochs, config.seed) == (0.2, 7, 3)


def test_a_preset_may_stand_in_yaml_and_be_changed_by_an_option(tmp_path):
    mine = write(tmp_path / "c.yaml", {"preset": "moe", "model": {"num_hidden_layers": 2}})
    assert build_config("sft", mine).model == TextConfig(hidden_size=640, num_hidden_layers=2, use_moe=True)
    assert build_config("sft", mine, {"preset": "base"}).model.hidden_size == 768
    assert build_config("sft", sets=["preset=demo"]).model == PRESETS["demo"]


@pytest.mark.parametrize(
    ("sets", "init"),
    [
        (["preset=base"], "lm_768.pth"),
        (["model.hidden_size=256"], "lm_256.pth"),
        (["model.use_moe=true"], "lm_512_moe.pth"),
        (["init=mine.pth", "preset=base"], "mine.pth"),
    ],
)
def test_the_base_is_searched_under_the_name_of_the_size(sets, init):
    assert build_config("pretrain", sets=sets).init.name == init


def test_a_changed_width_brings_its_inner_size():
    assert build_config("sft", sets=["model.hidden_size=256"]).model.intermediate_size == 704
    own = build_config("sft", sets=["model.hidden_size=256", "model.intermediate_size=300"])
    assert own.model.intermediate_size == 300


def test_numbers_may_be_written_as_people_write_them():
    config = build_config("sft", sets=["lr=1e-6", "max_steps=1e3", "data.bad_rows=0", "grad_clip=.inf"])
    assert (config.lr, config.max_steps, config.data.bad_rows) == (1e-6, 1000, 0.0)
    assert type(config.max_steps) is int
    assert config.grad_clip == float("inf")


@pytest.mark.parametrize("nothing", ["data.images=", "data.images=null", "data.images=~"])
def test_what_may_be_absent_can_be_taken_away(nothing):
    assert build_config("sft", sets=[nothing]).data.images is None


# --- there and back ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["pretrain", "sft"])
@pytest.mark.parametrize("preset", PRESETS)
def test_yaml_of_a_configuration_gives_it_back(tmp_path, stage, preset):
    config = build_config(stage, sets=[f"preset={preset}"])
    assert build_config(stage, write(tmp_path / "c.yaml", to_yaml(config))) == config


def test_yaml_of_a_configuration_in_which_all_is_changed_gives_it_back(tmp_path):
    config = build_config("sft", sets=[f"{key}={given}" for key, given in CHANGED.items()])
    assert build_config("sft", write(tmp_path / "c.yaml", to_yaml(config))) == config
    without = build_config("sft", sets=["init=", "data.images="])
    assert build_config("sft", write(tmp_path / "c.yaml", to_yaml(without))) == without


def test_every_value_says_who_gave_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("preset: base\ntrain: {epochs: 3}\nlr: 1e-5\ndata: {max_length: 99}\n")
    options = ("--config", "mine.yaml", "--lr", "2e-5", "--set", "train.weight_decay=0.5", "--set", "seed=7")
    printed = run_mmv("train", "sft", "--print-config", *options).out
    origins = {line.split(":")[0].strip(): line.partition("#")[2].strip() for line in printed.splitlines()}
    assert origins["hidden_size"] == "preset base, mine.yaml"
    assert (origins["epochs"], origins["max_length"]) == ("mine.yaml", "mine.yaml")
    assert (origins["lr"], origins["weight_decay"], origins["seed"]) == ("--lr", "--set", "--set")
    assert (origins["accumulate"], origins["workers"]) == ("recipe sft", "this machine's cores")
    assert all(origins[key] for key in origins if key not in ("stage", "model", "data"))
    assert yaml.safe_load(printed)["weight_decay"] == 0.5
    nested = resolve("sft", sets=["train.lr=1e-4", "train.data.batch_size=3"]).config
    assert (nested.lr, nested.data.batch_size) == (1e-4, 3)
    assert "did you mean 'lr'" in run_mmv("train", "sft", "--set", "train.lrr=1").error


def test_the_source_of_data_that_was_found_is_the_disk(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("dataset").mkdir()
    Path("dataset/sft_i2t.parquet").touch()
    Path("mine_data.jsonl").touch()
    Path("mine_images").mkdir()
    assert resolve("sft").sources["data.file"] == "found on disk"
    assert resolve("sft", options={"data": "mine_data.jsonl"}).sources["data.images"] == "found beside data.file"


def test_the_command_prints_what_it_reads(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    printed = run_mmv(
        "train", "sft", "--print-config", "--preset", "base", "--lr", "3e-5", "--set", "data.workers=3"
    ).out
    again = run_mmv("train", "sft", "--print-config", "--config", write(tmp_path / "c.yaml", printed)).out
    assert yaml.safe_load(again) == yaml.safe_load(printed)
    plain = yaml.safe_load(printed)
    assert plain["lr"] == 3e-5
    assert plain["model"] == asdict(PRESETS["base"])
    assert set(plain["data"]) == {item.name for item in fields(DataConfig)}


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("learning_rate", None),
        ("epoch", "epochs"),
        ("bach_size", "data.batch_size"),
        ("batch_size", "data.batch_size"),
        ("data.batchsize", "data.batch_size"),
        ("data.max_len", "data.max_length"),
        ("modl.hidden_size", "model.hidden_size"),
        ("model.hiddensize", "model.hidden_size"),
        ("model.hidden_size.more", "model.hidden_size"),
        ("model", None),
        ("data", None),
        ("sede", "seed"),
        ("presets", "preset"),
        ("zzzzzz", None),
        ("", None),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest(tmp_path, key, meant):
    for given in ({"sets": [f"{key}=1"]}, {"yaml_file": write(tmp_path / "c.yaml", {key: 1})}):
        with pytest.raises(UsageError, match=f"unknown configuration key {key}") as caught:
            build_config("sft", **given)
        if meant:
            assert f"(did you mean {meant!r}?)" in str(caught.value)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("epochs=two", "epochs must be of type int, not 'two'"),
        ("epochs=1.5", "epochs must be of type int, not 1.5"),
        ("epochs=.inf", "epochs must be of type int, not inf"),
        ("epochs=.nan", "epochs must be of type int, not nan"),
        ("epochs=true", "epochs must be of type int, not True"),
        ("epochs=", "epochs must be of type int, not None"),
        ("epochs=[1]", r"epochs must be of type int, not \[1\]"),
        ("epochs=2020-01-01", "epochs must be of type int"),
        ("lr=fast", "lr must be of type float, not 'fast'"),
        ("lr=false", "lr must be of type float, not False"),
        ("model.use_moe=1", "model.use_moe must be of type bool, not 1"),
        ("model.use_moe=maybe", "model.use_moe must be of type bool, not 'maybe'"),
        ("device=7", "device must be of type str, not 7"),
        ("out=", "out must be of type Path, not None"),
        ("data.file=[a, b]", "data.file must be of type Path"),
        ("lr={a: 1}", "lr must be of type float"),
        ("lr", "'lr' must have the form key=value"),
        ("lr=[", "the value is not YAML"),
        ("preset=tiny", "preset 'tiny' must be one of small, base, moe, 3v, 3v-moe, demo"),
        ("preset=[small]", "preset .* must be one of"),
        ("preset=", "preset None must be one of"),
        ("freeze=al", r"--freeze 'al' must be one of .*did you mean 'all'"),
        ("dtype=float64", "--dtype 'float64' must be one of"),
        ("weight_decay=-0.1", "weight_decay must be at least 0"),
        ("weight_decay=.nan", "weight_decay must be at least 0"),
        ("grad_clip=0", "grad_clip must be above 0"),
        ("grad_clip=.nan", "grad_clip must be above 0"),
        ("data.bad_rows=-1", "data.bad_rows must be a share from 0 to 1"),
        ("data.bad_rows=5", "data.bad_rows must be a share from 0 to 1"),
        ("seed=9223372036854775808", r"--seed must be below 2\^63"),
        ("stage=pretrain", "is for stage pretrain, the command for sft"),
        ("stage=dpo", "is for stage dpo"),
    ],
)
def test_a_wrong_value_is_refused_by_its_key(setting, message):
    with pytest.raises(UsageError, match=message):
        build_config("sft", sets=[setting])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("lr: [", "not YAML"),
        ("\tlr: 1", "not YAML"),
        ("- lr\n- epochs", "not a mapping of keys to values"),
        ("just words", "not a mapping of keys to values"),
        ("7", "not a mapping of keys to values"),
        ("!!python/object/apply:os.system ['touch owned']", "the YAML tag .* is not supported"),
        ("lr: 1e-3\nlearning: fast", "unknown configuration key learning"),
        ("1: 2", "unknown configuration key 1"),
        ("null: 2", "unknown configuration key null"),
        ("model: small", "unknown configuration key model"),
        ("lr: {peak: 1}", "unknown configuration key lr.peak"),
        ("<html>", "not a mapping of keys to values"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=message) as caught:
        build_config("sft", write(tmp_path / "mine.yaml", content))
    assert "\n" not in str(caught.value)
    assert not Path("owned").exists()


def test_a_file_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "mine.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match=r"mine\.yaml:1: not YAML"):
        build_config("sft", tmp_path / "mine.yaml")
    with pytest.raises(MissingInput, match="no configuration file"):
        build_config("sft", tmp_path)


def test_an_empty_file_changes_nothing(tmp_path):
    assert build_config("sft", write(tmp_path / "mine.yaml", "# nothing yet\n")) == build_config("sft")


def test_a_mistake_on_the_command_line_is_usage():
    ended = run_mmv("train", "sft", "--set", "data.batchsize=7")
    assert ended.code == 2
    assert ended.error == "unknown configuration key data.batchsize (did you mean 'data.batch_size'?)"


# --- what is found beside ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "images"),
    [("sft_data.jsonl", "sft_images.zip"), ("mine.jsonl", "mine_images.zip"), ("mine.jsonl", "mine_images/a.jpg")],
)
def test_pictures_are_found_beside_their_rows(tmp_path, data, images):
    assert images_beside(tmp_path / data) is None
    (tmp_path / images).parent.mkdir(exist_ok=True)
    (tmp_path / images).touch()
    folder = tmp_path / images.split("/")[0]
    assert images_beside(tmp_path / data) == folder
    assert build_config("sft", options={"data": tmp_path / data}).data.images == folder
    assert build_config("sft", options={"data": tmp_path / data, "images": Path("x")}).data.images == Path("x")


@pytest.mark.parametrize("name", ["lm_512.pth", "llm_512.pth"])
@pytest.mark.parametrize("folder", ["out", "mine"])
def test_the_base_is_found_where_it_is(tmp_path, monkeypatch, folder, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / folder).mkdir()
    (tmp_path / folder / name).touch()
    assert build_config("pretrain", options={"out": Path("mine")}).init == Path(folder) / name


def test_data_is_found_in_the_layout_that_was_downloaded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = Path("dataset")

    def data_paths(stage="sft"):
        config = build_config(stage).data
        return str(config.file), str(config.images)

    nothing = data_paths()
    assert nothing == ("dataset/sft_data.jsonl", "dataset/sft_images.zip")
    for name, expected in (
        ("sample/sft_i2t.parquet", ("dataset/sample/sft_i2t.parquet", "None")),
        ("sft_i2t.parquet", ("dataset/sft_i2t.parquet", "None")),
        ("sft_data.jsonl", nothing),
    ):
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        (data / name).touch()
        assert data_paths() == expected
    assert data_paths("pretrain")[0] == "dataset/pretrain_data.jsonl"
    assert build_config("sft", options={"data": Path("mine.parquet")}).data.file == Path("mine.parquet")


@pytest.mark.parametrize(("cores", "workers"), [(1, 1), (2, 1), (4, 2), (8, 6), (16, 14), (128, 16), (None, 1)])
def test_data_workers_leave_two_cores_to_training(monkeypatch, cores, workers):
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    assert resolve("sft").config.data.workers == workers
    assert DataConfig().workers == workers
    assert resolve("sft", options={"workers": 3}).config.data.workers == 3


def test_processes_of_one_machine_share_its_cores_among_their_data_workers(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    assert [resolve("sft", options={"gpus": gpus}).config.data.workers for gpus in (1, 2, 8, 32)] == [14, 7, 1, 1]
    assert resolve("sft", options={"gpus": 2, "workers": 9}).config.data.workers == 9


def test_a_name_that_is_too_long_for_a_file_ends_in_one_line():
    ended = run_mmv("train", "sft", "--data", f"{'r' * 300}.jsonl")
    assert ended.code in (1, 2)
    assert "too long" in ended.error or "no " in ended.error
