"""Images of the demo's world with a question each, for the page of a model that understands them."""

from __future__ import annotations

import io
import random
from functools import cache
from itertools import cycle

from minimind_v.core.demo import world

SEED = 21
KINDS = ("colour", "place", "count", "shape", "exists", "size")


@cache
def examples() -> dict[str, tuple[bytes, str, str]]:
    """Names, each with a PNG, a question and its answer; every second one is in Chinese. None is a training row."""
    rng, chosen = random.Random(SEED), dict[str, tuple[bytes, str, str]]()
    for kind, language in zip(KINDS, cycle(world.LANGUAGES), strict=False):
        while True:
            scene = world.make_scene(rng, held_out=True)  # with a pair that no training row has
            questions = [question for question in world.questions(scene, rng) if question.kind == kind]
            if questions and questions[0].text.isascii() == (language == "en"):
                break
        image = io.BytesIO()
        world.draw(scene, rng).save(image, "PNG")
        chosen[f"{kind}.png"] = image.getvalue(), questions[0].text, questions[0].answer
    return chosen
