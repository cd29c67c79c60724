"""Writes data sets of the embedded world: a JSONL file and a zip of JPEG files."""

from __future__ import annotations

import json
import random
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from minimind_v.core.demo import world
from minimind_v.core.demo.world import Item, Question, Scene

QUESTIONS = 8  # about one image: its tokens are the cost, the answers are the signal


@dataclass(frozen=True)
class DemoSet:
    """A JSONL file and its zip of pictures."""

    data: Path
    images: Path


@dataclass(frozen=True)
class Test:
    """One held-out image with one question."""

    picture: bytes
    question: Question


def write_pretrain(folder: Path, rng: random.Random, rows: int) -> tuple[DemoSet, set[Scene]]:
    """Write images with captions, in English or Chinese."""

    def talk(scene: Scene) -> list[tuple[str, str]]:
        language = rng.choice(world.LANGUAGES)
        return [(rng.choice(world.CAPTION_PROMPTS[language]), world.caption(scene, language))]

    scenes = [world.make_scene(rng) for _ in range(rows)]
    return _write(folder, "pretrain", ((scene, talk(scene)) for scene in scenes), rng), set(scenes)


def write_sft(folder: Path, rng: random.Random, rows: int) -> tuple[DemoSet, set[Scene]]:
    """Write images with several questions each, and sometimes a caption, so that captions are not forgotten."""

    def talk(scene: Scene) -> list[tuple[str, str]]:
        if rng.random() < 0.05:
            language = rng.choice(world.LANGUAGES)
            return [(rng.choice(world.CAPTION_PROMPTS[language]), world.caption(scene, language))]
        return [(question.text, question.answer) for question in world.questions(scene, rng)][:QUESTIONS]

    scenes = [world.make_scene(rng) for _ in range(rows)]
    return _write(folder, "sft", ((scene, talk(scene)) for scene in scenes), rng), set(scenes)


def write_test(
    folder: Path, name: str, rng: random.Random, rows: int, known_scenes: set[Scene], held_out_pairs: bool
) -> tuple[DemoSet, list[Test]]:
    """One question per row, so that no earlier turn gives an answer away, about scenes that are not in `known_scenes`.

    With `held_out_pairs` every scene has an object of a held-out shape-colour pair, and the question is about it.
    """
    questions: list[Question] = []
    entries: list[tuple[Scene, list[tuple[str, str]]]] = []
    while len(entries) < rows:
        scene = world.make_scene(rng, held_out=held_out_pairs)
        if scene in known_scenes:
            continue
        about = next((item for item in scene if item.held_out), None)
        questions.append(question := _pick(list(world.questions(scene, rng, about)), rng))
        entries.append((scene, [(question.text, question.answer)]))
    written = _write(folder, name, entries, rng)
    with zipfile.ZipFile(written.images) as archive:
        return written, [Test(archive.read(_member(name, n)), question) for n, question in enumerate(questions)]


def write_pictures(folder: Path, rng: random.Random, known_scenes: set[Scene]) -> list[tuple[Path, Question]]:
    """Write a dozen picture files of scenes that are not in `known_scenes`, each with a question in English.

    Each shape has two files with a question about its colour: `star.jpg`, and `red_star.jpg` with the held-out
    pair. Two more show two and three objects, with a question about their number.
    """

    def scene(suits: Callable[[Scene], object], held_out: bool) -> Scene:
        while (scene := world.make_scene(rng, held_out)) in known_scenes or not suits(scene):
            pass
        return scene

    chosen: list[tuple[str, Scene, Question]] = []
    for shape, colour in sorted(world.HELD_OUT):
        for held_out in (False, True):
            shown = scene(lambda scene: len(_of_shape(scene, shape, held_out)) == 1, held_out)  # noqa: B023
            (item,) = _of_shape(shown, shape, held_out)
            name = f"{colour}_{shape}" if held_out else shape
            chosen.append((name, shown, world.ask("colour", shown, item, "en")))
    for count in (2, 3):
        shown = scene(lambda scene: len(scene) == count, False)  # noqa: B023
        chosen.append((f"{world.NUMBERS[count][0]}_objects", shown, world.ask("count", shown, None, "en")))
    folder.mkdir(parents=True, exist_ok=True)
    for name, shown, _ in chosen:
        (folder / f"{name}.jpg").write_bytes(world.jpeg(world.draw(shown, rng)))
    return [(folder / f"{name}.jpg", question) for name, _, question in chosen]


def _of_shape(scene: Scene, shape: str, held_out: bool) -> list[Item]:
    """The items of a shape; empty if one is of the other kind of pair, so that `the star` is unique."""
    items = [item for item in scene if item.shape == shape]
    return items if all(item.held_out == held_out for item in items) else []


def _pick(questions: list[Question], rng: random.Random) -> Question:
    """One random question; each kind is equally likely."""
    kind = rng.choice(sorted({question.kind for question in questions}))
    return next(question for question in questions if question.kind == kind)


def _member(name: str, number: int) -> str:
    return f"{name}_images/{number:06d}.jpg"


def _write(
    folder: Path, name: str, entries: Iterable[tuple[Scene, list[tuple[str, str]]]], rng: random.Random
) -> DemoSet:
    folder.mkdir(parents=True, exist_ok=True)
    written = DemoSet(folder / f"{name}_data.jsonl", folder / f"{name}_images.zip")
    with written.data.open("w", encoding="utf-8") as rows, zipfile.ZipFile(written.images, "w") as pictures:
        for number, (scene, turns) in enumerate(entries):
            pictures.writestr(_member(name, number), world.jpeg(world.draw(scene, rng)))
            messages = []
            for turn, (question, answer) in enumerate(turns):
                messages.append({"role": "user", "content": question if turn else f"<image>\n{question}"})
                messages.append({"role": "assistant", "content": answer})
            row = {"conversations": messages, "image": _member(name, number).rsplit("/", 1)[-1]}
            rows.write(json.dumps(row, ensure_ascii=False) + "\n")
    return written
