"""`mmv chat` with one question."""

import base64
import json
import os
import shutil
import sys
from types import SimpleNamespace

import pytest

from minimind_v.cli import chat
from minimind_v.core.data.tokenizer import Tokenizer
from minimind_v.core.generate.sampling import GREEDY
from minimind_v.core.generate.session import Session
from minimind_v.core.wording import plural
from tests.cli.harness import ASSETS, BASE, EYE, SIGHT, installed, run_mmv, sighted_model, tokenizer
from tests.tokenizers_made import thinking_tokenizer

QUESTION = "What colour is the star?"


@pytest.fixture
def ask(sighted):
    def run(*args, code=0, stdin=b""):
        ended = run_mmv("chat", "--model", sighted, *SIGHT, "--max-new-tokens", 20, *args, stdin=stdin)
        assert ended.code == code, ended.err
        return ended

    return run


def test_the_installed_command_answers_on_stdout(ask, sighted, tiny_data):
    args = (QUESTION, "--image", tiny_data.picture(), "--greedy")
    ended = installed("chat", "--model", sighted, *SIGHT, *args)
    assert ended.code == 0, ended.err
    assert ended.err == ""
    assert ended.out == ask(*args, "--max-new-tokens", 512).out
    assert ended.out.endswith("\n")


def test_json_is_one_object_with_the_answer(ask, tiny_data):
    answer = ask(QUESTION, "--image", tiny_data.picture(), "--greedy", "--json").json
    assert answer["prompt"] == QUESTION
    assert answer["images"] == [str(tiny_data.picture())]
    assert answer["answer"] + "\n" == ask(QUESTION, "--image", tiny_data.picture(), "--greedy").out
    assert 0 < answer["tokens"] <= 20
    assert 0 < answer["seconds_to_first_token"] <= answer["seconds"]


def test_the_question_may_come_from_a_pipe(ask):
    assert ask("--greedy", stdin=f"{QUESTION}\n").out == ask(QUESTION, "--greedy").out


def test_a_seed_makes_the_draw_repeatable(ask):
    def draw(seed):
        return ask("有几个物体？", "--seed", seed, "--temperature", 3, "--top-p", 1).out

    assert draw(5) == draw(5)
    assert len({draw(seed) for seed in range(5)}) > 1


def test_greedy_is_temperature_zero_and_heeds_no_seed(ask):
    greedy = ask(QUESTION, "--greedy", "--seed", 1, "--temperature", 9).out
    assert greedy == ask(QUESTION, "--temperature", 0, "--seed", 2).out == ask(QUESTION, "--temperature", 1e-45).out


def test_an_answer_is_no_longer_than_wished(ask):
    assert ask(QUESTION, "--max-new-tokens", 1, "--greedy", "--json").json["tokens"] == 1


def test_what_the_picture_shows_reaches_the_model(tiny_data):
    """Not on what is right: the projector of these weights has learnt nothing."""
    session, all_logits = Session(sighted_model(), tokenizer(), GREEDY), []
    session.sampler = lambda logits, text_ids: all_logits.append(logits) or int(logits.argmax())
    for number in (0, 1):
        session.restart()
        "".join(session.ask(QUESTION, [tiny_data.picture(number)], 1))
    assert (all_logits[0] - all_logits[1]).abs().max() > 1e-3


def test_several_pictures_and_marks_that_place_them(ask, tiny_data):
    two = ("--image", tiny_data.picture(0), "--image", tiny_data.picture(1), "--greedy", "--json")
    front = ask("Which is bigger?", *two).json
    assert len(front["images"]) == 2
    assert ask("<image>\n<image>\nWhich is bigger?", *two).json["answer"] == front["answer"]
    assert ask("Is <image> bigger than <image>?", *two).json["tokens"] > 0


