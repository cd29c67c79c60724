"""The embedded world: what it draws, says and asks, and what it keeps out."""

import itertools
import json
import random
import zipfile
from importlib.resources import files
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from minimind_v.core.config.presets import PRESETS
from minimind_v.core.data.images import load_pixels
from minimind_v.core.data.thinking import TAGS
from minimind_v.core.data.tokenizer import Tokenizer
from minimind_v.core.demo import world
from minimind_v.core.demo.dataset import write_pictures, write_pretrain, write_sft, write_test
from minimind_v.core.demo.generations import DEMO_GENERATIONS
from minimind_v.core.formats.checkpoint import read_checkpoint
from minimind_v.core.formats.vision_tower import load_encoder
from minimind_v.core.model.vision.spec import DEMO, TOWERS, read_tower_config

ASSETS = Path(str(files("minimind_v.core.demo") / "assets"))


def test_is_as_large_as_promised():
    assert len(world.SHAPES) >= 4
    assert len(world.COLOURS) >= 5
    assert len(world.SIZES) >= 2
    assert len(world.POSITIONS) >= 5
    assert {len(world.make_scene(random.Random(n))) for n in range(50)} == {1, 2, 3}


def test_every_shape_and_colour_is_known_from_other_pairs():
    """A held-out pair is new as a pair only."""
    free = {(s, c) for s in world.SHAPES for c in world.COLOURS} - world.HELD_OUT
    assert {shape for shape, _ in free} == set(world.SHAPES)
    assert {colour for _, colour in free} == set(world.COLOURS)


@pytest.mark.parametrize("write", [write_pretrain, write_sft])
def test_training_sets_never_show_or_name_a_held_out_pair(tmp_path, write):
    written, scenes = write(tmp_path, random.Random(3), 300)
    assert not any(item.held_out for scene in scenes for item in scene)
    text = written.data.read_text(encoding="utf-8")
    for shape, colour in world.HELD_OUT:
        assert f"{colour} {shape}" not in text
        assert world.COLOURS[colour][0] + world.SHAPES[shape] not in text


def test_scenes_have_no_held_out_pair_unless_asked_for():
    rng = random.Random(1)
    assert not any(item.held_out for _ in range(500) for item in world.make_scene(rng))
    for _ in range(200):
        assert sum(item.held_out for item in world.make_scene(rng, held_out=True)) == 1


def test_questions_have_the_answers_that_the_scene_gives():
    scene = (world.Item("star", "blue", "big", "top left"), world.Item("circle", "red", "small", "centre"))
    expected = {
        "What colour is the star?": "blue", "星形是什么颜色？": "蓝色", "Which shape is red?": "circle",
        "什么形状是红色？": "圆形", "Where is the circle?": "centre", "圆形在哪里？": "中间",
        "Is the star big or small?": "big", "星形是大还是小？": "大", "How many objects are there?": "two",
        "有几个物体？": "两", "Is there a blue star?": "yes", "有红色圆形吗？": "有", "Is there a blue circle?": "no",
    }  # fmt: skip
    answers = {q.text: q.answer for seed in range(200) for q in world.questions(scene, random.Random(seed))}
    assert {text: answers.get(text) for text in expected} == expected


def test_questions_are_only_asked_where_one_answer_is_right():
    twins = (world.Item("star", "blue", "big", "top left"), world.Item("star", "blue", "small", "centre"))
    kinds = {q.kind for seed in range(50) for q in world.questions(twins, random.Random(seed))}
    assert kinds == {"exists", "count"}


def test_yes_and_no_are_equally_frequent():
    rng = random.Random(5)
    answers = [q.answer for _ in range(2000) for q in world.questions(world.make_scene(rng), rng) if q.kind == "exists"]
    yes = sum(answer in ("yes", "有") for answer in answers) / len(answers)
    assert 0.45 < yes < 0.55


def test_a_test_set_holds_no_scene_of_training(tmp_path):
    """With every scene of a single object seen, only larger ones are left."""
    scenes = {
        (world.Item(*attributes),)
        for attributes in itertools.product(world.SHAPES, world.COLOURS, world.SIZES, world.POSITIONS)
    }
    _, tests = write_test(tmp_path, "held", random.Random("b"), 400, scenes, held_out_pairs=False)
    counts = [test.question.answer for test in tests if test.question.kind == "count"]
    assert len(counts) > 20
    assert not {"one", "一"} & set(counts)


