"""The sources of the pipeline's inputs: which hub has which file, and the command to download it.

A known commit is pinned. Everything else names a branch: the first download resolves it to a commit and records it in
the receipt of the target folder. An interrupted download resumes with the same commit, and a later one stays on it.
`--revision` chooses another.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from minimind_v.core.errors import MissingInput, UsageError, nearest_file
from minimind_v.core.paths import (
    BENCHMARK_DIR,
    DATASET_DIR,
    DEMO_DIR,
    OUT_DIR,
    PRESET_DEMO,
    PRESET_DEMO_3V,
    STANDARD_PRESET,
    TOKENIZER_3V_DIR,
    TOKENIZER_DIR,
    VISION_3V_DIR,
    VISION_DIR,
)

WEIGHTS_ENDINGS = (".pth", ".safetensors")
META = "minimind_v"  # the key of our description in a safetensors header
PICTURE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".ppm")
ROWS = (".jsonl", ".json", ".parquet", ".csv", ".tsv", ".tar")  # endings of files of rows
PRESETS_2025, PRESETS_3V = ("small", "base", "moe"), ("3v", "3v-moe")  # the sizes of each generation
PUBLISHED = PRESETS_2025 + PRESETS_3V
DEMOS = {PRESET_DEMO: "mmv demo", PRESET_DEMO_3V: "mmv demo --generation 3v"}
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")  # files of rows that stand beside their pictures


@dataclass(frozen=True)
class HubRepo:
    """A repository on a hub, and its standard revision."""

    repo: str
    revision: str


@dataclass(frozen=True)
class File:
    """A file: its local name, and its names on hubs, the current one first."""

    name: str
    remote: tuple[str, ...]


Layout = tuple[File, ...]  # files that belong together


@dataclass(frozen=True, eq=False)
class Source:
    """Files of a hub repository and their local folder."""

    what: str
    folder: Path
    hubs: dict[str, HubRepo]
    layouts: tuple[Layout, ...] = ()  # those that the repository may have, today's first; empty: by split or size
    kind: str = "model"
    presets: tuple[str, ...] = ()  # the sizes that it belongs to; empty: all
    per_preset: bool = False  # its files depend on the size of the model

    def command(self, folder: Path | None = None, preset: str = STANDARD_PRESET) -> str:
        """The command line that downloads it into `folder`, if that is a standard folder under some root."""
        arguments = ["mmv", "download", self.what]
        if self.presets and preset not in self.presets:
            preset = self.presets[0]
        if preset != STANDARD_PRESET and (self.per_preset or self.presets == PRESETS_3V):
            arguments += ["--preset", preset]
        root = self.root_of(folder) if folder else Path()
        if root not in (None, Path()):
            arguments += ["--dir", str(root)]
        return shlex.join(arguments)

    def root_of(self, folder: Path) -> Path | None:
        """The root whose standard folder is `folder`; None if there is none."""
        depth = len(self.folder.parts)
        names = folder.parts
        return Path(*names[:-depth]) if names[-depth:] == self.folder.parts else None


def _layout(*names: str) -> Layout:
    return tuple(File(name, (name,)) for name in names)


def _repos(name: str) -> dict[str, HubRepo]:
    """A repository of the author's, and its mirror."""
    return {"hf": HubRepo(f"jingyaogong/{name}", "main"), "modelscope": HubRepo(f"gongjy/{name}", "master")}


_DATASET = Source("dataset", DATASET_DIR, _repos("minimind-v_dataset"), kind="dataset")
_WEIGHTS, _WEIGHTS_3V = _repos("MiniMind2-V-PyTorch"), _repos("minimind-3v-pytorch")
_CLIP = {
    "hf": HubRepo("openai/clip-vit-base-patch16", "57c216476eefef5ab752ec549e440a49ae4ae5f3"),
    "modelscope": HubRepo("openai-mirror/clip-vit-base-patch16", "master"),
}
_TOKENIZER_FILES = (_layout("tokenizer.json", "tokenizer_config.json"),)
_CLIP_FILES = (_layout("config.json", "preprocessor_config.json", "pytorch_model.bin"),)
_SIGLIP_FILES = (_layout("config.json", "preprocessor_config.json", "model.safetensors"),)


def _by_name(*sources: Source) -> dict[str, Source]:
    return {source.what: source for source in sources}


