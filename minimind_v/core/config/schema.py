"""The settings of a model and a run, as frozen dataclasses that validate themselves."""

from __future__ import annotations

import math
import os
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from minimind_v.core.config.freeze import FREEZE_POLICIES
from minimind_v.core.errors import UsageError, nearest
from minimind_v.core.paths import DATASET_DIR, OUT_DIR, TOKENIZER_DIR, VISION_DIR

STAGES = ("pretrain", "sft")
DTYPES = ("auto", "float32", "bfloat16")
REDUCE_DTYPES = ("float32", "bfloat16")
FEATURES = ("off", "auto", "exact", "int8")
MOST_WORKERS = 16  # data workers without --workers: more than any of today's GPUs needs
VALIDATION = "validation"  # in place of a metric's name
TRACKERS = ("none", "tensorboard", "wandb", "trackio")
# The largest sizes of a language model, ten times those of any that this system trains: a file or a configuration with
# more is refused before memory is taken. `limits` checks whether this machine can hold them together.
MOST_SIZES = {
    "hidden_size": 65_536,
    "num_hidden_layers": 1_000,
    "num_attention_heads": 4_096,
    "num_key_value_heads": 4_096,
    "intermediate_size": 1_048_576,
    "vocab_size": 1_048_576,
    "max_position_embeddings": 16_777_216,
    "num_experts_per_tok": 1_024,
    "n_routed_experts": 1_024,
    "n_shared_experts": 1_024,
}
MOST_FACTORS = {"rms_norm_eps": 1.0, "rope_theta": 1e12, "aux_loss_alpha": 1e6}
AUX_LOSS_SCOPES = ("row", "batch")
MOST_PARAMETERS = 2_000_000_000  # of a language model, and of a tower
# Of a run, with what to do instead where there is something.
MOST = {
    "max_length": (1 << 20, ""),
    "batch_size": (1 << 14, "; to use more rows per step, raise --accumulate"),
    "accumulate": (10**6, ""),
    "epochs": (10**6, ""),
    "gpus": (1 << 10, ""),
}
MOST_OF_ANY = 2**63 - 1  # the largest integer in the files of a run
CLIP_VISION = "clip_vision_model"  # transformers' model_type of the published models' vision tower
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
RESIZE_MODES = ("crop", "squeeze")  # the short side is resized and the centre cropped; or both sides are resized
RESAMPLING = ("bicubic", "bilinear", "lanczos", "nearest", "box", "hamming")  # filters of resizing, Pillow's names
MOST_IMAGE = {"image_size": 4_096, "patch_size": 4_096, "width": 65_536, "tokens_per_image": 65_536}
SIGLIP_VISION = "siglip_vision_model"  # that of minimind-3v
SIGLIP_COLOURS = (0.5, 0.5, 0.5)  # its mean, and its deviation
LINEAR = "linear"  # the projector of 2025
MLP = "mlp"  # that of minimind-3v


