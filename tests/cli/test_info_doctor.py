"""`mmv info` and `mmv doctor`, on everything that there is and much that there is not."""

import json
import os
import re
import shutil
import zipfile

import pytest
import torch

from minimind_v.core.formats.checkpoint import export_tensors, write_checkpoint
from tests.cli.harness import ASSETS, BASE, EYE, ROWS, installed, read_rows, run_mmv, sighted_model, write_rows

DOWN = "model.layers.1.mlp.down_proj.weight"
COMPANIONS = ("--vision-model", EYE, "--tokenizer", EYE.parent)


def test_info_of_weights(sighted):
    report = run_mmv("info", sighted, "--json").json
    assert report["kind"] == "weights"
    assert (report["stage"], report["preset"], report["dtype"]) == ("sft", "demo", "float16")
    assert (report["hidden_size"], report["num_hidden_layers"], report["num_attention_heads"]) == (128, 4, 4)
    assert report["vision_width"] == 128
    assert report["parameters"] == sum(
        tensor.numel() for name, tensor in torch.load(sighted, weights_only=True).items() if name != "lm_head.weight"
    )


def test_info_of_a_base(tmp_path):
    report = run_mmv("info", BASE, "--json").json
    assert (report["stage"], report["preset"], report["vision_width"]) == ("lm", "demo", None)


def test_info_of_weights_without_a_description(sighted, tmp_path):
    copy = tmp_path / "renamed.pth"
    copy.write_bytes(sighted.read_bytes())
    report = run_mmv("info", copy, "--json").json
    assert (report["preset"], report["stage"], report["sizes_from"]) == ("demo", "unknown", "the shapes of its tensors")


@pytest.mark.parametrize(
    ("change", "receipt"),
    [
        (lambda tensors: tensors.pop("model.norm.weight"), "1 missing (model.norm.weight)"),
        (lambda tensors: tensors.pop("vision_proj.vision_proj.0.bias"), "1 missing (vision_proj.vision_proj.0.bias)"),
        (lambda tensors: [tensors.pop(f"vision_proj.vision_proj.0.{name}") for name in ("weight", "bias")],
         "2 missing (vision_proj.vision_proj.0.weight, vision_proj.vision_proj.0.bias)"),
        (lambda tensors: tensors.update({"model.other": tensors["model.norm.weight"]}), "1 unexpected (model.other)"),
        (lambda tensors: tensors.update({DOWN: tensors[DOWN].T}), f"1 wrong shape ({DOWN} ["),
    ],
)  # fmt: skip
def test_info_of_weights_that_will_not_load_ends_with_the_receipt_of_a_load(tmp_path, change, receipt):
    model = sighted_model()
    tensors = export_tensors(model)
    change(tensors)
    write_checkpoint(tmp_path / "w.pth", tensors, model.model_config, "sft")
    report = run_mmv("info", tmp_path / "w.pth")
    loaded = run_mmv("chat", "What?", "--model", tmp_path / "w.pth", *COMPANIONS)
    assert (report.code, report.out) == (1, "")
    assert receipt in report.error
    assert report.error == loaded.error


def test_info_compares_the_projector_of_weights_without_a_description(sighted, tmp_path):
    tensors = torch.load(sighted, weights_only=True)
    bias = tensors.pop("vision_proj.vision_proj.0.bias")
    torch.save(tensors, tmp_path / "w.pth")
    assert "1 missing (vision_proj.vision_proj.0.bias)" in run_mmv("info", tmp_path / "w.pth").error
    tensors["vision_proj.vision_proj.0.wight"] = tensors.pop("vision_proj.vision_proj.0.weight")
    torch.save(tensors | {"vision_proj.vision_proj.0.bias": bias}, tmp_path / "w.pth")
    assert "its projector is none of linear" in run_mmv("info", tmp_path / "w.pth").error


def test_info_warns_of_weights_that_are_zeros(sighted, tmp_path):
    tensors = torch.load(sighted, weights_only=True)
    torch.save(tensors | {DOWN: torch.zeros_like(tensors[DOWN])}, tmp_path / "w.pth")
    ended = run_mmv("info", tmp_path / "w.pth")
    assert ended.code == 0
    assert f"zeros alone in 1 of 31 matrices ({DOWN})" in ended.err


def test_info_of_data(tiny_data):
    report = run_mmv("info", tiny_data.data("sft"), "--json").json
    assert (report["kind"], report["rows"], report["first_row_images"]) == ("dataset", ROWS, ["000000.jpg"])
    assert report["first_row_messages"] == len(read_rows(tiny_data.data("sft"))[0]["conversations"])


