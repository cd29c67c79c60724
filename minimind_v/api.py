"""The front door: load a model, ask it, train and evaluate from Python (`import minimind_v as mmv`).

Every path may be a text. Errors are subclasses of `mmv.MmvError`, each with one line that says what to do next.
Messages go to the logger `minimind_v`: warnings are shown, unless you configure logging, and the rest is not.
"""

from __future__ import annotations

import logging
import multiprocessing
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor, nn

from minimind_v.core.arguments import check_arguments, checked
from minimind_v.core.config.load import Resolved, images_beside, resolve
from minimind_v.core.config.schema import DTYPES, STAGES, ModelConfig, RunConfig, TextConfig, one_of
from minimind_v.core.config.settings import read_settings
from minimind_v.core.data.processor import Images, Processor
from minimind_v.core.errors import UsageError
from minimind_v.core.evaluate.run import evaluate as score
from minimind_v.core.evaluate.run import features_beside, held_out_dataset
from minimind_v.core.formats.checkpoint import export_tensors, write_checkpoint
from minimind_v.core.formats.inputs import find_inputs, find_model
from minimind_v.core.formats.load import LoadedModel
from minimind_v.core.formats.load import load as load_model
from minimind_v.core.generate.engine import Engine
from minimind_v.core.generate.sampling import Sampling
from minimind_v.core.generate.session import Session
from minimind_v.core.generate.trace import TraceSettings, trace_answer
from minimind_v.core.generate.traced import Trace
from minimind_v.core.hub.sources import WEIGHTS_ENDINGS
from minimind_v.core.model.loss import IGNORE
from minimind_v.core.model.vlm import VLM, Output
from minimind_v.core.monitor.metrics import Listener
from minimind_v.core.rows.splits import SCORE
from minimind_v.core.rows.stores import open_rows
from minimind_v.core.train.distributed import World
from minimind_v.core.train.run import Summary
from minimind_v.core.train.run import train as run

log = logging.getLogger("minimind_v")


@checked
def load(
    path: str | Path | None = None,
    vision_model: str | Path | None = None,
    tokenizer: str | Path | None = None,
    device: str = "auto",
) -> LoadedVLM:
    """Load a model with its vision encoder and its tokenizer.

    `path` is a `.pth`, a `.safetensors`, an exported folder or a run's folder; without one, the weights that the latest
    stage left in `out`. `vision_model` and `tokenizer` are folders; without them, the ones that the weights were
    trained with. `device` is auto, cpu, cuda, cuda:1 or mps.
    Raises MissingInput for a missing file, WeightsError for damaged files or files that do not belong together.

    >>> m = mmv.load("out/sft_vlm_128.pth")
    >>> m.config.hidden_size
    128
    """
    vision, tokenizer_folder = _path(vision_model), _path(tokenizer)
    weights = find_model(_path(path), vision, tokenizer_folder, log.info)
    return LoadedVLM(load_model(weights, vision, tokenizer_folder, device, log.info))