@dataclass(frozen=True)
class TextConfig:
    """Sizes of a language model. The names are those of Hugging Face's Llama and of the published checkpoints."""

    hidden_size: int = 512
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int = 2
    intermediate_size: int = 0  # 0: as the published models have it, 64·ceil(int(hidden·8/3)/64); with qk_norm hidden·π
    vocab_size: int = 6400
    rms_norm_eps: float = 1e-5
    rope_theta: float = 1e6
    max_position_embeddings: int = 32768
    use_moe: bool = False
    num_experts_per_tok: int = 2
    n_routed_experts: int = 4
    n_shared_experts: int = 1
    aux_loss_alpha: float = 0.1
    aux_loss_scope: str = "row"  # the balance of experts is that of each row, or of a whole micro-batch
    qk_norm: bool = False  # RMSNorm of each head's queries and keys before rotation, as Qwen3 has it

    def __post_init__(self) -> None:
        for name in ("use_moe", "qk_norm"):
            if not isinstance(getattr(self, name), bool):
                raise UsageError(f"model.{name} must be true or false, not {getattr(self, name)!r}")
        if self.aux_loss_scope not in AUX_LOSS_SCOPES:
            scopes = ", ".join(AUX_LOSS_SCOPES)
            raise UsageError(f"model.aux_loss_scope {self.aux_loss_scope!r} must be one of {scopes}")
        for name, most in MOST_SIZES.items():
            least = 0 if name == "intermediate_size" or "expert" in name else 1
            _between(f"model.{name}", getattr(self, name), least, most)
        for name, limit in MOST_FACTORS.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise UsageError(f"model.{name} must be a number, not {value!r}")
            if not 0 <= value <= limit or (not value and name != "aux_loss_alpha"):
                raise UsageError(f"model.{name} must be between 0 and {limit:g}, not {value}")
        if self.hidden_size % self.num_attention_heads or self.head_dim % 2:
            raise UsageError(
                f"model.hidden_size {self.hidden_size} must be an even multiple of "
                f"model.num_attention_heads {self.num_attention_heads}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise UsageError(
                f"model.num_attention_heads {self.num_attention_heads} must be a multiple of "
                f"model.num_key_value_heads {self.num_key_value_heads}"
            )
        if self.use_moe and not 1 <= self.num_experts_per_tok <= self.n_routed_experts:
            raise UsageError(
                f"model.num_experts_per_tok must be between 1 and model.n_routed_experts ({self.n_routed_experts})"
            )
        if not self.intermediate_size:
            inner = math.ceil(self.hidden_size * math.pi) if self.qk_norm else int(self.hidden_size * 8 / 3)
            object.__setattr__(self, "intermediate_size", 64 * -(-inner // 64))
        if self.parameters > MOST_PARAMETERS:
            raise UsageError(
                f"model.hidden_size {self.hidden_size} with model.num_hidden_layers {self.num_hidden_layers} makes "
                f"{self.parameters:,} parameters; the maximum is {MOST_PARAMETERS:,}"
            )

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def balances_batches(self) -> bool:
        """Whether the balance loss is that of a micro-batch, so that the division of a step changes it."""
        return self.use_moe and self.aux_loss_scope == "batch"

    @property
    def parameters(self) -> int:
        """Number of parameters of the language model, the tied head counted once."""
        width = self.hidden_size
        attention = 2 * width * (width + self.num_key_value_heads * self.head_dim) + 2 * self.head_dim * self.qk_norm
        blocks = self.n_routed_experts + self.n_shared_experts if self.use_moe else 1
        router = width * self.n_routed_experts if self.use_moe else 0
        layer = attention + 3 * width * self.intermediate_size * blocks + router + 2 * width
        return self.vocab_size * width + self.num_hidden_layers * layer + width


@dataclass(frozen=True)
class VisionSpec:
    """The features of a vision tower, and the preparation of its images."""

    image_size: int
    patch_size: int
    width: int  # of one feature vector
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    tokens_per_image: int = 0  # feature vectors of one image; 0: one for each patch (196 for ViT-B/16)
    resize_mode: str = "crop"
    resample: str = "bicubic"
    model_type: str = CLIP_VISION

    def __post_init__(self) -> None:
        for name, most in MOST_IMAGE.items():
            _between(f"vision.{name}", getattr(self, name), name != "tokens_per_image", most)
        if not self.tokens_per_image:
            object.__setattr__(self, "tokens_per_image", (self.image_size // self.patch_size) ** 2)
        if self.resize_mode not in RESIZE_MODES:
            raise UsageError(f"vision.resize_mode {self.resize_mode!r} must be one of {', '.join(RESIZE_MODES)}")
        if self.resample not in RESAMPLING:
            raise UsageError(f"vision.resample {self.resample!r} must be one of {', '.join(RESAMPLING)}")

    @property
    def preparation(self) -> tuple[int, str, str]:
        """What pixels depend on: the size, the mode and the filter of resizing, as `load_pixels` takes them."""
        return self.image_size, self.resize_mode, self.resample

    @property
    def identity(self) -> str:
        """The text that digests are computed from. For CLIP it is that of earlier releases: digests stay valid."""
        text = (
            f"VisionSpec(image_size={self.image_size}, patch_size={self.patch_size}, width={self.width}, "
            f"mean={self.mean}, std={self.std})"
        )
        if self == VisionSpec(self.image_size, self.patch_size, self.width, self.mean, self.std):
            return text
        return f"{text} {self.model_type} {self.tokens_per_image} {self.resize_mode} {self.resample}"


@dataclass(frozen=True)
class ModelConfig:
    """The settings of a model. Every checkpoint of a vision-language model has them."""

    text: TextConfig
    vision: VisionSpec  # as the tower has it: `tokens_per_image` counts features before the projector
    projector: str = LINEAR


def usual_workers(processes: int = 1) -> int:
    """Data workers for each of the training processes of this machine; two of its cores are left to training."""
    return max(1, min(MOST_WORKERS, ((os.cpu_count() or 1) - 2) // processes))


@dataclass(frozen=True)
class DataConfig:
    """The rows, their pictures and the tokenizer, and the sizes of batches."""

    file: Path = DATASET_DIR / "pretrain_data.jsonl"
    images: Path | None = None  # a folder, a zip or a tar; none for text-only rows
    tokenizer: Path = TOKENIZER_DIR
    split: str | None = None  # a split of a folder; none: train
    layout: str = "chatml"  # of the prompts: one of CHAT_LAYOUTS
    max_length: int = 640  # tokens per row, placeholders included
    batch_size: int = 16  # rows per process and micro-batch
    workers: int = field(default_factory=usual_workers)
    bad_rows: float = 0.01  # the share of broken rows above which a run ends

    def __post_init__(self) -> None:
        _option("max_length", self.max_length, 1)
        _option("batch_size", self.batch_size, 1)
        _option("workers", self.workers, 0)
        if not 0 <= self.bad_rows <= 1:
            raise UsageError(f"data.bad_rows must be a share from 0 to 1, not {self.bad_rows:g}")


@dataclass(frozen=True)
class RunConfig:
    """The settings of a training run. `recipes` builds a complete one per stage."""

    stage: str
    model: TextConfig = field(default_factory=TextConfig)
    data: DataConfig = field(default_factory=DataConfig)
    vision_model: Path = VISION_DIR
    init: Path | None = None  # the weights to start from
    out: Path = OUT_DIR
    projector: str = LINEAR
    freeze: str = "all"
    epochs: int = 1
    lr: float = 4e-4
    accumulate: int = 1
    max_steps: int = 0  # 0: as many as the epochs have
    weight_decay: float = 0.01
    grad_clip: float = 1.0
    seed: int = 42
    dtype: str = "auto"  # auto: bf16 autocast where a GPU has it, else float32
    reduce_dtype: str = "float32"  # of the gradients that several processes exchange
    device: str = "auto"
    deterministic: bool = False  # the same bits from the same run on a GPU too, at some cost; on a CPU they always are
    gpus: int = 1  # processes on this machine, each with a GPU of its own or, with device cpu, without
    features: str = "auto"  # the feature cache: one of FEATURES
    features_dir: Path | None = None  # of the feature cache; none: the folder `features` in `out`
    save_every: int = 500  # steps between two resume states; 0: none by steps
    save_minutes: float = 5.0  # minutes between two resume states; 0: none by time
    keep: int = 2  # resume states; each has three times the size of the trainable weights
    log_every: int = 20
    val_every: int = 0  # steps between two validations on held-out rows; 0: all rows are training rows
    val_rows: int = 256  # held-out rows, at most a tenth of all
    eval_every: int = 0  # steps between two evaluations by a task, also before the first and after the last; 0: none
    eval_task: str | None = None  # a name, or a YAML file
    eval_data: Path | None = None  # its questions
    eval_images: Path | None = None  # their pictures
    eval_limit: int = 200  # questions, the same ones each time
    best_by: str | None = None  # the best weights: VALIDATION, or a metric of eval_task; none: VALIDATION
    until_right: bool = False  # end before the last epoch, after two in which every answer was predicted right
    recall_rows: int = 0  # rows of the data behind `init`, to measure what the run forgets; 0: not measured
    track: str = "none"  # a tracker: one of TRACKERS

    def __post_init__(self) -> None:
        one_of("stage", self.stage, STAGES)
        one_of("freeze", self.freeze, FREEZE_POLICIES)
        one_of("dtype", self.dtype, DTYPES)
        one_of("reduce-dtype", self.reduce_dtype, REDUCE_DTYPES)
        one_of("features", self.features, FEATURES)
        one_of("track", self.track, TRACKERS)
        for flag in ("epochs", "accumulate", "gpus", "keep", "log_every", "val_rows", "eval_limit"):
            _option(flag, getattr(self, flag), 1)
        for flag in ("max_steps", "save_every", "val_every", "recall_rows", "eval_every"):
            _option(flag, getattr(self, flag), 0)
        if self.save_minutes and not self.save_minutes >= 1:
            raise UsageError(f"--save-minutes must be at least 1, or 0 for never, not {self.save_minutes:g}")
        _at_least("--seed", self.seed, 0)
        if self.seed >= 2**63:
            raise UsageError(f"--seed must be below 2^63, not {_shown(self.seed)}")
        if not 0 < self.lr < 1:
            raise UsageError(f"--lr must be between 0 and 1, not {self.lr:g}")
        if not 0 <= self.weight_decay < 1:
            raise UsageError(f"weight_decay must be at least 0 and below 1, not {self.weight_decay:g}")
        if not self.grad_clip > 0:
            raise UsageError(f"grad_clip must be above 0 (.inf: no clipping), not {self.grad_clip:g}")

    def check_evaluation(self) -> None:
        """Raises UsageError for options of an evaluation or of the best weights that lack another option."""
        options = {"--eval-task": self.eval_task, "--eval-data": self.eval_data}
        missing = [flag for flag, value in options.items() if value is None]
        if self.eval_every and missing:
            raise UsageError(f"--eval-every needs {' and '.join(missing)}")
        given = [flag for flag in options if flag not in missing] or ["--eval-images"] * (self.eval_images is not None)
        if given and not self.eval_every:
            raise UsageError(f"{' and '.join(given)} without --eval-every: give the steps between two evaluations")
        if self.best_by and not (self.val_every if self.best_by == VALIDATION else self.eval_every):
            raise UsageError(
                f"--best-by {self.best_by} needs --{'val' if self.best_by == VALIDATION else 'eval'}-every: "
                f"{VALIDATION} is the loss on held-out rows, other names are metrics of --eval-task"
            )

    @property
    def best_by_validation(self) -> bool:
        """Whether the best weights are those with the lowest loss on held-out rows."""
        return bool(self.val_every) and self.best_by in (None, VALIDATION)


def _at_least(name: str, value: float, least: int) -> None:
    if not value >= least:  # so that NaN is refused too
        raise UsageError(f"{name} must be at least {least}, not {_shown(value)}")


def _between(name: str, value: int, least: int, most: int, instead: str = "") -> None:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise UsageError(f"{name} must be a whole number, not {value!r}")
    _at_least(name, value, least)
    if value > most:
        raise UsageError(f"{name} must be at most {most:,}, not {_shown(value)}{instead}")


def _option(name: str, value: int, least: int) -> None:
    """Raise UsageError for a number of a run out of its bounds."""
    _between(f"--{name.replace('_', '-')}", value, least, *MOST.get(name, (MOST_OF_ANY, "")))


def _shown(value: float) -> str:
    """A number, or the length of one that Python refuses to print."""
    if isinstance(value, int) and abs(value) >= 10**30:
        return f"a number of {int(value.bit_length() * math.log10(2)) + 1:,} digits"
    return str(value)


def one_of(flag: str, value: str, choices: Collection[str]) -> None:
    """Raise UsageError where the value of an option is none of its choices."""
    if value not in choices:
        raise UsageError(f"--{flag} {value!r} must be one of {', '.join(choices)}{nearest(value, choices)}")