SOURCES = _by_name(
    Source("clip", VISION_DIR, _CLIP, _CLIP_FILES, presets=PRESETS_2025),
    Source("tokenizer", TOKENIZER_DIR, _repos("MiniMind2-Small-V"), _TOKENIZER_FILES, presets=PRESETS_2025),
    Source("lm", OUT_DIR, _WEIGHTS, presets=PRESETS_2025, per_preset=True),
    _DATASET,
    Source("weights", OUT_DIR, _WEIGHTS, presets=PRESETS_2025, per_preset=True),
)
SOURCES_3V = _by_name(
    Source("clip", VISION_3V_DIR, _repos("siglip2-base-p32-256-ve"), _SIGLIP_FILES, presets=PRESETS_3V),
    Source("tokenizer", TOKENIZER_3V_DIR, _repos("minimind-3v"), _TOKENIZER_FILES, presets=PRESETS_3V),
    Source("lm", OUT_DIR, _WEIGHTS_3V, presets=PRESETS_3V, per_preset=True),
    _DATASET,
    Source("weights", OUT_DIR, _WEIGHTS_3V, presets=PRESETS_3V, per_preset=True),
)


def sources_of(preset: str) -> dict[str, Source]:
    """The sources of a preset's generation, by what they hold."""
    return SOURCES_3V if preset in (*PRESETS_3V, PRESET_DEMO_3V) else SOURCES


def describe_repo(repo: str) -> str:
    """The name of a repository, and the presets that its files are for."""
    presets = {
        source.presets
        for source in (*SOURCES.values(), *SOURCES_3V.values())
        if repo in {hub.repo for hub in source.hubs.values()}
    }
    return repo + "".join(f" (presets {', '.join(names)})" for names in presets if names)


@dataclass(frozen=True)
class Benchmark:
    """Files of rows that `mmv eval` reads: their repository, their names there, and the task that fits."""

    source: Source
    pattern: str  # of the names, with `*`
    task: str
    images: str = ""  # of files with the images by their id, where the rows have none

    @property
    def images_folder(self) -> Path:
        """The folder of those images, beside that of the rows."""
        return self.source.folder.with_name(f"{self.source.what}-images")

    def command(self, root: Path = Path()) -> str:
        """The command that measures a model by it."""
        arguments = ["mmv", "eval", "--task", self.task, "--data", str(root / self.source.folder)]
        return shlex.join([*arguments, *(["--images", str(root / self.images_folder)] if self.images else [])])


def _benchmark(name: str, repo: str, pattern: str, task: str, images: str = "") -> tuple[str, Benchmark]:
    source = Source(name, BENCHMARK_DIR / name, {"hf": HubRepo(repo, "main")}, kind="dataset")
    return name, Benchmark(source, pattern, task, images)


# The parquet forms that lmms-eval reads, too. Every split has true answers.
BENCHMARKS = dict([
    _benchmark("coco", "lmms-lab-encoder/COCO-Caption2017", "data/val-*.parquet", "caption"),
    _benchmark("vqav2", "lmms-lab-encoder/VQAv2", "data/validation-*.parquet", "vqa"),
    _benchmark("gqa", "lmms-lab-encoder/GQA", "testdev_balanced_instructions/testdev-*.parquet", "vqa",
               "testdev_balanced_images/testdev-*.parquet"),
    _benchmark("ok-vqa", "lmms-lab-encoder/OK-VQA", "data/val2014-*.parquet", "vqa"),
    _benchmark("textvqa", "lmms-lab-encoder/textvqa", "data/validation-*.parquet", "vqa"),
    _benchmark("pope", "lmms-lab-encoder/POPE", "data/test-*.parquet", "yesno"),
    _benchmark("mmstar", "Lin-Chen/MMStar", "mmstar.parquet", "choice"),
    _benchmark("mmbench", "lmms-lab-encoder/MMBench", "en/dev-*.parquet", "choice"),
    _benchmark("seed-bench", "lmms-lab-encoder/SEED-Bench", "data/test-*.parquet", "choice"),
    _benchmark("mme", "lmms-lab-encoder/MME", "data/test-*.parquet", "yesno"),
    _benchmark("scienceqa", "lmms-lab-encoder/ScienceQA", "ScienceQA-IMG/test-*.parquet", "choice"),
    _benchmark("llava-bench", "lmms-lab-encoder/llava-bench-in-the-wild", "data/train-*.parquet", "caption"),
])  # fmt: skip

SPLITS = ("pretrain", "sft")