class LoadedVLM:
    """A model that answers: `model` is the plain torch module, `processor` makes its inputs, `tokenizer` its ids."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.model: VLM = loaded.model
        self.tokenizer = loaded.tokenizer
        self.processor = Processor(loaded.tokenizer, loaded.model.spec)
        self.path, self.stage = loaded.checkpoint.path, loaded.checkpoint.stage
        self._companions = loaded.checkpoint.companions
        self._loaded = loaded

    def __repr__(self) -> str:
        names = self.model.named_parameters()
        count = sum(weight.numel() for name, weight in names if not name.startswith("vision_encoder."))
        return f"LoadedVLM({str(self.path)!r}, {count / 1e6:.1f}M parameters and a vision encoder, {self.device})"

    @property
    def config(self) -> TextConfig:
        """Sizes of the language model, by the names of Hugging Face's Llama."""
        return self.model.config

    @property
    def device(self) -> torch.device:
        """The device of the weights; a call moves its inputs there."""
        return self.model.device

    def parameters(self) -> Iterator[nn.Parameter]:
        """All parameters of `model`, those of the frozen vision encoder among them."""
        return self.model.parameters()

    def __call__(self, input_ids: Tensor, **inputs: Any) -> Output:
        """One forward pass over what `processor` returns, with gradients unless `torch.no_grad()` is on.

        input_ids [B, T]; further inputs are those of `mmv.VLM.forward`. Returns an object with `logits` [B, T, V], or,
        with labels [B, T], with `loss`. Raises UsageError where their shapes do not fit each other, ids are not the
        tokenizer's, or placeholders do not fit the images.

        >>> m = mmv.load("out/sft_vlm_128.pth")
        >>> inputs = m.processor("What is this?", "pictures/star.jpg")
        >>> out = m(**inputs)
        >>> out.logits.shape == (1, inputs["input_ids"].shape[1], m.config.vocab_size)
        True
        """
        inputs = {"input_ids": input_ids, **inputs}
        check_arguments(VLM.forward, inputs)
        _check_batch(self.model.model_config, inputs)
        inputs = {name: value.to(self.device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
        try:
            output: Output = self.model(**inputs)
        except ValueError as error:
            raise UsageError(str(error)) from None
        return output

    @checked
    def ask(
        self,
        question: str,
        images: Images = None,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        top_p: float = 0.85,
        seed: int | None = None,
    ) -> str:
        """Answer a question, about images or without any.

        `images` is one image or a list: paths, bytes, PIL images, arrays [H, W, 3] of uint8 or of floats from 0 to 1.
        Temperature 0 takes the likeliest token each time; above 0, tokens are drawn from the likeliest that together
        have the probability `top_p`, and a seed makes the draw repeatable.
        Raises UsageError for an empty question, or UsageError, MissingInput or RowError where an image cannot be read
        or does not fit the question.

        >>> m = mmv.load("out/sft_vlm_128.pth")
        >>> answer = m.ask("What colour is the star?", "pictures/star.jpg", max_new_tokens=8)
        >>> answer == m.ask("What colour is the star?", ["pictures/star.jpg"], max_new_tokens=8)
        True
        """
        return self.chat(temperature, top_p, seed).ask(question, images, max_new_tokens)

    @checked
    def stream(
        self,
        question: str,
        images: Images = None,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        top_p: float = 0.85,
        seed: int | None = None,
    ) -> Iterator[str]:
        """Yield the answer of `ask` piece by piece, as it is generated.

        >>> m = mmv.load("out/sft_vlm_128.pth")
        >>> pieces = list(m.stream("What colour is the star?", "pictures/star.jpg", max_new_tokens=8))
        >>> "".join(pieces) == m.ask("What colour is the star?", "pictures/star.jpg", max_new_tokens=8)
        True
        """
        return self.chat(temperature, top_p, seed).stream(question, images, max_new_tokens)

    @checked
    def chat(self, temperature: float = 0.0, top_p: float = 0.85, seed: int | None = None) -> Conversation:
        """Begin a conversation, in which the model remembers earlier questions, answers and images.

        >>> chat = mmv.load("out/sft_vlm_128.pth").chat()
        >>> first = chat.ask("What colour is the star?", "pictures/star.jpg", max_new_tokens=8)
        >>> second = chat.ask("How many objects are there?", max_new_tokens=8)
        """
        return Conversation(Session(self.model, self.tokenizer, Sampling(temperature, top_p, seed)))

    @checked
    def look(
        self,
        question: str,
        images: Images,
        answer: str | None = None,
        swap: Images = None,
        occlusion: bool = False,
        max_new_tokens: int = 128,
        think: bool = False,
    ) -> Trace:
        """Look inside an answer: the bits that the images give to each token, attention, and the words of patches.

        The answer is the model's own, with the likeliest tokens, or the text `answer`. `swap` has another image for
        each, for the variant `swapped`; without it a single image is mirrored. With `occlusion` every patch is painted
        grey in turn; `think` lets a model of 2026 reason before it answers. Of the T tokens and P patches the trace has
        `tokens` with `probability`, `bits`, `bits_blank` and `rivals`; `attention` float32 [T, L, H, P] of L layers and
        H heads, `rollout` [T, P], `patches` with `nearest` words and `layers`, `variants`, and `occlusion` [T, P] or
        None; `as_json()` is what `mmv look --json` prints.
        Raises UsageError for an empty question, or UsageError, MissingInput or RowError where an image cannot be read
        or does not fit the question.

        >>> m = mmv.load("out/sft_vlm_128.pth")
        >>> trace = m.look("What colour is the star?", "pictures/star.jpg", max_new_tokens=8)
        >>> trace.attention.shape == (len(trace.tokens), m.config.num_hidden_layers, m.config.num_attention_heads, 64)
        True
        """
        engine = Engine(self.model, self.tokenizer, most_rows=1)
        text, pixels = self.processor.question(question, images)
        others = [] if swap is None else swap if isinstance(swap, list | tuple) else [swap]
        settings = TraceSettings(answer, max_new_tokens, [*map(self.processor.pixels, others)], occlusion=occlusion)
        prompt = engine.prompt([{"role": "user", "content": text}], pixels, max_new_tokens, think)
        return replace(trace_answer(engine, prompt, settings, question), model=str(self.path))

    @checked
    def save(self, path: str | Path, overwrite: bool = False) -> Path:
        """Write the present weights in half precision to a `.pth` or a `.safetensors`; returns the path.

        The file lacks the vision encoder. Raises UsageError for another ending or a file that exists, RunError for a
        weight that is not finite.

        >>> m = mmv.load("out/sft_vlm_128.pth")
        >>> m.save("copy.safetensors", overwrite=True).name
        'copy.safetensors'
        """
        path = Path(path)
        if path.suffix not in WEIGHTS_ENDINGS:
            raise UsageError(f"{path} must end with one of {', '.join(WEIGHTS_ENDINGS)}")
        if path.exists() and not overwrite:
            raise UsageError(f"{path} exists already — add overwrite=True, or name another file")
        write_checkpoint(path, export_tensors(self.model), self.model.model_config, self.stage, self._companions)
        return path


def _check_batch(config: ModelConfig, inputs: dict[str, Any]) -> None:
    """Raise UsageError where ids [B, T] are none of the model's, or another tensor has a shape that does not fit."""
    ids, text, vision = inputs["input_ids"], config.text, config.vision
    if ids.ndim != 2 or not 0 < ids.shape[1] <= text.max_position_embeddings or not len(ids):
        most = text.max_position_embeddings
        raise UsageError(f"input_ids must be [B, T] with T from 1 to {most}, not {list(ids.shape)}")
    size = vision.image_size
    shapes = {  # their ends, and how many sizes may stand before
        **dict.fromkeys(("attention_mask", "image_mask", "labels"), (tuple(ids.shape), (0,))),
        "pixel_values": ((3, size, size), (1, 2, 3)),
        "image_features": ((vision.tokens_per_image, vision.width), (1,)),
    }
    for name, (end, before) in shapes.items():
        shape = None if inputs.get(name) is None else inputs[name].shape
        if shape is not None and (shape[-len(end) :] != end or len(shape) - len(end) not in before):
            sizes = ", ".join(["…"] * before[0] + [str(size) for size in end])
            raise UsageError(f"{name} must have the shape [{sizes}], not {list(shape)}")
    labels = inputs.get("labels")
    for name, tokens in (("input_ids", ids), ("labels", ids.long() if labels is None else labels[labels != IGNORE])):
        whole = tokens.dtype == torch.int64 or (tokens.dtype == torch.int32 and tokens is ids)
        if not whole or bool(((tokens < 0) | (tokens >= text.vocab_size)).any()):
            raise UsageError(f"{name} must have int64 numbers from 0 to {text.vocab_size - 1}")


class Conversation:
    """Questions that follow each other. A conversation that becomes too long forgets its earliest turns."""

    def __init__(self, session: Session) -> None:
        self._session = session

    @checked
    def ask(self, question: str, images: Images = None, max_new_tokens: int = 512) -> str:
        """Answer the next question. Images, errors and tokens are those of `LoadedVLM.ask`."""
        return "".join(self.stream(question, images, max_new_tokens))

    @checked
    def stream(self, question: str, images: Images = None, max_new_tokens: int = 512) -> Iterator[str]:
        """Yield the answer of `ask` piece by piece, as it is generated."""
        return self._session.ask(question, images, max_new_tokens)


@checked
def config(stage: str | Path, **settings: Any) -> RunConfig:
    """A checked training configuration: the recipe of a stage, changed by settings.

    `stage` is `pretrain`, `sft` or a YAML file with a `stage`. Settings have the names of the options of `mmv train`
    (`data`, `images`, `out`, `batch_size`, `lr` …); `**{"model.hidden_size": 64}` sets any other key.
    Raises UsageError for a setting that does not exist or has a wrong value.

    >>> config = mmv.config("sft", preset="demo", max_steps=10)
    >>> config.max_steps, config.freeze
    (10, 'all')
    """
    return _resolve(stage, settings).config


@checked
def train(
    config: RunConfig | str | Path,
    *,
    progress: bool = False,
    overwrite: bool = False,
    resume: bool = False,
    **settings: Any,
) -> Summary:
    """Train a stage, and save its weights and its metrics.

    The first argument is `pretrain` or `sft` with settings as in `mmv.config`, a YAML file, or a RunConfig.
    `progress` shows each logged step on stderr. `overwrite` replaces an earlier run in `out`; `resume` continues it.
    Ctrl-C stops after the step and saves; pressed again it stops at once. Returns the paths of weights and
    metrics, the number of steps, and the signal that stopped the run, if any.
    Raises MissingInput with all missing files, UsageError, DataError, WeightsError or RunError.

    >>> summary = mmv.train("sft", preset="demo", out="notebook", max_steps=2, overwrite=True)
    >>> summary.steps, summary.weights.name
    (2, 'sft_vlm_128.pth')
    """
    if isinstance(config, RunConfig):
        if settings:
            raise UsageError(f"{', '.join(settings)}: a RunConfig takes no settings — give them to mmv.config")
        auto = False
    else:
        resolved = _resolve(config, settings)
        config, auto = resolved.config, resolved.auto
    if config.gpus > 1 and not World.find().placed:
        raise UsageError(
            f"Python trains in one process — for {config.gpus} run `mmv train {config.stage} --gpus {config.gpus}`"
        )
    find_inputs(config)
    with _view(config.stage) if progress else nullcontext(_Logged()) as listener:
        return run(config, listener, overwrite=overwrite, resume=resume, auto=auto)


@dataclass(frozen=True)
class Evaluation:
    """The scores of a model on held-out rows."""

    loss: float  # nats per supervised token
    accuracy: float | None  # share of the short answers that are exactly correct; None where there are none
    n: int  # rows
    supervised_tokens: int
    short_answers: int


@overload
def evaluate(
    model: LoadedVLM | str | Path | None,
    data: str | Path,
    images: str | Path | None = None,
    *,
    split: str | None = None,
    limit: int | None = None,
    blank: bool = False,
    max_length: int = 1536,
    batch_size: int = 8,
    dtype: str = "auto",
) -> Evaluation: ...
@overload
def evaluate(
    model: LoadedVLM | str | Path | None,
    data: str | Path | None,
    images: str | Path | None = None,
    *,
    task: str | Path,
    out: str | Path | None = None,
    split: str | None = None,
    limit: int | None = None,
    dtype: str = "auto",
) -> dict[str, Any]: ...
@checked
def evaluate(
    model: LoadedVLM | str | Path | None,
    data: str | Path | None,
    images: str | Path | None = None,
    *,
    task: str | Path | None = None,
    out: str | Path | None = None,
    split: str | None = None,
    limit: int | None = None,
    blank: bool = False,
    max_length: int = 1536,
    batch_size: int = 8,
    dtype: str = "auto",
) -> Evaluation | dict[str, Any]:
    """Evaluate a model (from `mmv.load`, or a path) on held-out rows.

    `data` and `images` are as in `mmv eval`; without `images`, the zip, folder or tar beside the rows. `limit` takes
    only the first rows; `blank` replaces every image by a grey one, which shows how much the images help.

    With `task`, a name or a YAML file, it returns the report of `mmv eval --task --json` as a dict, and writes the
    predictions to the folder `out`, without it to one of their own in `./out/eval`. Then `limit` draws from each kind
    of question, and `blank`, `max_length` and `batch_size` are not for it; `data` may be None where the file names it.
    Raises MissingInput, UsageError, WeightsError, or DataError where no row can be read.

    >>> scores = mmv.evaluate("out/sft_vlm_128.pth", "dataset/heldout_scenes_data.jsonl", limit=4)
    >>> scores.n, scores.loss > 0
    (4, True)
    >>> report = mmv.evaluate("out/sft_vlm_128.pth", "dataset/heldout_scenes_data.jsonl", task="vqa", limit=4)
    >>> report["rows"], [metric["name"] for metric in report["metrics"]]
    (4, ['vqa', 'exact'])
    """
    for name, count in (("limit", limit), ("max_length", max_length), ("batch_size", batch_size)):
        if count is not None and count < 1:
            raise UsageError(f"{name} must be at least 1, not {count}")
    one_of("dtype", dtype, DTYPES)
    if task is not None:
        if blank or (max_length, batch_size) != (1536, 8):
            raise UsageError("blank, max_length and batch_size are for an evaluation without a task — leave them out")
        return _evaluate_by_task(model, _path(data), _path(images), str(task), _path(out), split, limit, dtype)
    if out is not None or data is None:
        raise UsageError("out, and None for data, are for an evaluation with a task — name one with task=")
    file = Path(data)
    rows = open_rows(file, _path(images) or images_beside(file), split, log.info, SCORE)
    m = model if isinstance(model, LoadedVLM) else load(model)
    dataset = held_out_dataset(m.model, m.tokenizer, rows, max_length, blank)
    ids = m.tokenizer.pad_id, m.tokenizer.eos_id
    cache = None if blank else features_beside(m.model, m.path, dtype, len(rows), log.info, log.warning)
    scores = score(m.model, dataset, *ids, batch_size, workers=_workers(1), limit=limit, dtype=dtype, memory=cache)
    for row in scores.broken[:5]:
        log.warning("row skipped: %s", row)
    return Evaluation(scores.loss, scores.accuracy, scores.rows, scores.supervised_tokens, scores.short_answers)


def _evaluate_by_task(
    model: LoadedVLM | str | Path | None,
    data: Path | None,
    images: Path | None,
    task: str,
    out: Path | None,
    split: str | None,
    limit: int | None,
    dtype: str,
) -> dict[str, Any]:
    from minimind_v.core.evaluate.benchmarks import open_benchmark  # here: their metrics take a second to import
    from minimind_v.core.evaluate.by_task import check_out, choose_task, evaluate_task

    chosen = choose_task(task)
    data, split = chosen.source(data, split)
    if data is None:
        raise UsageError(f"the task {task} names no data — give them")
    check_out(out)
    rows = open_benchmark(data, images or images_beside(data), split, log.info, chosen.names)
    m = model if isinstance(model, LoadedVLM) else load(model)
    return evaluate_task(m._loaded, chosen, rows, out, limit=limit, dtype=dtype, say=log.info, warn=log.warning).report


class _Logged(Listener):
    """A listener whose messages go to the logger."""

    def message(self, text: str) -> None:
        log.info("%s", text)

    def warning(self, text: str) -> None:
        log.warning("%s", text)


def _view(stage: str) -> Any:
    """The view of `mmv train`: a live one on a terminal, a line for each logged step in a notebook."""
    from minimind_v.cli.live import TrainView
    from minimind_v.cli.terminal import Terminal

    return TrainView(Terminal(), stage)


def _resolve(stage: str | Path, settings: dict[str, Any]) -> Resolved:
    file = None if stage in STAGES else Path(stage)
    if file is not None:
        if file.suffix not in (".yaml", ".yml"):
            raise UsageError(f"{str(stage)!r} is neither {' nor '.join(STAGES)} nor a YAML file")
        stage = read_settings(file).get("stage", "")
        if stage not in STAGES:
            raise UsageError(f"{file} has no `stage` — add `stage: pretrain` or `stage: sft`")
    if "workers" not in settings and not _workers(1):
        settings = settings | {"workers": 0}
    return resolve(str(stage), file, settings)


def _workers(count: int) -> int:
    """As many data workers as asked for, where they are forked; else none: a new process would run the script again."""
    methods = multiprocessing.get_all_start_methods()  # the system's default first
    return count if (multiprocessing.get_start_method(allow_none=True) or methods[0]) == "fork" else 0


def _path(path: str | Path | None) -> Path | None:
    return None if path is None else Path(path)
