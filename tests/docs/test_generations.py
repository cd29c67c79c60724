"""The page on the two generations: its facts are those of the code."""

import re
from math import prod

import pytest
import torch

from minimind_v.core.config.generation import V2025, V2026
from minimind_v.core.config.presets import PRESETS
from minimind_v.core.data.layouts import CHAT_LAYOUTS, PLAIN_SHARE, SYSTEM_SHARE
from minimind_v.core.model.no_init import NoInit
from minimind_v.core.model.projector import projector_shapes
from minimind_v.core.model.vision.spec import STANDARD, TOWERS
from minimind_v.core.model.vlm import VLM
from tests.cli.harness import ROOT
from tests.docs.conftest import commands

ENGLISH, CHINESE = ((ROOT / "docs" / f"generations{name}.md").read_text(encoding="utf-8") for name in ("", "_zh"))
BOTH = pytest.mark.parametrize("page", [ENGLISH, CHINESE], ids=["English", "Chinese"])


def cells(page):
    """The cells of the page's first table, its head left out."""
    table = page.split("\n\n|", 1)[1].split("\n\n", 1)[0]
    return [re.split(r" *(?<!\\)\| *", line.strip("| ")) for line in table.splitlines()[2:]]


def facts(generation):
    """What the code says of a generation, in the order of the table; None: nothing to compute."""
    model, tower = PRESETS[generation.preset], generation.towers[0]
    spec = TOWERS[tower].describe(STANDARD[tower], {})
    projector = sum(map(prod, projector_shapes(spec, model.hidden_size, generation.projector).values()))
    experts, layout = PRESETS["moe" if generation is V2025 else "3v-moe"], CHAT_LAYOUTS[generation.layout]
    stages = {
        name: (f"{stage.epochs} · {stage.batch_size} · {stage.max_length} · {stage.lr}", f"`{stage.freeze}`")
        for name, stage in generation.stages.items()
    }
    return [
        (str(spec.tokens_per_image),),
        (generation.vision_encoder, f"B/{spec.patch_size}", str(spec.image_size)),
        ("`post_layernorm`",),
        (spec.resize_mode,),
        ("0.5",) if set(spec.mean + spec.std) == {0.5} else ("CLIP",),
        ("Linear → GELU → Linear",) if generation.projector == "mlp" else ("Linear",),
        (f"{projector:,}",),
        None,
        ("`q_norm`", "`k_norm`") if model.qk_norm else ("`input_layernorm`", "`post_attention_layernorm`"),
        (str(model.rms_norm_eps),),
        (
            f"{model.hidden_size} · {model.num_hidden_layers} · "
            f"{model.num_attention_heads} / {model.num_key_value_heads}",
        ),
        (str(model.intermediate_size),),
        (f"{model.parameters + projector:,}",),
        (str(experts.n_routed_experts), f"top-{experts.num_experts_per_tok}", *["1"] * experts.n_shared_experts),
        (f"`{layout.placeholder}`".replace("|", r"\|"),),
        (str(model.vocab_size),),
        (f"`{generation.layout}`",),
        (f"{SYSTEM_SHARE * 100:g} %", f"{PLAIN_SHARE * 100:g} %") if layout.varies else (),
        ("parquet",) if generation.data == 0 else ("JSONL", "zip"),
        *((stages["pretrain"][0],), (stages["pretrain"][1],), (stages["sft"][0],), (stages["sft"][1],)),
        (f"`{generation.stages['sft'].start}`",),
        (f"{generation.cosine.rate(1, 10**9, 1.0):.3g} ×",),
    ]


@BOTH
@pytest.mark.parametrize(("generation", "column"), [(V2025, 1), (V2026, 2)], ids=["2025", "2026"])
def test_the_table_has_the_facts_of_the_code(page, generation, column):
    for row, values in zip(cells(page), facts(generation), strict=True):
        assert [value for value in values or () if value not in row[column]] == [], row


def test_the_norms_are_named_as_in_the_state_dict():
    tower = V2026.towers[0]
    with NoInit(), torch.device("meta"):
        model = VLM(PRESETS["3v"], TOWERS[tower].describe(STANDARD[tower], {}), 12, projector=V2026.projector)
    names = " ".join(model.state_dict())
    norms = set(re.findall(r"`(\w+_(?:layer)?norm)`", ENGLISH)) - {"post_layernorm"}  # of the vision encoder
    assert norms == {"input_layernorm", "post_attention_layernorm", "q_norm", "k_norm"}
    assert all(f".{norm}." in names for norm in norms)


def test_both_languages_have_the_same_numbers():
    assert commands(ENGLISH) == commands(CHINESE)
    english, chinese = (sorted(re.findall(r"\d+(?:[.,]\d+)*", page)) for page in (ENGLISH, CHINESE))
    assert english == chinese
