"""`mmv download` against a hub that behaves, and one that does not: only right bytes ever get their name."""

import hashlib
import io
import json
import os
import shutil
import zipfile
from collections import namedtuple
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.cli.harness import run_mmv, tree
from tests.hub.conftest import LM, older_layout
from tests.hub.server import COMMIT

DATA = "datasets/jingyaogong/minimind-v_dataset"


@pytest.fixture
def get(hub, tmp_path):
    def get(*options, hub_name="hf"):
        return run_mmv("download", *options, "--hub", hub_name, "--endpoint", hub.endpoint, "--dir", tmp_path)

    return get


def finished(root):
    return [name for name in tree(root) if ".mmv-download" not in name]


@pytest.mark.parametrize("name", ["hf", "modelscope"])
def test_all_files_land_where_the_stages_read_them(get, hub, tmp_path, name):
    report = get("all", "--json", hub_name=name).json
    assert finished(tmp_path) == sorted(
        ["dataset/pretrain_i2t.parquet", "dataset/sft_i2t.parquet", "model/tokenizer.json",
         "model/tokenizer_config.json", "out/lm_512.pth",
         *(f"model/vision_model/clip-vit-base-patch16/{file}"
           for file in ("config.json", "preprocessor_config.json", "pytorch_model.bin"))]
    )  # fmt: skip
    assert (report["hub"], len(report["files"])) == (name, 8)
    for file in report["files"]:
        data = Path(file["path"]).read_bytes()
        assert (file["action"], file["bytes"]) == ("fetched", len(data))
        assert file["sha256"] == hashlib.sha256(data).hexdigest()
    assert not list(tmp_path.rglob("*.part"))
    hub.forget()
    again = get("all", "--json", hub_name=name).json
    assert {file["action"] for file in again["files"]} == {"kept"}
    assert (hub.requests, again["transferred"]) == ([], 0)


@pytest.mark.parametrize("name", ["hf", "modelscope"])
@pytest.mark.parametrize(("preset", "base"), [("3v", "llm_768.pth"), ("3v-moe", "llm_768_moe.pth")])
def test_minimind_3v_lands_beside_the_files_of_2025(get, tmp_path, name, preset, base):
    assert get("clip", hub_name=name).code == get("tokenizer", hub_name=name).code == 0
    before = set(finished(tmp_path))
    files = get("all", "--preset", preset, "--json", hub_name=name).json["files"]
    new = set(finished(tmp_path)) - before
    assert {Path(file["path"]).relative_to(tmp_path).as_posix() for file in files} == new
    assert new == {
        "dataset/pretrain_i2t.parquet", "dataset/sft_i2t.parquet", "model/minimind-3v/tokenizer.json",
        "model/minimind-3v/tokenizer_config.json", f"out/{base}",
        *(f"model/vision_model/siglip2-base-p32-256-ve/{file}"
          for file in ("config.json", "preprocessor_config.json", "model.safetensors")),
    }  # fmt: skip


def test_weights_of_minimind_3v_that_a_listing_lacks_are_named(get, hub):
    ended = get("weights", "--preset", "3v")
    assert "jingyaogong/minimind-3v-pytorch at " in ended.error
    assert "lacks pretrain_vlm_768.pth — it has: llm_768.pth" in ended.error


def test_pinned_and_moving_revisions(get, hub, tmp_path):
    report = get("all", "--json").json
    assert report["commit"]["openai/clip-vit-base-patch16"] == "57c216476eefef5ab752ec549e440a49ae4ae5f3"
    assert report["commit"]["jingyaogong/MiniMind2-V-PyTorch"] == COMMIT
    first, hub.commit = hub.commit, "d" * 40
    (tmp_path / "out" / "lm_512.pth").unlink()
    assert get("lm", "--json").json["files"][0]["commit"] == first
    assert any(first in path for _, path in hub.requests)
    assert get("lm", "--json", "--revision", "e" * 40).json["files"][0]["commit"] == "e" * 40


def test_dry_run_writes_nothing(get, hub, tmp_path):
    report = get("lm", "--dry-run", "--json").json["files"][0]
    assert (report["action"], report["bytes"], report["path"]) == (
        "would fetch",
        len(LM),
        str(tmp_path / "out/lm_512.pth"),
    )
    assert report["url"].startswith(hub.endpoint)
    assert (tree(tmp_path), hub.sent) == ([], 0)
    assert "3.0 MB to download" in get("lm", "--dry-run").out


