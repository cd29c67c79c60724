"""A folder laid out as `mmv demo` leaves it, with weights that have learnt nothing and a few rows."""

import random
import shutil
from pathlib import Path

from minimind_v.core.demo.dataset import write_pictures, write_sft, write_test
from minimind_v.core.formats.checkpoint import export_tensors, write_checkpoint
from minimind_v.core.hub.sources import DATASET_DIR, OUT_DIR, TOKENIZER_DIR, VISION_DIR
from tests.cli.harness import ASSETS, EYE, sighted_model


def demo_folder(folder: Path) -> Path:
    shutil.copytree(EYE, folder / VISION_DIR)
    shutil.copy(ASSETS / "tokenizer.json", folder / TOKENIZER_DIR)
    model = sighted_model()
    (folder / OUT_DIR).mkdir()
    for stage in ("pretrain", "sft"):
        write_checkpoint(folder / OUT_DIR / f"{stage}_vlm_128.pth", export_tensors(model), model.config, stage)
    write_sft(folder / DATASET_DIR, random.Random(1), 24)
    write_test(folder / DATASET_DIR, "heldout_scenes", random.Random(2), 12, set(), False)
    write_pictures(folder / "pictures", random.Random(3), set())
    return folder