@pytest.mark.parametrize(("marks", "pictures"), [(1, 0), (2, 1), (1, 2)])
def test_marks_and_pictures_must_be_as_many(ask, tiny_data, marks, pictures):
    images = [word for number in range(pictures) for word in ("--image", tiny_data.picture(number))]
    line = ask("<image>" * marks + "?", *images, code=2).error
    assert line == f"the question has {plural(marks, '<image> mark')} for {plural(pictures, 'image')}"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<!DOCTYPE html><html>", "an HTML page"),
        (b"", "cannot be decoded"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a git-lfs pointer"),
    ],
)
def test_a_file_that_is_no_picture_is_reported(ask, tmp_path, content, message):
    (tmp_path / "dog.jpg").write_bytes(content)
    line = ask(QUESTION, "--image", tmp_path / "dog.jpg", code=1).error
    assert f"{tmp_path / 'dog.jpg'}: " in line
    assert message in line


def test_a_cut_picture_is_reported(ask, tiny_data, tmp_path):
    (tmp_path / "dog.jpg").write_bytes(tiny_data.picture().read_bytes()[:500])
    assert "cannot be decoded" in ask(QUESTION, "--image", tmp_path / "dog.jpg", code=1).error


def test_a_picture_that_does_not_exist_is_reported(ask, tmp_path):
    assert ask(QUESTION, "--image", "dog.jpg", code=1).error == "no image file at dog.jpg"
    assert ask(QUESTION, "--image", tmp_path, code=1).error == f"no image file in the folder {tmp_path}"
    assert ask(QUESTION, "--image", tmp_path / "*.jpg", code=1).error == f"no file matches {tmp_path / '*.jpg'}"
    assert "File name too long" in ask("dog.jpg", "--image", QUESTION * 50, code=1).error  # the two mixed up


def test_all_missing_pictures_are_reported_at_once(ask, tiny_data, tmp_path):
    b = tmp_path / "b.jpg"
    line = ask(QUESTION, "--image", "a.jpg", "--image", tiny_data.picture(), "--image", b, code=1).error
    assert line == f"2 inputs are missing: no image file at a.jpg; no image file at {b}"
    assert "--image is empty" in ask(QUESTION, "--image", "", code=2).error