def dataset_files(split: str) -> tuple[Layout, ...]:
    """The parquet file published today, or the JSONL and zip of older revisions."""
    parquet = f"{split}_i2t.parquet"
    names = {f"{split}_{kind}": (f"{split}_{kind}", f"{split}_vlm_{kind}") for kind in ("data.jsonl", "images.zip")}
    return _layout(parquet), tuple(File(name, remote) for name, remote in names.items())


def weights_files(*names: str) -> tuple[Layout, ...]:
    """Weights of one size. The text-only base of 2025, `lm_*`, has been published as `llm_*` too."""
    return (tuple(File(name, (name, f"l{name}") if name.startswith("lm_") else (name,)) for name in names),)


def how_to_get(what: str, folder: Path | None = None, preset: str = STANDARD_PRESET) -> str:
    """The next step for a user without `what` in `folder`, for the model size `preset`.

    A standard folder of one generation overrides the size: it is filled by that generation's download. What belongs to
    a demo no hub has.
    """
    if preset in DEMOS:
        return f"`{DEMOS[preset]}` makes it"
    source = sources_of(preset)[what]
    if folder and source.root_of(folder) is None:
        others = (generation[what] for generation in (SOURCES, SOURCES_3V))
        source = next((other for other in others if other.root_of(folder) is not None), source)
    hint = f"get it with `{source.command(folder, preset)}`"
    if folder and source.root_of(folder) is None:
        hint += f", which writes to {source.folder}"
    return hint


def how_to_get_data(path: Path) -> str:
    """The next step, after a dash, where a file of the dataset's download is missing; none for a name of the user's."""
    published = {file.name for split in SPLITS for layout in dataset_files(split) for file in layout}
    return f" — {how_to_get('dataset')}, or name your own" if path.name in published or path == DATASET_DIR else ""


def how_to_pretrain(preset: str = STANDARD_PRESET) -> str:
    """The command line that pretrains a model of this size."""
    return "mmv train pretrain" + ("" if preset == STANDARD_PRESET else f" --preset {preset}")


def latest_model(say: Callable[[str], None], out: Path = OUT_DIR) -> Path:
    """The latest weights in `out`, else the demo's. Raises MissingInput where there are none."""
    try:
        return find_weights(out)
    except MissingInput:
        with suppress(MissingInput):
            weights = find_weights(DEMO_DIR / OUT_DIR)
            say(f"no trained weights in {out}: using the demo's model, {weights}")
            return weights
        raise


def weights_at(path: Path) -> Path:
    """The weights at a path: a file, an exported folder, a run's folder, or a folder with one file of weights.

    Raises MissingInput, or UsageError for a folder with several.
    """
    weights = weights_of_run(path)
    return _only_weights(weights) if weights.is_dir() else weights


def weights_of_run(path: Path) -> Path:
    """The weights of the run whose folder this is; any other path as it is. Raises MissingInput where there is none."""
    if not path.exists():
        raise MissingInput(f"no weights at {path}{nearest_file(path, WEIGHTS_ENDINGS, folders=True)}")
    if not (path / "metrics.jsonl").is_file():
        return path
    run = path if path.name not in ("", "..") else path.resolve()
    written = [run.with_name(run.name + ending) for ending in WEIGHTS_ENDINGS]
    return next((file for file in written if file.is_file()), path)


def _only_weights(folder: Path) -> Path:
    """The only weights in a folder of runs, or the folder itself, which may be an export. Raises UsageError."""
    files = _weights_in(folder)
    exported = any(path for name in ("config.json", "model.safetensors*", "*.gguf") for path in folder.glob(name))
    if not files or exported:
        return folder
    if len(files) > 1:
        raise UsageError(f"{folder} has several weights — name one of {', '.join(map(str, files))}")
    return files[0]


def _weights_in(folder: Path, pattern: str = "*") -> list[Path]:
    """The weights in a folder; of files that differ in their ending alone the `.pth`, of which the other is a copy."""
    files = {path.stem: path for ending in reversed(WEIGHTS_ENDINGS) for path in folder.glob(f"{pattern}{ending}")}
    return sorted(files.values())


def find_weights(folder: Path) -> Path:
    """The weights of the latest stage: sft before pretrain, of several sizes the newest."""
    for stage in ("sft", "pretrain"):
        if paths := _weights_in(folder, f"{stage}_vlm_*"):
            return max(paths, key=lambda path: path.stat().st_mtime)
    raise MissingInput(
        f"no trained weights in {folder} — run `mmv train pretrain`, `mmv train sft`, or `mmv demo` for a small model; "
        "or name a file with --model"
    )
