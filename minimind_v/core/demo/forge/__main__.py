"""Trains the demo's assets of a generation: a tokenizer, a tiny vision encoder and a text-only language model.

    python -m minimind_v.core.demo.forge --generation 2025 --seed 7 --out minimind_v/core/demo/assets

Offline work of about an hour on two cores; `figures.json` keeps what it measured. None of it sees a held-out
shape-colour pair, and the language model never gets an image.
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path

from minimind_v.core.demo.forge.base import train_base
from minimind_v.core.demo.forge.tokenizer import make_tokenizer
from minimind_v.core.demo.forge.tower import train_tower
from minimind_v.core.demo.forge.training import Recipe
from minimind_v.core.demo.generations import DEMO_GENERATIONS

RECIPES = {"2025": Recipe(1600, 1.5e-3, 7500, 2e-3), "3v": Recipe(900, 1e-3, 400, 1e-3)}  # 3v: a warm start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--generation", choices=DEMO_GENERATIONS, default="2025")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--only", choices=("tokenizer", "tower", "base"))
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "figures.json"
    figures = json.loads(path.read_text()) if path.exists() else {}
    figures["seed"] = options.seed
    demo, recipe = DEMO_GENERATIONS[options.generation], RECIPES[options.generation]
    if options.only in (None, "tokenizer"):
        make_tokenizer(options.out, demo)
    if options.only in (None, "tower"):
        figures["tower"] = train_tower(options.out, demo, options.seed, recipe)
    if options.only in (None, "base"):
        figures["base"] = train_base(options.out, demo, options.seed, recipe)
    path.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
