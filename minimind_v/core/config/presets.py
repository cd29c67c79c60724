"""Presets: the three published model sizes, and the tiny one of the demo."""

from __future__ import annotations

from minimind_v.core.config.schema import TextConfig
from minimind_v.core.errors import UsageError, nearest

PRESETS: dict[str, TextConfig] = {
    "small": TextConfig(hidden_size=512, num_hidden_layers=8),
    "base": TextConfig(hidden_size=768, num_hidden_layers=16),
    "moe": TextConfig(hidden_size=640, num_hidden_layers=8, use_moe=True),
    "demo": TextConfig(hidden_size=128, num_hidden_layers=4, num_attention_heads=4, vocab_size=600),
}


def check_preset(name: str) -> None:
    """Raises UsageError for a name that no preset has."""
    if name not in PRESETS:
        raise UsageError(f"--preset {name!r} must be one of {', '.join(PRESETS)}{nearest(name, PRESETS)}")


def name_preset(config: TextConfig) -> str | None:
    """The preset of exactly these sizes, if there is one."""
    return next((name for name, preset in PRESETS.items() if preset == config), None)


def weights_name(stage: str, config: TextConfig) -> str:
    """The published file name of a stage's weights: `lm_512.pth`, `pretrain_vlm_512.pth`, `sft_vlm_640_moe.pth`."""
    prefix = "lm" if stage == "lm" else f"{stage}_vlm"
    return f"{prefix}_{config.hidden_size}{'_moe' if config.use_moe else ''}.pth"
