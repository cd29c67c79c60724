"""Presets: the published model sizes of both generations, and the tiny ones of the demo."""

from __future__ import annotations

from dataclasses import replace

from minimind_v.core.config.generation import generation_of
from minimind_v.core.config.schema import TextConfig
from minimind_v.core.errors import UsageError, nearest
from minimind_v.core.paths import PRESET_DEMO, PRESET_DEMO_3V

_3V = TextConfig(
    hidden_size=768,
    num_hidden_layers=8,
    num_key_value_heads=4,
    rms_norm_eps=1e-6,
    num_experts_per_tok=1,
    n_shared_experts=0,
    aux_loss_alpha=5e-4,
    aux_loss_scope="batch",
    qk_norm=True,
)
PRESETS: dict[str, TextConfig] = {
    "small": TextConfig(hidden_size=512, num_hidden_layers=8),
    "base": TextConfig(hidden_size=768, num_hidden_layers=16),
    "moe": TextConfig(hidden_size=640, num_hidden_layers=8, use_moe=True),
    "3v": _3V,
    "3v-moe": replace(_3V, use_moe=True),
    PRESET_DEMO: TextConfig(hidden_size=128, num_hidden_layers=4, num_attention_heads=4, vocab_size=600),
    PRESET_DEMO_3V: replace(
        _3V,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=0,
        vocab_size=633,
    ),
}


def check_preset(name: str) -> None:
    """Raises UsageError for a name that no preset has."""
    if name not in PRESETS:
        raise UsageError(f"--preset {name!r} must be one of {', '.join(PRESETS)}{nearest(name, PRESETS)}")


def name_preset(config: TextConfig) -> str | None:
    """The preset of exactly these sizes, if there is one."""
    return next((name for name, preset in PRESETS.items() if preset == config), None)


def weights_name(stage: str, config: TextConfig) -> str:
    """The published file name of a stage's weights: `lm_512.pth`, `llm_768.pth` of 2026, `sft_vlm_640_moe.pth`."""
    prefix = generation_of(config).base if stage == "lm" else f"{stage}_vlm"
    return f"{prefix}_{config.hidden_size}{'_moe' if config.use_moe else ''}.pth"
