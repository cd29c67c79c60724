"""The hint of a download names the folder, the size and the generation that are missing."""

from pathlib import Path

import pytest

from minimind_v.core.config.presets import PRESETS
from minimind_v.core.hub.sources import PUBLISHED, how_to_get
from minimind_v.core.paths import TOKENIZER_3V_DIR, TOKENIZER_DIR, VISION_3V_DIR, VISION_DIR


def test_every_size_but_the_demos_is_published():
    assert {*PUBLISHED, "demo", "demo-3v"} == set(PRESETS)


@pytest.mark.parametrize(
    ("what", "folder", "preset", "command"),
    [
        ("clip", None, "small", "mmv download clip"),
        ("clip", None, "base", "mmv download clip"),
        ("clip", None, "3v-moe", "mmv download clip --preset 3v-moe"),
        ("clip", VISION_DIR, "small", "mmv download clip"),
        ("clip", VISION_3V_DIR, "small", "mmv download clip --preset 3v"),
        ("tokenizer", Path("/here") / TOKENIZER_3V_DIR, "small", "mmv download tokenizer --preset 3v --dir /here"),
        ("tokenizer", Path("/here") / TOKENIZER_DIR, "small", "mmv download tokenizer --dir /here"),
        ("lm", Path("out"), "base", "mmv download lm --preset base"),
        ("lm", Path("out"), "3v", "mmv download lm --preset 3v"),
        ("dataset", None, "3v", "mmv download dataset"),
    ],
)
def test_a_hint_is_the_command_that_fills_the_folder(what, folder, preset, command):
    assert how_to_get(what, folder, preset) == f"get it with `{command}`"