@pytest.mark.parametrize(
    ("faults", "message"),
    [
        ([("cut", 1_000_000), ("cut", 500_000)], ""),
        ([("cut", 0)] * 3, ""),
        ([("stall", 100_000)], ""),
        ([("status", 503), ("status", 429), ("status", 500)], ""),
        ([("html", 0)], "HTML page"),
        ([("corrupt", 0)], "SHA-256"),
        ([("cut", 1_000_000), ("whole", 0)], ""),
        ([("bytes", b"version https://git-lfs.github.com/spec/v1\n")], "bytes instead of"),
        ([("bytes", b"short")], "bytes instead of"),
        ([("cut", 2_000_000), ("corrupt", 0), ("cut", 9), ("cut", 70_000)], "SHA-256"),
    ],
)
def test_misbehaviour_ends_with_the_right_bytes(get, hub, tmp_path, faults, message):
    hub.faults["llm_512.pth"] = list(faults)
    done = get("lm")
    assert done.code == 0, done.err
    assert (tmp_path / "out" / "lm_512.pth").read_bytes() == LM
    assert message in done.err
    if not message:
        assert hub.sent <= len(LM) * (1.5 if ("whole", 0) in faults else 1.1)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (("html", 0), "HTML page"),
        (("corrupt", 0), "SHA-256"),
        (("bytes", b"x"), "bytes instead of"),
        (("cut", 0), "run the same command again to resume"),
        (("status", 500), "run the same command again to resume"),
        (("status", 403), "hf auth login"),
        (("status", 404), "not found"),
    ],
)
def test_a_file_that_never_comes_right_gets_no_name(get, hub, tmp_path, fault, message):
    hub.faults["llm_512.pth"] = [fault] * 99
    done = get("lm")
    assert done.code == 1
    assert message in done.error
    assert "lm_512.pth" in done.error
    assert finished(tmp_path) == []
    assert len(hub.requests) < 25


def test_a_lfs_pointer_of_the_right_size_is_refused(get, hub, tmp_path):
    hub.repos["models/jingyaogong/MiniMind2-V-PyTorch"]["llm_512.pth"] = b"version https://git-lfs.github.com/spec/v1\n"
    assert "git-lfs pointer" in get("lm").error
    assert finished(tmp_path) == []


def test_wrong_files_are_named_and_fetched_again(get, hub, tmp_path):
    get("all")
    lm = tmp_path / "out" / "lm_512.pth"
    lm.write_bytes(LM[:-1] + b"?")
    done = get("all", "--json")
    assert "lm_512.pth differs from the hub's file (SHA-256)" in done.err
    assert [file["path"] for file in done.json["files"] if file["action"] == "fetched"] == [str(lm)]
    assert lm.read_bytes() == LM
    hub.forget()
    os.utime(lm, ns=(1, 1))  # touched, but right
    assert {file["action"] for file in get("lm", "--json").json["files"]} == {"kept"}
    assert hub.sent == 0


def test_what_was_damaged_or_edited_is_kept_beside(get, tmp_path):
    get("tokenizer")
    path = tmp_path / "model" / "tokenizer_config.json"
    for number in ("", "2"):
        path.write_text(f"mine{number}")
        done = get("tokenizer")
        assert done.code == 0, done.err
        assert f"the file at {path} is now {path}.old{number}" in done.err
        assert Path(f"{path}.old{number}").read_text() == f"mine{number}"
        assert path.read_text() != f"mine{number}"


@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_what_a_user_made_is_in_the_way_and_stays(get, hub, tmp_path, more):
    """Trained weights have the names of published ones; rows of one's own may have, too."""
    hub.repos["models/jingyaogong/MiniMind2-V-PyTorch"] |= {"pretrain_vlm_512.pth": b"hub", "sft_vlm_512.pth": b"hub"}
    for what, name in (("weights", "out/sft_vlm_512.pth"), ("dataset", "dataset/sft_i2t.parquet"),
                       ("tokenizer", "model/tokenizer.json"), ("lm", "out/lm_512.pth")):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"mine")
        ended = get(what, *more)
        assert (
            ended.code,
            f"were not downloaded, or were changed after the download: {tmp_path / name} " in ended.error,
        ) == (
            2,
            True,
        )
        assert (tmp_path / name).read_bytes() == b"mine"
    assert hub.sent == 0