def test_a_missing_picture_is_reported_with_all_other_missing_inputs(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    error = run_mmv("chat", QUESTION, "--image", "a.jpg").error
    assert error.startswith("4 inputs are missing: no image file at a.jpg; no trained weights in out")


def test_an_address_is_read_or_refused(ask, tiny_data, tmp_path):
    picture = tmp_path / "a dog's 100% ä.jpg"
    picture.write_bytes(tiny_data.picture().read_bytes())
    expected = ask(QUESTION, "--image", picture, "--greedy").out
    inline = "data:image/jpeg;base64," + base64.b64encode(picture.read_bytes()).decode()
    for address in (picture.as_uri(), picture.as_uri().replace("file://", "file://localhost"), inline):
        assert ask(QUESTION, "--image", address, "--greedy").out == expected
    shown = ask(QUESTION, "--image", inline, "--greedy", "--json").json["images"]
    assert len(shown[0]) <= 120
    for address in ("ftp://example.org/dog.jpg", "s3://bucket/dog.jpg", "file://elsewhere/dog.jpg"):
        line = ask(QUESTION, "--image", address, code=2).error
        assert line.startswith(f"{address} is a web address")
        assert "download it first" in line
    assert "without content" in ask(QUESTION, "--image", "data:image/png", code=2).error
    damaged = ask(QUESTION, "--image", inline[:100] + "!", code=2).error
    assert "damaged or cut" in damaged
    assert len(damaged) < 300


def test_an_image_may_come_from_a_pipe(ask, tiny_data):
    content = tiny_data.picture().read_bytes()
    piped = ask(QUESTION, "--image", "-", "--greedy", "--json", stdin=content).json
    assert piped["images"] == ["stdin"]
    assert piped["answer"] + "\n" == ask(QUESTION, "--image", tiny_data.picture(), "--greedy").out
    assert "the question is missing" in ask("--image", "-", code=2, stdin=content).err
    assert "given twice" in ask(QUESTION, "--image", "-", "--image", "-", code=2, stdin=content).error
    assert ask(QUESTION, "--image", "-", code=1, stdin=b"").error.startswith("stdin: ")


def test_a_web_address_is_fetched(ask, tiny_data, web):
    address = web(tiny_data.picture().read_bytes())
    answer = ask(QUESTION, "--image", address, "--greedy", "--json").json
    assert answer["images"] == [address]
    assert answer["answer"] + "\n" == ask(QUESTION, "--image", tiny_data.picture(), "--greedy").out
    line = ask(QUESTION, "--image", f"{address}/none", code=1).error
    assert line == f"{address}/none: the server answered HTTP 404 Not Found — check the address"


def test_sampling_has_all_its_options(ask):
    chance = (QUESTION, "--temperature", 3, "--top-p", 1, "--seed", 4)
    greedy, free = ask(QUESTION, "--greedy").out, ask(*chance).out
    assert free != greedy
    assert ask(*chance, "--top-k", 1).out == ask(*chance, "--min-p", 1).out == greedy
    assert ask(QUESTION, "--greedy", "--repetition-penalty", 50).out != greedy


def test_a_system_prompt_changes_what_the_model_reads(ask):
    assert ask(QUESTION, "--greedy", "--system", "有几个物体？" * 20).out != ask(QUESTION, "--greedy").out
    standard = "You are a helpful assistant"
    assert ask(QUESTION, "--greedy", "--system", standard).out == ask(QUESTION, "--greedy").out


# --- one answer for each image ----------------------------------------------------------------------------------------


@pytest.fixture
def folder(tiny_data, tmp_path):
    """Ten images, of which the fourth is broken."""
    for number in range(10):
        (tmp_path / f"{number}.jpg").write_bytes(tiny_data.picture(number % 3).read_bytes())
    (tmp_path / "3.jpg").write_bytes(b"<!DOCTYPE html>")
    (tmp_path / "notes.txt").write_text("no picture")
    return tmp_path


def test_each_image_of_a_folder_gets_the_answer_that_it_gets_alone(ask, folder):
    ended = ask(QUESTION, "--image", folder, "--greedy", "--json", code=1)
    lines = [json.loads(line) for line in ended.out.splitlines()]
    assert [line["images"] for line in lines] == [[str(folder / f"{number}.jpg")] for number in range(10)]
    for number, line in enumerate(lines):
        if number == 3:
            assert "an HTML page" in line["error"]
            assert "answer" not in line
        else:
            alone = ask(QUESTION, "--image", folder / f"{number}.jpg", "--greedy", "--json").json
            assert line.keys() == alone.keys()
            assert (line["prompt"], line["answer"], line["tokens"]) == (QUESTION, alone["answer"], alone["tokens"])
    assert ended.err.count(f"{folder / '3.jpg'}: ") == 1
    assert "images 10/10" in ended.err


def test_quiet_does_not_hide_that_an_image_got_no_answer(ask, folder):
    ended = ask(QUESTION, "--image", folder / "[34].jpg", "--greedy", "--quiet", code=1)
    assert ended.out.startswith(f"{folder / '4.jpg'}: ")
    assert ended.err.startswith(f"{folder / '3.jpg'}: ")
    assert ended.err.count("\n") == 1


def test_a_pattern_chooses_images_and_names_stand_before_the_answers(ask, folder):
    ended = ask(QUESTION, "--image", folder / "[0-2].jpg", "--greedy")
    alone = [ask(QUESTION, "--image", folder / f"{number}.jpg", "--greedy").out for number in range(3)]
    assert ended.out == "".join(f"{folder / f'{number}.jpg'}: {answer}" for number, answer in enumerate(alone))
    mixed = ask(QUESTION, "--image", folder / "5.jpg", "--image", folder / "[0-2].jpg", "--greedy").out
    assert mixed == f"{folder / '5.jpg'}: {alone[2]}" + ended.out


def test_progress_stays_away_from_answers_in_one_stream(ask, folder, tmp_path, monkeypatch):
    with open(tmp_path / "both", "w") as stdout, open(os.dup(stdout.fileno()), "w") as stderr:
        monkeypatch.setattr(sys, "stdout", stdout)
        monkeypatch.setattr(sys, "stderr", stderr)
        assert chat._is_one_stream()
        with open(tmp_path / "other", "w") as other:
            monkeypatch.setattr(sys, "stderr", other)
            assert not chat._is_one_stream()
    monkeypatch.undo()
    monkeypatch.setattr(chat, "_is_one_stream", lambda: True)
    assert "images" not in ask(QUESTION, "--image", folder / "[0-2].jpg", "--greedy").err


def test_a_folder_takes_a_question_with_one_mark_only(ask, folder):
    assert "2 <image> marks for 1 image" in ask("<image><image>?", "--image", folder, code=2).error
    ended = ask("Is <image> big?", "--image", folder / "[01].jpg", "--greedy")
    assert ended.out.count("\n") == 2


def test_a_seed_draws_for_each_image_of_a_folder_anew(ask, folder):
    chance = (QUESTION, "--image", folder / "[05].jpg", "--temperature", 3, "--top-p", 1, "--seed", 4)
    assert ask(*chance).out == ask(*chance).out


def test_a_model_that_cannot_think_is_refused_once_for_a_folder(ask, folder):
    assert "cannot think" in ask(QUESTION, "--image", folder, "--think", code=2).error


def test_without_a_picture_it_says_so_once(ask, tiny_data):
    assert (
        ask(QUESTION, "--greedy").err == "no image: the model answers from the text alone (add one with --image FILE)\n"
    )
    assert ask(QUESTION, "--greedy", "--image", tiny_data.picture()).err == ""
    assert ask(QUESTION, "--greedy", "--json").err == ""


def test_a_picture_given_as_the_question_is_offered_as_one(ask, tiny_data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("my dog.jpg", "plain", "other.jpg"):
        (tmp_path / name).write_bytes(tiny_data.picture().read_bytes())
    (tmp_path / "notes").write_text("no picture")
    for name, quoted in (("my dog.jpg", "'my dog.jpg'"), ("plain", "plain"), ("nowhere.PNG", "nowhere.PNG")):
        line = ask(name, "--image", "other.jpg", code=2).error
        assert line == (
            f"{name!r} is an image file, not a question — "
            f"mmv chat --image other.jpg --image {quoted} 'What is in the image?'"
        )
    assert ask("notes", "--greedy").out
    assert ask("Is it nowhere.png or plain", "--greedy").out


def test_a_question_is_needed(ask):
    for args in ([], ["--json"]):
        ended = ask(*args, code=2, stdin="  \n")
        assert "the question is missing" in ended.err
        assert "Traceback" not in ended.err


@pytest.mark.parametrize("args", [[""], ["", "--json"], [" ", "--image"]], ids=str)
def test_an_empty_question_is_refused(ask, args, folder):
    assert ask(*args, *([folder] if "--image" in args else []), code=2).error.startswith("the question is empty")


def test_a_question_that_is_no_text_is_reported(ask):
    assert ask(code=2, stdin=b"\xff\xfe\x00\x01").error == "the question on stdin is not UTF-8 text"
    assert ask("What is \udcff?", code=1).error


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--temperature", -1, "temperature must be at least 0"),
        ("--temperature", "nan", "temperature must be at least 0"),
        ("--top-p", 0, "top_p must be above 0"),
        ("--top-p", 1.1, "top_p must be above 0"),
        ("--top-p", "nan", "top_p must be above 0"),
        ("--seed", 2**64, "seed must be at least 0 and below 2^63"),
        ("--seed", -1, "seed must be at least 0"),
        ("--top-k", -1, "top_k must be at least 0"),
        ("--min-p", 2, "min_p must be at least 0 and at most 1"),
        ("--repetition-penalty", 0, "repetition_penalty must be above 0"),
        ("--system", "an <image>", "<image> in the system prompt"),
        ("--device", "gpu", "--device gpu"),
    ],
)
def test_a_wrong_value_is_refused(ask, option, value, message):
    assert message in ask(QUESTION, option, value, code=2).error