def test_the_pictures_that_are_left_fit_their_questions(tmp_path):
    """The scene is not seen from a file: what was drawn is watched."""
    drawn, draw = [], world.draw
    scenes = {
        (world.Item(*attributes),)
        for attributes in itertools.product(world.SHAPES, world.COLOURS, world.SIZES, world.POSITIONS)
    }
    with mock.patch.object(world, "draw", lambda scene, rng: drawn.append(scene) or draw(scene, rng)):
        written = write_pictures(tmp_path, random.Random(9), scenes)
    assert len(written) == len(drawn) == 12
    assert {path.stem for path, _ in written} >= {"star", "red_star", "white_circle", "two_objects"}
    for (path, question), scene in zip(written, drawn, strict=True):
        assert load_pixels(path.read_bytes(), path.name, 64).shape == (3, 64, 64)
        assert scene not in scenes
        if question.kind == "count":
            assert question.answer == world.NUMBERS[len(scene)][0]
            continue
        (item,) = (item for item in scene if f"the {item.shape}?" in question.text)
        assert question.answer == item.colour
        assert path.stem == (f"{item.colour}_{item.shape}" if item.held_out else item.shape)


def test_what_it_knows_names_all_that_there_is():
    description = world.knows()
    assert all(
        word in description for word in (*world.SHAPES, *world.COLOURS, "three", "dark", "nothing else", "photographs")
    )


def test_a_seed_decides_every_byte(tmp_path):
    first, _ = write_sft(tmp_path / "1", random.Random("x"), 20)
    second, _ = write_sft(tmp_path / "2", random.Random("x"), 20)
    other, _ = write_sft(tmp_path / "3", random.Random("y"), 20)
    assert first.data.read_bytes() == second.data.read_bytes() != other.data.read_bytes()
    with zipfile.ZipFile(first.images) as first_zip, zipfile.ZipFile(second.images) as second_zip:
        assert [first_zip.read(name) for name in first_zip.namelist()] == [
            second_zip.read(name) for name in second_zip.namelist()
        ]


def test_pictures_differ_where_scenes_are_equal():
    """Noise in place, size, colour and ground: no picture is drawn twice."""
    scene = (world.Item("star", "blue", "big", "top left"),)
    rng = random.Random(2)
    first, second = (load_pixels(world.jpeg(world.draw(scene, rng)), "drawn", 64) for _ in range(2))
    assert np.abs(first.astype(int) - second.astype(int)).mean() > 1


def test_rows_name_their_pictures_and_mark_one_image(tmp_path):
    written, _ = write_sft(tmp_path, random.Random(4), 10)
    with zipfile.ZipFile(written.images) as archive:
        names = {name.rsplit("/", 1)[-1] for name in archive.namelist()}
    for line in written.data.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        assert row["image"] in names
        assert sum(message["content"].count("<image>") for message in row["conversations"]) == 1


def test_the_assets_are_small():
    for folder, most in ((ASSETS, 8e6), (ASSETS / "3v", 5e6)):
        assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < most


@pytest.mark.parametrize("demo", DEMO_GENERATIONS.values(), ids=DEMO_GENERATIONS)
def test_assets_carry_the_figures_of_their_making(demo):
    figures = json.loads((demo.assets / "figures.json").read_text())
    assert figures["tower"]["patch_shape"] > 0.95
    assert figures["base"]["answers_chords"] > 0.9


@pytest.mark.parametrize("demo", DEMO_GENERATIONS.values(), ids=DEMO_GENERATIONS)
def test_assets_have_the_form_of_their_generation(demo):
    """And no word of the world is split, which would give it several positions of a text, but one of an image."""
    folder, model = Path(str(demo.assets)), PRESETS[demo.preset]
    tokenizer = Tokenizer.load(folder)
    assert (tokenizer.layout, tokenizer.vocab_size) == (demo.generation.layout, model.vocab_size)
    names = [*world.SHAPES, *world.COLOURS, *world.SIZES]
    assert [name for name in names if len(tokenizer.encode(f" {name}").ids) > 1] == []
    base = read_checkpoint(folder / f"{demo.weights_name('lm')}.safetensors")
    assert (base.config, base.stage) == (model, "lm")
    tower = demo.generation.towers[0]
    assert read_tower_config(folder / "vision") == (TOWERS[tower], DEMO[tower])
    assert load_encoder(folder / "vision").spec == TOWERS[tower].describe(DEMO[tower], {})


def test_the_tokenizer_of_minimind_3v_has_the_published_added_tokens():
    """Those with an id that the code or the published files rely on; the tags of reasoning and tools are shown."""
    backend = Tokenizer.load(ASSETS / "3v").backend
    ids = {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2, "<|image_pad|>": 12, "<think>": 25, "</think>": 26}
    assert {name: backend.token_to_id(name) for name in ids} == ids
    added = backend.get_added_tokens_decoder()
    assert sorted(added) == list(range(36))
    assert {added[id].content for id in range(21, 27)} == set(TAGS)
    assert [id for id, token in added.items() if not token.special] == list(range(21, 36))