def test_weights_that_were_trained_on_and_samples_that_were_edited_stay(get, hub, tmp_path):
    hub.repos["models/jingyaogong/MiniMind2-V-PyTorch"] |= {"pretrain_vlm_512.pth": b"hub", "sft_vlm_512.pth": b"hub"}
    for options, name in ((("weights",), "out/sft_vlm_512.pth"),
                        (("dataset", "--split", "sft", "--sample", 5), "dataset/sample/sft_i2t.parquet")):  # fmt: skip
        assert get(*options).code == 0
        (tmp_path / name).write_bytes(b"mine")
        ended = get(*options)
        assert (ended.code, str(tmp_path / name) in ended.error) == (2, True)
        assert (tmp_path / name).read_bytes() == b"mine"


@pytest.mark.parametrize("presets", [("base", "3v"), ("3v", "base")])
@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_a_file_of_the_other_generation_is_neither_kept_nor_replaced(get, hub, tmp_path, presets, more):
    """`sft_vlm_768.pth` was published in 2025 and in 2026."""
    names, repos = ("pretrain_vlm_768.pth", "sft_vlm_768.pth"), ("MiniMind2-V-PyTorch", "minimind-3v-pytorch")
    for repo in repos:
        hub.repos[f"models/jingyaogong/{repo}"] |= {name: f"{repo} {name}".encode() for name in names}
    first, second = presets
    assert get("weights", "--preset", first).code == 0
    before = {name: (tmp_path / "out" / name).read_bytes() for name in names}
    ended = get("weights", "--preset", second, *more)
    assert ended.code == 2
    for text in ("sft_vlm_768.pth was downloaded from", "another --dir", *presets, *repos):
        assert text in ended.error
    assert "downloading it again" not in ended.err
    assert {name: (tmp_path / "out" / name).read_bytes() for name in names} == before
    assert {file["action"] for file in get("weights", "--preset", first, "--json").json["files"]} == {"kept"}


def test_a_receipt_of_both_generations_does_not_keep_the_file_of_one(get, hub, tmp_path):
    """Earlier versions downloaded one over the other, and left the requests of both."""
    hub.repos["models/jingyaogong/MiniMind2-V-PyTorch"] |= {"pretrain_vlm_768.pth": b"2025", "sft_vlm_768.pth": b"5"}
    hub.repos["models/jingyaogong/minimind-3v-pytorch"] |= {"pretrain_vlm_768.pth": b"2026", "sft_vlm_768.pth": b"6"}
    assert get("weights", "--preset", "3v").code == 0
    receipt = tmp_path / "out" / ".mmv-download" / "receipt.json"
    notes = json.loads(receipt.read_text())
    request = "hf jingyaogong/MiniMind2-V-PyTorch@main weights base"
    notes["wants"][request] = ["pretrain_vlm_768.pth", "sft_vlm_768.pth"]
    receipt.write_text(json.dumps(notes))
    assert get("weights", "--preset", "base").code == 2


def test_a_mirror_keeps_the_files_of_its_hub_and_may_replace_them(get, hub):
    assert get("lm").code == 0
    assert get("lm", "--json", hub_name="modelscope").json["files"][0]["action"] == "kept"
    assert get("lm").code == 0
    hub.repos["models/gongjy/MiniMind2-V-PyTorch"]["llm_512.pth"] = LM[1:]
    assert get("lm", "--json", hub_name="modelscope").json["files"][0]["action"] == "fetched"


def test_files_copied_by_hand_are_checked_and_kept(get, hub, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "lm_512.pth").write_bytes(LM)
    assert get("lm", "--json").json["files"][0]["action"] == "kept"
    assert hub.sent == 0


def test_a_damaged_receipt_is_an_empty_one(get, hub, tmp_path):
    get("lm")
    (tmp_path / "out" / ".mmv-download" / "receipt.json").write_text('{"files": 3')
    hub.forget()
    assert get("lm", "--json").json["files"][0]["action"] == "kept"
    assert hub.sent == 0


