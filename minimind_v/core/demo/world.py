"""The embedded world: images of one to three simple objects, with captions and questions about them.

Everything is drawn from a `random.Random`, so a seed decides the images, the words and the questions.
Five shape-colour pairs are kept out of every training set, so that naming one shows composition, not memory.
"""

from __future__ import annotations

import io
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

from PIL import Image, ImageDraw

SHAPES = {"circle": "圆形", "square": "方形", "triangle": "三角形", "star": "星形", "cross": "十字形"}
COLOURS = {
    "red": ("红色", (210, 35, 40)),
    "green": ("绿色", (30, 165, 60)),
    "blue": ("蓝色", (40, 75, 215)),
    "yellow": ("黄色", (235, 210, 45)),
    "purple": ("紫色", (145, 45, 175)),
    "white": ("白色", (238, 238, 238)),
}
SIZES = {"small": ("小", (10.0, 13.0)), "big": ("大", (18.0, 22.0))}  # radius range in pixels
POSITIONS = {
    "top left": ("左上角", (30, 30)),
    "top right": ("右上角", (98, 30)),
    "centre": ("中间", (64, 64)),
    "bottom left": ("左下角", (30, 98)),
    "bottom right": ("右下角", (98, 98)),
}
NUMBERS = {1: ("one", "一"), 2: ("two", "两"), 3: ("three", "三")}
HELD_OUT = frozenset(
    {("circle", "white"), ("square", "yellow"), ("triangle", "blue"), ("star", "red"), ("cross", "green")}
)
CANVAS = 128  # pixels; larger than the size that the tower needs, as real pictures are
LANGUAGES = ("en", "zh")


@dataclass(frozen=True)
class Item:
    """One object of a scene."""

    shape: str
    colour: str
    size: str
    position: str

    @property
    def held_out(self) -> bool:
        return (self.shape, self.colour) in HELD_OUT

    def names(self, language: str) -> tuple[str, str, str, str]:
        """The words for size, colour, shape and position."""
        if language == "en":
            return self.size, self.colour, self.shape, self.position
        return SIZES[self.size][0], COLOURS[self.colour][0], SHAPES[self.shape], POSITIONS[self.position][0]

    def phrase(self, language: str) -> str:
        size, colour, shape, position = self.names(language)
        if language == "en":
            return f"a {size} {colour} {shape} {'in' if position == 'centre' else 'at'} the {position}"
        return f"{position}有一个{size}的{colour}{shape}"


Scene = tuple[Item, ...]  # in reading order


@dataclass(frozen=True)
class Question:
    """A question, its short answer, and its kind: colour, shape, place, size, count or exists."""

    kind: str
    text: str
    answer: str


def make_scene(rng: random.Random, held_out: bool = False) -> Scene:
    """One to three objects at different positions. With `held_out` exactly one is a held-out pair, else none."""
    count = rng.choice((1, 2, 2, 3, 3))
    positions = rng.sample(list(POSITIONS), count)
    special = rng.randrange(count) if held_out else -1
    items = []
    for index, position in enumerate(positions):
        pair = rng.choice(sorted(HELD_OUT)) if index == special else _free_pair(rng)
        items.append(Item(*pair, rng.choice(list(SIZES)), position))
    order = list(POSITIONS)
    return tuple(sorted(items, key=lambda item: order.index(item.position)))


def _free_pair(rng: random.Random) -> tuple[str, str]:
    while (pair := (rng.choice(list(SHAPES)), rng.choice(list(COLOURS)))) in HELD_OUT:
        pass
    return pair


def knows() -> str:
    """Describe what a model of this world understands, and what not."""
    *shapes, last_shape = (f"{shape}es" if shape.endswith("s") else f"{shape}s" for shape in SHAPES)
    *colours, last_colour = COLOURS
    *_, most = (word for word, _ in NUMBERS.values())
    return (
        f"This model understands one to {most} {', '.join(shapes)} and {last_shape}, in {', '.join(colours)} and "
        f"{last_colour}, on a dark background. It answers the demo's own questions, in English and Chinese. "
        "It understands nothing else: no photographs, no light backgrounds, no other shapes or colours, and no "
        "other words."
    )


# --- language ---------------------------------------------------------------------------------------------------------


def caption(scene: Scene, language: str) -> str:
    """The scene in one sentence, in reading order."""
    phrases = [item.phrase(language) for item in scene]
    return ", ".join(phrases) + "." if language == "en" else "，".join(phrases) + "。"


CAPTION_PROMPTS = {
    "en": ("Describe the picture.", "What do you see?", "What is in the picture?"),
    "zh": ("描述这张图片。", "你看到了什么？", "图片里有什么？"),
}


def questions(scene: Scene, rng: random.Random, about: Item | None = None) -> Iterator[Question]:
    """Questions with one correct answer each, shuffled, in random languages; only about `about` if given.

    "Is there a …?" has yes and no equally often, and no is often a near miss: the right shape in another
    colour, or the right colour on another shape. Of an object either the colour is asked for or the shape, since one
    question would reveal the other's answer, and the model could ignore the image.
    """
    kinds: list[tuple[str, Item | None]] = [("exists", about)]
    for item in [about] if about else scene:
        alone = sum(other.shape == item.shape for other in scene) == 1
        striking = sum(other.colour == item.colour for other in scene) == 1
        if alone:
            kinds += [("place", item), ("size", item)]
        if alone and not (striking and rng.random() < 0.5):
            kinds.append(("colour", item))
        elif striking:
            kinds.append(("shape", item))
    if about is None:
        kinds.append(("count", None))
    rng.shuffle(kinds)
    for kind, subject in kinds:
        language = rng.choice(LANGUAGES)
        yield _exists(scene, subject, language, rng) if kind == "exists" else ask(kind, scene, subject, language)