def test_info_of_a_run(trained):
    for path in (trained.out / "pretrain_vlm_128", trained.out / "pretrain_vlm_128" / "metrics.jsonl"):
        report = run_mmv("info", path, "--json").json
        assert report["weights"] == str(trained.out / "pretrain_vlm_128.pth")
        assert (report["kind"], report["step"], report["steps"], report["records"]) == ("run", 10, 10, 10)


def test_info_of_a_run_that_is_writing_a_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 6.5}\n{"step": 2, "lo')
    assert run_mmv("info", tmp_path, "--json").json["step"] == 1
    (tmp_path / "metrics.jsonl").write_text("")
    assert "logged nothing yet" in run_mmv("info", tmp_path).error


def test_info_as_a_table(sighted):
    lines = dict(line.split(maxsplit=1) for line in run_mmv("info", sighted).out.splitlines())
    assert lines["preset"] == "demo"
    assert re.fullmatch(r"\d{3},\d{3}", lines["parameters"])
    assert "n_routed_experts" not in lines


def test_a_table_has_units_and_rounds_while_json_is_exact(trained, tiny_data):
    run_folder, data = trained.out / "pretrain_vlm_128", tiny_data.data("sft")
    lines = dict(line.split(maxsplit=1) for line in run_mmv("info", run_folder).out.splitlines())
    exact = run_mmv("info", run_folder, "--json").json
    assert (lines["loss"], lines["lr"]) == (f"{exact['loss']:.4g}", f"{exact['lr']:.4g}")
    assert len(lines["loss"]) <= 7 < len(str(exact["loss"]))
    assert re.fullmatch(r"(\d+ min )?\d+ s", lines["time"])
    lines = dict(line.split(maxsplit=1) for line in run_mmv("info", data).out.splitlines())
    assert lines["size"] == f"{data.stat().st_size / 1e3:,.1f} kB"
    assert lines["first_row_images"] == "000000.jpg"


def test_info_of_rows_takes_their_images(tiny_data, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", read_rows(tiny_data.data("sft")))
    assert "images  " not in run_mmv("info", rows).out.replace("first_row_images", "")
    assert run_mmv("info", rows, "--images", tiny_data.images("sft"), "--json").json["pictures"] == str(
        tiny_data.images("sft")
    )
    ended = run_mmv("info", BASE, "--images", tmp_path)
    assert (ended.code, "is not a dataset — remove --images" in ended.error) == (2, True)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.pth", b"", "empty"),
        ("page.pth", b"  <html>", "HTML page"),
        ("text.txt", b"hello", "neither a torch nor a safetensors file"),
        ("rows.jsonl.gz", b"\x1f\x8b\x08", "this is a gzip archive — unpack it first"),
        ("set.tar.gz", b"\x1f\x8b\x08", "decompress it first"),
        ("rows.xls", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an Excel workbook — save it as CSV"),
        ("zeros.bin", bytes(100), "neither a torch nor a safetensors file"),
        ("header.safetensors", b"\xff" * 8 + b"{", "truncated or damaged"),
        ("rows.jsonl", b"", "the file has no rows"),
        ("rows.jsonl", b"{\n", "rows.jsonl:1: not JSON"),
        ("rows.jsonl", b"[]\n", "rows.jsonl: the file has no rows"),
        ("rows.jsonl", b'\n\n{"image": 5}\n', "rows.jsonl:3: `image`"),
        ("rows.jsonl", b"<html>\n", "HTML page"),
        ("metrics.jsonl", b"nonsense\n", "not the metrics of a run"),
        ("metrics.jsonl", b"[1]\n", "not the metrics of a run"),
        ("metrics.jsonl", b'{"step": 1}\n', "not the metrics of a run"),
        ("metrics.jsonl", b"\xff\xfe\n", "not the metrics of a run"),
    ],
)
def test_info_of_nonsense_is_one_line_that_names_the_file(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    ended = run_mmv("info", tmp_path / name)
    assert (ended.code, ended.out) == (1, "")
    assert str(tmp_path / name) in ended.error
    assert message in ended.error


def test_an_excel_workbook_is_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "rows.xlsx", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("docProps/app.xml", "[Content_Types].xml", "xl/workbook.xml"):
            archive.writestr(name, "<xml/>" * 50)
    for arguments in (
        ("info", tmp_path / "rows.xlsx"),
        ("data", "convert", tmp_path / "rows.xlsx", tmp_path / "a.jsonl"),
    ):
        ended = run_mmv(*arguments)
        assert ended.code == 1
        assert "an Excel workbook — save it as CSV" in ended.error


def test_info_of_another_split(tmp_path):
    for split, rows in (("train", 3), ("test", 2)):
        (tmp_path / split).mkdir()
        text = "file_name,text\n" + "".join(f"{row}.jpg,a dog\n" for row in range(rows))
        (tmp_path / split / "metadata.csv").write_text(text)
    assert run_mmv("info", tmp_path, "--json").json["rows"] == 3
    report = run_mmv("info", tmp_path, "--split", "test", "--json").json
    assert (report["split"], report["rows"]) == ("test", 2)
    ended = run_mmv("info", BASE, "--split", "test")
    assert (ended.code, "--split test" in ended.error) == (2, True)


def test_info_of_odd_rows_still_reports_what_it_can(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"conversations": 7}\n')
    assert run_mmv("info", tmp_path / "rows.jsonl", "--json").json["first_row_messages"] == 0


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (EYE / "model.safetensors", "not the weights of a MiniMind model"),
        (ASSETS / "tokenizer.json", "which is neither a row nor a list of rows"),
        (EYE, "not the weights of a MiniMind model"),
        (ASSETS.parent, "is not itself a model, dataset or run"),
        (".", "is not itself a model, dataset or run"),
        ("nowhere", "no file nowhere"),
        ("/dev/null", "/dev/null"),
        ("x" * 300, "File name too long"),
        ("[bold]", "no file [bold]"),
    ],
)
def test_info_of_other_files(file, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ended = run_mmv("info", file)
    assert ended.code == 1
    assert message in ended.error


def test_info_of_a_folder_of_runs_leads_to_the_command_that_lists_them(tmp_path):
    (tmp_path / "sft_vlm_128.pth").write_bytes(b"PK")
    assert f"`mmv runs {tmp_path}` lists" in run_mmv("info", tmp_path).error


def test_info_of_pictures_and_of_a_zip_of_them(tiny_data, tmp_path):
    report = run_mmv("info", tiny_data.images("sft"), "--json").json
    assert (report["kind"], report["members"]) == ("zip", ROWS)
    assert f"give the rows ({tiny_data.data('sft')}) here, and the zip with --images" in report["use"]
    report = run_mmv("info", tiny_data.picture(), "--json").json
    assert (report["kind"], report["width"], report["height"]) == ("picture", 128, 128)
    (tmp_path / "cut.zip").write_bytes(tiny_data.images("sft").read_bytes()[:1000])
    assert "not a zip that can be read" in run_mmv("info", tmp_path / "cut.zip").error


@pytest.mark.parametrize("here_or_up", [".", ".."])
def test_info_of_the_folder_that_one_stands_in(here_or_up, tiny_data, tmp_path, monkeypatch):
    assert run_mmv("data", "convert", tiny_data.data("sft"), tmp_path / "rows.parquet").code == 0
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path / ("inner" if here_or_up == ".." else ""))
    assert run_mmv("info", here_or_up, "--json").json["rows"] == ROWS