def test_a_mirror_that_lists_names_only_is_asked_for_each_file(get, hub, tmp_path):
    hub.bare = True
    assert get("lm").code == get("tokenizer").code == 0
    assert ("HEAD", f"/jingyaogong/MiniMind2-V-PyTorch/resolve/{COMMIT}/llm_512.pth") in hub.requests
    hub.faults["pytorch_model.bin"] = [("corrupt", 0)]
    assert "SHA-256" in get("clip").err


def test_a_mirror_that_lists_nothing_is_asked_for_the_names_that_matter(get, hub, tmp_path):
    hub.silent = True
    for what in ("tokenizer", "lm", "clip"):
        assert get(what, "--hub", "hf").code == 0
    assert (tmp_path / "out" / "lm_512.pth").read_bytes() == LM
    hub.repos["models/jingyaogong/MiniMind2-Small-V"].clear()
    ended = get("tokenizer", "--hub", "hf", "--revision", "v2")
    assert ended.code == 1
    assert "not found" in ended.err


def test_tokens_stay_with_the_hub(get, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert get("lm").code == 0
    assert get("dataset", "--sample", 3).code == 0
    assert hub.authorized == []


@pytest.mark.parametrize(
    ("options", "status", "headers", "message"),
    [
        ((), 401, {}, "hf auth login"),
        ((), 403, {"X-Error-Code": "GatedRepo"}, "hf auth login"),
        ((), 429, {"Retry-After": "3600"}, "too many requests"),
        ((), 503, {}, "the hub failed on"),
        (("--revision", "nowhere"), 0, {}, "--revision"),
        (("--preset", "base"), 0, {}, "lacks lm_768.pth — it has: llm_512.pth"),
    ],
)
def test_refusals_are_reported_in_one_line(get, hub, tmp_path, options, status, headers, message):
    hub.status, hub.headers = status, headers
    assert message in get("lm", *options).error
    assert finished(tmp_path) == []


def test_a_busy_listing_is_asked_again(get, hub):
    hub.status, hub.status_times, hub.headers = 429, 2, {"Retry-After": "0"}
    assert get("lm").code == 0


def test_auto_says_which_hub_it_took_and_why(get, hub):
    hub.status = 500
    done = get("lm", hub_name="auto")
    assert done.code == 0
    assert "hf: the hub failed" in done.err
    assert "from modelscope" in done.err


def test_nothing_reachable_is_one_line(tmp_path):
    done = run_mmv("download", "lm", "--endpoint", "http://127.0.0.1:9", "--dir", tmp_path)
    for phrase in ("127.0.0.1:9", "--endpoint", "HF_ENDPOINT", "yourself", str(tmp_path / "out")):
        assert phrase in done.error
    assert tree(tmp_path) == []


def test_space_is_checked_before_the_first_byte(get, hub, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1, 1, 1_000_000))
    assert "3.0 MB to download, 1.0 MB are free" in get("lm").error
    assert (finished(tmp_path), hub.sent) == ([], 0)


@pytest.mark.parametrize("split", ["pretrain", "sft"])
def test_a_sample_of_parquet(get, hub, tmp_path, split):
    whole = hub.repos[DATA][f"{split}_i2t.parquet"]
    report = get("dataset", "--split", split, "--sample", 20, "--json").json
    path = tmp_path / "dataset" / "sample" / f"{split}_i2t.parquet"
    table = pq.read_table(io.BytesIO(whole))
    assert pq.read_table(path).equals(table.slice(0, 20))
    assert pq.read_schema(path).equals(table.schema, check_metadata=True)
    assert hub.sent < len(whole) / 2
    assert report["files"][0]["path"] == str(path)
    hub.forget()
    assert get("dataset", "--split", split, "--sample", 20, "--json").json["files"][0]["action"] == "kept"
    assert hub.requests == []
    get("dataset", "--split", split, "--sample", 7)
    assert pq.read_metadata(path).num_rows == 7
    get("dataset", "--split", split, "--sample", 20)
    assert pq.read_metadata(path).num_rows == 20
    get("dataset", "--split", split, "--sample", 99999)
    assert pq.read_table(path).equals(table)
    assert pq.read_metadata(path).row_group(0).num_rows <= 64