def test_a_question_longer_than_the_context_is_reported(ask):
    assert "longer than 4096 tokens" in ask("star " * 5000, code=2).error


def test_without_weights_the_commands_that_make_them_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ended = run_mmv("chat", QUESTION)
    assert ended.code == 1
    assert "`mmv train pretrain`, `mmv train sft`" in ended.error


def test_without_options_the_standard_folders_are_used(tmp_path, monkeypatch, sighted, ask):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(EYE, "model/vision_model/clip-vit-base-patch16")
    shutil.copy(ASSETS / "tokenizer.json", "model")
    (tmp_path / "out").mkdir()
    shutil.copy(sighted, "out/sft_vlm_128.pth")
    shutil.copy(BASE, "out/lm_128.pth")  # newer, and nothing to talk to
    ended = run_mmv("chat", QUESTION, "--greedy", "--max-new-tokens", 20)
    assert ended.code == 0, ended.err
    assert ended.out == ask(QUESTION, "--greedy").out


def test_with_nothing_else_the_model_of_the_demo_is_used_and_named(tmp_path, monkeypatch, sighted, ask):
    monkeypatch.chdir(tmp_path)
    demo = tmp_path / "demo"
    shutil.copytree(EYE, demo / "model/vision_model/clip-vit-base-patch16")
    shutil.copy(ASSETS / "tokenizer.json", demo / "model")
    (demo / "out").mkdir()
    shutil.copy(sighted, demo / "out")
    ended = run_mmv("chat", QUESTION, "--greedy", "--max-new-tokens", 20)
    assert (ended.code, ended.out) == (0, ask(QUESTION, "--greedy").out)
    message = "no trained weights in out: using the demo's model, demo/out/sft_vlm_128.pth\n"
    assert ended.err.startswith(message)
    assert run_mmv("convert", "--to", "safetensors", "--out", "w.safetensors").code == 0
    shutil.copytree(demo / "out", "out")
    shutil.copytree(demo / "model", "model")
    assert message not in run_mmv("chat", QUESTION, "--greedy", "--max-new-tokens", 20).err


