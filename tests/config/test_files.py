"""The recipes in configs/: each loads, says what it is for, and is the published one where it claims to be."""

from pathlib import Path

import pytest
import yaml

from minimind_v.core.config.load import resolve
from minimind_v.core.config.presets import PRESETS

FOLDER = Path(__file__).parents[2] / "configs"
FILES = sorted(FOLDER.glob("*.yaml"))
PUBLISHED = {"pretrain": (4, 4e-4, 640, "projector+last", 16), "sft": (2, 1e-6, 1536, "all", 4)}
PUBLISHED_3V = {"pretrain": (2, 4e-4, 450, "projector", 16), "sft": (2, 5e-6, 768, "projector+ends", 4)}


def test_the_runs_of_the_article_and_of_minimind_3v_are_there():
    kinds = ("small", "base", "moe", "small_2gpu", "cpu_taste", "3v", "3v-moe")
    names = {f"{stage}_{kind}" for stage in PUBLISHED for kind in kinds}
    assert {file.stem for file in FILES} == names


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_recipe_loads_and_explains_itself(file):
    text = file.read_text(encoding="utf-8")
    stage, preset = yaml.safe_load(text)["stage"], file.stem.split("_")[1]
    resolved = resolve(stage, file)
    assert resolved.config.stage == stage == file.stem.split("_")[0]
    assert resolved.config.model == PRESETS["small" if preset == "cpu" else preset]
    assert resolved.sources["data.batch_size"] == str(file)
    gpus = 2 if "2gpu" in file.stem else 1
    assert f"mmv train {stage} {'--gpus 2 ' if gpus == 2 else ''}--config configs/{file.name}" in text
    explained = [line for line in text.splitlines() if line.split(":")[0] in ("lr", "freeze", "epochs", "max_steps")]
    assert len(explained) >= 3
    assert all("  # " in line for line in explained)
    if "taste" not in file.stem:
        config = resolved.config
        rows = config.data.batch_size * config.accumulate * gpus
        assert (config.epochs, config.lr, config.data.max_length, config.freeze, rows) == (
            PUBLISHED_3V if preset.startswith("3v") else PUBLISHED
        )[stage]


def test_a_taste_leaves_the_real_runs_alone():
    for stage in PUBLISHED:
        config = resolve(stage, FOLDER / f"{stage}_cpu_taste.yaml").config
        assert config.out == Path("out/taste")
        assert config.device == "cpu"
        assert 0 < config.max_steps <= 50


def test_a_misspelt_key_of_a_file_is_named(tmp_path):
    from minimind_v.core.errors import UsageError

    (tmp_path / "c.yaml").write_text(FILES[0].read_text().replace("accumulate:", "acumulate:"))
    with pytest.raises(UsageError, match=r"acumulate.*did you mean 'accumulate'"):
        resolve("pretrain", tmp_path / "c.yaml")