def ask(kind: str, scene: Scene, item: Item | None, language: str) -> Question:
    """A question of this kind about an item, or about the number of items; the scene must have one answer."""
    if item is None:
        how_many = {"en": "How many objects are there?", "zh": "有几个物体？"}[language]
        return Question(kind, how_many, NUMBERS[len(scene)][language == "zh"])
    size, colour, shape, position = item.names(language)
    text, answer = {
        ("colour", "en"): (f"What colour is the {shape}?", colour),
        ("colour", "zh"): (f"{shape}是什么颜色？", colour),
        ("place", "en"): (f"Where is the {shape}?", position),
        ("place", "zh"): (f"{shape}在哪里？", position),
        ("size", "en"): (f"Is the {shape} big or small?", size),
        ("size", "zh"): (f"{shape}是大还是小？", size),
        ("shape", "en"): (f"Which shape is {colour}?", shape),
        ("shape", "zh"): (f"什么形状是{colour}？", shape),
    }[kind, language]
    return Question(kind, text, answer)


def _exists(scene: Scene, about: Item | None, language: str, rng: random.Random) -> Question:
    present = {(item.shape, item.colour) for item in scene}
    item = about or rng.choice(scene)
    pair = (item.shape, item.colour)
    yes = rng.random() < 0.5
    while not yes and pair in present:
        near = rng.random()
        shape, colour = _free_pair(rng)
        pair = (item.shape, colour) if near < 0.4 else (shape, item.colour) if near < 0.8 else (shape, colour)
        if pair in HELD_OUT:  # not even named in training
            pair = (item.shape, item.colour)
    shape, colour = pair
    if language == "en":
        return Question("exists", f"Is there a {colour} {shape}?", "yes" if yes else "no")
    return Question("exists", f"有{COLOURS[colour][0]}{SHAPES[shape]}吗？", "有" if yes else "没有")


# --- images -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Figure:
    """An object as it is drawn: its outline (two corners of a box for a circle) and its colour."""

    item: Item
    outline: tuple[tuple[float, float], ...]
    colour: tuple[int, int, int]
    named: bool = True  # false: its colour has no word in the world

    def paint(self, pen: ImageDraw.ImageDraw, fill: tuple[int, int, int] | int) -> None:
        if self.item.shape == "circle":
            pen.ellipse(self.outline, fill=fill)
        else:
            pen.polygon(self.outline, fill=fill)


def pose(scene: Scene, rng: random.Random) -> list[Figure]:
    """The exact position, size, rotation and tint of each object: all noise except the background's."""
    figures = []
    for item in rng.sample(scene, len(scene)):
        x, y = (value + rng.uniform(-5, 5) for value in POSITIONS[item.position][1])
        radius = rng.uniform(*SIZES[item.size][1])
        red, green, blue = (min(255, max(0, value + rng.randint(-18, 18))) for value in COLOURS[item.colour][1])
        turn = rng.uniform(-0.15, 0.15)
        if item.shape == "circle":
            outline = [(x - radius, y - radius), (x + radius, y + radius)]
        else:
            outline = [
                (x + radius * scale * math.cos(angle + turn), y + radius * scale * math.sin(angle + turn))
                for scale, angle in _OUTLINES[item.shape]
            ]
        figures.append(Figure(item, tuple(outline), (red, green, blue)))
    return figures


def draw(scene: Scene, rng: random.Random) -> Image.Image:
    """Draw a scene, RGB, CANVAS × CANVAS."""
    return paint(pose(scene, rng), rng)


def paint(figures: list[Figure], rng: random.Random) -> Image.Image:
    """Paint figures on a grainy background of random grey."""
    grey = rng.randint(25, 105)
    ground = tuple(grey + rng.randint(-12, 12) for _ in range(3))
    grain = Image.frombytes("L", (32, 32), rng.randbytes(1024)).resize((CANVAS, CANVAS), Image.Resampling.BICUBIC)
    image = Image.blend(Image.new("RGB", (CANVAS, CANVAS), ground), grain.convert("RGB"), rng.uniform(0, 0.12))
    pen = ImageDraw.Draw(image)
    for figure in figures:
        figure.paint(pen, figure.colour)
    return image


def _polygon(corners: int, start: float, scales: tuple[float, ...] = (1.0,)) -> list[tuple[float, float]]:
    return [(scales[n % len(scales)], start + 2 * math.pi * n / corners) for n in range(corners)]


def _plus(arm: float = 0.36) -> list[tuple[float, float]]:
    """Corners of a plus sign whose arms are `arm` wide on each side, as (scale, angle)."""
    corner, notch, lean = math.hypot(1, arm), arm * math.sqrt(2), math.atan(arm)
    return [
        polar
        for quarter in range(4)
        for polar in (
            (corner, quarter * math.pi / 2 - lean),
            (corner, quarter * math.pi / 2 + lean),
            (notch, quarter * math.pi / 2 + math.pi / 4),
        )
    ]


_OUTLINES = {
    "square": _polygon(4, math.pi / 4, (1.15,)),
    "triangle": _polygon(3, -math.pi / 2, (1.2,)),
    "star": _polygon(10, -math.pi / 2, (1.2, 0.5)),
    "cross": _plus(),
}


def jpeg(image: Image.Image) -> bytes:
    """The image as the bytes of a JPEG file."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()