def test_a_sample_of_the_older_layout(get, hub, tmp_path):
    hub.repos[DATA] = older_layout(400)
    assert get("dataset", "--split", "pretrain", "--sample", 5).code == 0
    folder = tmp_path / "dataset" / "sample"
    assert (folder / "pretrain_data.jsonl").read_bytes() == b"".join(
        hub.repos[DATA]["pretrain_data.jsonl"].splitlines(keepends=True)[:5]
    )
    whole = zipfile.ZipFile(io.BytesIO(hub.repos[DATA]["pretrain_images.zip"]))
    with zipfile.ZipFile(folder / "pretrain_images.zip") as archive:
        assert len(archive.namelist()) == 10
        assert all(archive.read(name) == whole.read(name) for name in archive.namelist())
    assert hub.sent < sum(map(len, hub.repos[DATA].values())) / 2
    assert get("dataset", "--split", "pretrain").code == 0
    assert (tmp_path / "dataset" / "pretrain_images.zip").read_bytes() == hub.repos[DATA]["pretrain_images.zip"]


def test_a_sample_where_ranges_fail(get, hub, tmp_path):
    hub.faults["pretrain_i2t.parquet"] = [("status", 503), ("cut", 100), ("stall", 9)]
    assert get("dataset", "--split", "pretrain", "--sample", 3).code == 0
    hub.faults["sft_i2t.parquet"] = [("whole", 0)]
    assert "only as a whole" in get("dataset", "--split", "sft", "--sample", 3).error
    assert "sft_i2t.parquet" not in "".join(finished(tmp_path))


@pytest.mark.parametrize(
    "options",
    [("lm", "--sample", 3), ("clip", "--split", "sft"), ("lm", "--endpoint", "ftp://x"), ("dataset", "--sample", 0)],
)
def test_usage(options):
    assert run_mmv("download", *options).code == 2


@pytest.mark.parametrize("name", ["hf", "modelscope"])
@pytest.mark.parametrize("missing", ["config.json", "preprocessor_config.json", "pytorch_model.bin"])
def test_a_hub_that_lacks_one_file_of_several_names_that_one(get, hub, tmp_path, name, missing):
    for repo, files in hub.repos.items():
        if "clip" in repo:
            hub.repos[repo] = {path: data for path, data in files.items() if path != missing}
    ended = get("all", hub_name=name)
    assert ended.code == 1
    repo = "openai/clip-vit-base-patch16" if name == "hf" else "openai-mirror/clip-vit-base-patch16"
    lacking = ended.error.partition(" lacks ")[2].partition(" — it has: ")[0]
    assert ended.error.startswith(f"{repo} at ")
    assert lacking == {"pytorch_model.bin": "pytorch_model.bin"}.get(missing, missing)
    assert "--endpoint" in ended.error
    assert finished(tmp_path) == []


def test_a_hub_that_lacks_files_of_two_repositories_names_both(get, hub, tmp_path):
    del hub.repos["models/jingyaogong/MiniMind2-V-PyTorch"]["llm_512.pth"]
    del hub.repos["models/jingyaogong/MiniMind2-Small-V"]["tokenizer_config.json"]
    ended = get("all")
    assert ended.code == 1
    assert "jingyaogong/MiniMind2-V-PyTorch at " in ended.error
    assert "lacks lm_512.pth" in ended.error
    assert "lacks tokenizer_config.json — " in ended.error


@pytest.mark.parametrize("missing", ["tokenizer_config.json", "tokenizer.json"])
def test_a_file_that_is_listed_and_not_given_is_named_with_its_repository(get, hub, tmp_path, missing):
    hub.faults[missing] = [("status", 404)] * 9
    ended = get("tokenizer")
    assert ended.code == 1
    assert f"not found: {missing} of jingyaogong/MiniMind2-Small-V at " in ended.error
    assert "run this again later, or name another --endpoint" in ended.error
    hub.faults.clear()
    assert get("tokenizer").code == 0
    assert finished(tmp_path) == ["model/tokenizer.json", "model/tokenizer_config.json"]
