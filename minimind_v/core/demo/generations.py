"""The demo's generations by name: the preset, the assets and the usual folder of each."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

from minimind_v.core.config.generation import V2025, V2026, Generation
from minimind_v.core.config.presets import PRESETS, weights_name
from minimind_v.core.paths import DEMO_3V_DIR, DEMO_DIR, PRESET_DEMO_3V


@dataclass(frozen=True)
class DemoGeneration:
    """One generation of the demo."""

    name: str  # in `--generation`
    generation: Generation
    preset: str
    folder: str  # of its assets, in the package
    out: Path  # the usual folder of its results

    @property
    def assets(self) -> Traversable:
        """What a real run would download: tokenizer, vision encoder and language model."""
        return files("minimind_v.core.demo").joinpath(self.folder)

    def weights_name(self, stage: str) -> str:
        """The file name of a stage's weights, without its ending."""
        return Path(weights_name(stage, PRESETS[self.preset])).stem


DEMO_GENERATIONS = {
    demo.name: demo
    for demo in (
        DemoGeneration("2025", V2025, "demo", "assets", DEMO_DIR),
        DemoGeneration("3v", V2026, PRESET_DEMO_3V, "assets/3v", DEMO_3V_DIR),
    )
}