def test_a_text_only_base_is_refused(ask):
    assert "text-only base has no projector" in ask(QUESTION, "--model", BASE, code=1).error


# --- reasoning --------------------------------------------------------------------------------------------------------


@pytest.fixture
def thinker(monkeypatch, tmp_path):
    """A model that reasons: `thinker(text)` makes `mmv chat` draw the tokens of a text."""
    vocabulary = Tokenizer.load(thinking_tokenizer(tmp_path / "thinking"))

    def draw(text):
        ids = [*vocabulary.backend.encode(text, add_special_tokens=False).ids, vocabulary.eos_id]
        loaded = SimpleNamespace(
            model=sighted_model(), tokenizer=vocabulary, checkpoint=SimpleNamespace(path="weights")
        )
        monkeypatch.setattr("minimind_v.cli.options.load", lambda *args: loaded)
        monkeypatch.setattr("minimind_v.core.generate.session.Sampler", lambda sampling: lambda *_: ids.pop(0))

    return draw


def test_reasoning_is_apart_in_json(thinker, ask):
    thinker("of red\n</think>\n\nA star")
    answer = ask(QUESTION, "--think", "--json").json
    assert (answer["reasoning"], answer["answer"]) == ("of red", "A star")
    assert answer["tokens"] > 5


def test_reasoning_goes_to_stderr_and_the_answer_to_stdout(thinker, ask):
    thinker("of red\n</think>\n\nA star")
    ended = ask(QUESTION, "--think")
    assert ended.out == "A star\n"
    assert ended.err.endswith("of red\n\n")


def test_an_answer_that_is_all_reasoning_is_empty(thinker, ask):
    thinker("of red")
    answer = ask(QUESTION, "--think", "--json").json
    assert (answer["reasoning"], answer["answer"]) == ("of red", "")


def test_without_think_json_has_no_reasoning(thinker, ask):
    thinker("A star")
    answer = ask(QUESTION, "--json").json
    assert answer["answer"] == "A star"
    assert "reasoning" not in answer


def test_a_model_without_think_blocks_is_refused(ask):
    line = ask(QUESTION, "--think", code=2).error
    assert line == "the chat layout chatml has no think block: its model cannot think — leave out --think"