def test_a_name_that_is_no_text_is_reported_all_the_same(sighted, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "utf-8:strict")  # as where a language is set
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/w\xff.pth")
    shutil.copy(sighted, odd)
    ended = installed("info", odd)
    assert (ended.code, "w\\udcff.pth" in ended.out) == (0, True)
    assert installed("info", odd, "--json").json["file"] == odd


def test_doctor_says_how_to_get_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    report = run_mmv("doctor", "--json").json
    assert report["torch"] == torch.__version__
    missing = {name: value for name, value in report.items() if value.startswith("missing")}
    assert len(missing) == 6
    assert all("`mmv download " in value or "`mmv train " in value for value in missing.values())
    assert "  " not in "".join(missing.values())


def test_doctor_finds_what_is_there(tmp_path, monkeypatch, tiny_data):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model" / "vision_model").mkdir(parents=True)
    (tmp_path / "model" / "vision_model" / "clip-vit-base-patch16").symlink_to(EYE)
    (tmp_path / "model" / "tokenizer.json").symlink_to(ASSETS / "tokenizer.json")
    (tmp_path / "dataset").symlink_to(tiny_data.folder)
    report = run_mmv("doctor", "--json").json
    present = {name for name, value in report.items() if value.startswith("found, ")}
    assert present == {"vision model", "tokenizer", "pretrain data", "sft data"}
    assert json.loads(run_mmv("doctor", "--json").out) == report
    assert "vision model " in run_mmv("doctor").out


def test_doctor_knows_the_demo(tmp_path, monkeypatch, sighted):
    monkeypatch.chdir(tmp_path)
    assert "demo" not in run_mmv("doctor", "--json").json
    out = tmp_path / "demo" / "out"
    out.mkdir(parents=True)
    (out / "sft_vlm_128.pth").write_bytes(sighted.read_bytes())
    demo_line = run_mmv("doctor", "--json").json["demo"]
    assert demo_line.startswith("found, demo/out/sft_vlm_128.pth")
    assert "mmv chat --model demo/out/sft_vlm_128.pth" in demo_line
    assert f"{sighted.stat().st_size / 1e6:,.0f} MB, `rm -r demo`" in demo_line
