"""Diagnostics: rules that turn the metrics of a run into warnings, each given once, with a next step.

A rule is a function of the history so far. It returns its line when it is sure, else None: silence over a healthy
run matters more than an early warning. Losses are in nats per supervised token.
"""

from __future__ import annotations

import math
import os
import statistics
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from minimind_v.core.config.schema import RunConfig, usual_workers
from minimind_v.core.data.batch import Batch
from minimind_v.core.monitor.metrics import StepMetrics, Validation
from minimind_v.core.rows.row import IMAGE_MARK

FEW = 20  # steps whose mean is the loss at a step
SMALL_SET = 500  # rows, up to which recipe small-data is for
STRETCH = 30.0  # seconds over which the share of waiting is measured


@dataclass(frozen=True)
class Start:
    """The start of a run."""

    config: RunConfig
    loaded: bool  # weights, and not random numbers
    new_projector: bool
    same_tokenizer: bool | None = None  # as the weights were trained with; None: unknown
    rows: int = 0  # training rows
    done: int = 0  # steps of an earlier part of the run, which are not in the history


@dataclass
class History:
    """The metrics of a run so far."""

    start: Start
    losses: list[float] = field(default_factory=list)  # of each step
    norms: deque[float] = field(default_factory=lambda: deque(maxlen=FEW))
    validations: list[Validation] = field(default_factory=list)
    lowest: float = math.inf  # mean of FEW losses
    lowest_at: int = 0
    images: int = 0
    rows: int = 0
    text_rows: int = 0  # of these, rows with pictures that no mark shows
    answers: int = 0
    cut: int = 0  # of these, cut short or cut off
    enough_at_first: bool = False  # whether the first step has enough tokens for a reliable loss
    waiting: list[float] = field(default_factory=list)  # share of each STRETCH
    last: StepMetrics | None = None
    _mark: tuple[float, float] | None = None  # seconds and seconds of waiting where the stretch began

    @property
    def begun(self) -> bool:
        """Whether the history has the first step of the run."""
        return self.start.done == 0

    @property
    def step(self) -> int:
        return self.last.step if self.last else self.start.done

    @property
    def recent(self) -> float:
        """The mean of the last FEW losses."""
        return _mean(self.losses[-FEW:])

    def add(self, metrics: StepMetrics) -> None:
        self.last = metrics
        if not self.losses:
            self.enough_at_first = metrics.supervised_tokens >= 50
        self.losses.append(metrics.loss)
        self.norms.append(metrics.grad_norm)
        if len(self.losses) >= FEW and self.recent < self.lowest:
            self.lowest, self.lowest_at = self.recent, metrics.step
        seconds, waited = self._mark or (metrics.seconds, metrics.data_seconds)
        if self._mark is None or metrics.seconds - seconds >= STRETCH:
            if self._mark is not None:
                self.waiting.append((metrics.data_seconds - waited) / (metrics.seconds - seconds))
            self._mark = metrics.seconds, metrics.data_seconds


class Diagnostics:
    """Applies the rules to a run as it goes; each warns once."""

    def __init__(self, start: Start, warned: Iterable[str] = (), validations: Iterable[Validation] = ()) -> None:
        """`warned` names the rules that have warned in an earlier part of the run; `validations` are that part's."""
        self.history = History(start, validations=list(validations))
        self.warned = set(warned)

    def batches(self, batches: Sequence[Batch]) -> None:
        """The micro-batches that the next step trains on."""
        history = self.history
        for batch in batches:
            history.images += batch.images
            history.rows += len(batch)
            history.text_rows += batch.text_rows
            history.answers += batch.answers
            history.cut += batch.answers_cut

    def step(self, metrics: StepMetrics) -> dict[str, str]:
        """A step; returns the warnings, by rule."""
        self.history.add(metrics)
        return self._apply(STEP_RULES)

    def validated(self, result: Validation) -> dict[str, str]:
        """A validation; returns the warnings, by rule."""
        self.history.validations.append(result)
        return self._apply(VALIDATION_RULES)

    def _apply(self, rules: Iterable[Callable[[History], str | None]]) -> dict[str, str]:
        lines = {}
        for rule in rules:
            if rule.__name__ not in self.warned and (line := rule(self.history)):
                lines[rule.__name__] = line
        self.warned |= lines.keys()
        return lines


# --- rules about steps ----------------------------------------------------------------------------------------------


def first_loss_high(history: History) -> str | None:
    """Trained weights are better than guessing on data of their kind, even before the first step.

    A run starts only with weights that loaded whole. So a loss as high as guessing means untrained weights; a higher
    one means weights that were trained on other data, or with another tokenizer.
    """
    start, guessing = history.start, math.log(history.start.config.model.vocab_size)
    if not (start.loaded and history.begun and history.step == 1 and history.losses[0] > 0.9 * guessing):
        return None
    figure = f"the first loss is {history.losses[0]:.2f} where uniform guessing gives {guessing:.2f}"
    init, tokenizer = start.config.init, start.config.data.tokenizer
    if start.same_tokenizer is False:
        return (
            f"{figure}: {init} was trained with another tokenizer than {tokenizer} — give the right one "
            f"with --tokenizer"
        )
    if history.losses[0] < 1.05 * guessing:
        other = "" if start.same_tokenizer else f", or was trained with another tokenizer than {tokenizer}"
        return (
            f"{figure}, although all of {init} was loaded: it is not trained{other}, or these rows differ from "
            f"its training data — test it with `mmv chat --model {init}`"
        )
    unsure = f" If {tokenizer} is not its tokenizer, stop and give the right one with --tokenizer."
    return (
        f"{figure}, although all of {init} was loaded: it confidently predicts other answers, so these rows "
        f"differ from its training data. It learns them if the loss falls well below {guessing:.2f}."
        f"{'' if start.same_tokenizer else unsure}"
    )


def loss_stays_high(history: History) -> str | None:
    """Soon after the start a run over trained weights is much better than guessing."""
    config, guessing = history.start.config, math.log(history.start.config.model.vocab_size)
    if not (history.start.loaded and history.begun and history.step == 3 * FEW and history.recent > 0.8 * guessing):
        return None
    first = _mean(history.losses[:FEW])
    if history.recent < 0.8 * first:  # it falls already
        return None
    advice = f"raise --lr (now {config.lr:g})"
    if config.stage == "sft" and history.start.rows <= SMALL_SET and not config.until_right:
        advice += ", or use --recipe small-data (for few rows)"
    trained = f", and check that {config.data.tokenizer} is the tokenizer of the weights"
    return (
        f"the loss was {first:.2f} in the first {FEW} steps and is still {history.recent:.2f} after {history.step}, "
        f"where uniform guessing gives {guessing:.2f}: {advice}{'' if history.start.same_tokenizer else trained}"
    )


def no_pictures(history: History) -> str | None:
    """Only images train a projector."""
    if (
        history.start.config.stage != "pretrain"
        or history.step != 10
        or history.images
        or history.text_rows
        or not history.begun
    ):
        return None
    return (
        "none of the rows of the first 10 steps has an image, so the projector is not trained: check the key "
        f"`image` of the rows (mmv data preview {history.start.config.data.file})"
    )


def no_marks(history: History) -> str | None:
    """Many text rows are fine, but most rows with pictures should have marks."""
    enough = history.step == history.start.done + 10 or (
        history.last is not None and history.step == history.last.steps
    )
    if not enough or 2 * history.text_rows <= history.rows:
        return None
    return (
        f"{history.text_rows} of the first {history.rows} rows have an image but no {IMAGE_MARK} in their text, "
        f"so the model does not receive it: write {IMAGE_MARK} at the image's position, "
        f'as in "{IMAGE_MARK}\\nWhat is this?"'
    )


def projector_does_not_learn(history: History) -> str | None:
    """A new projector must lower the loss in the first tenth of a run."""
    if not (history.start.new_projector and history.begun and history.images and history.last):
        return None
    if history.step != min(max(50, history.last.steps // 10), 500):
        return None
    first, recent = _mean(history.losses[:FEW]), history.recent
    if recent < 0.97 * first or recent > 1.5 * first:  # another rule covers a rising loss
        return None
    return (
        f"the projector does not learn: the loss was {first:.2f} in the first {FEW} steps and is {recent:.2f} after "
        f"{history.step} — raise --lr (now {history.start.config.lr:g}; pretraining's recipe has 4e-4), and see "
        "whether the captions match their images (mmv data preview)"
    )


def no_gradient(history: History) -> str | None:
    """Zero gradients train nothing."""
    if len(history.norms) < FEW or any(history.norms):
        return None
    policy = history.start.config.freeze
    return f"the gradient has been zero for {FEW} steps, so no weight changes: check --freeze {policy}"


def answers_are_cut(history: History) -> str | None:
    """Truncated text is never trained, above all the end of an answer."""
    if history.step < history.start.done + 10 or history.answers < 50 or history.cut <= 0.05 * history.answers:
        return None
    config = history.start.config
    return (
        f"answers are being cut: {history.cut / history.answers:.0%} of them do not fit into {config.data.max_length} "
        f"tokens — raise --max-length; `mmv data stats {config.data.file}` shows the lengths"
    )


def learning_rate_too_high(history: History) -> str | None:
    """The loss stays far above its lowest; a short jump does not count."""
    if len(history.losses) < FEW:
        return None
    config, first, recent = history.start.config, history.losses[0], history.recent
    advice = f"--lr {config.lr:g} is too high; start over with --lr {config.lr / 10:g} --overwrite"
    if history.begun and history.enough_at_first and min(history.losses[-FEW:]) > first and recent > _far_above(first):
        return f"the loss was {first:.2f} before the first step and is {recent:.2f} after {history.step}: {advice}"
    if recent > _far_above(history.lowest):
        return f"the loss has risen from {history.lowest:.2f} (step {history.lowest_at}) to {recent:.2f}: {advice}"
    return None


def _far_above(loss: float) -> float:
    return loss + max(1.0, 0.5 * loss)


def data_is_slow(history: History) -> str | None:
    """Waiting for data in two stretches in a row: the start, or one slow region of a file, does not count."""
    if len(history.waiting) < 2 or min(history.waiting[-2:]) <= 0.2:
        return None
    config, cores = history.start.config, os.cpu_count() or 1
    workers, most = config.data.workers, max(1, cores // config.gpus)
    if workers < most:
        more = min(most, max(2 * workers, usual_workers(config.gpus)))
        advice = f"raise --workers (now {workers}) to {more}"
    else:
        advice = f"{cores} cores have {workers * config.gpus} workers — smaller images or a faster disk would help"
    return f"{history.waiting[-1]:.0%} of the time is spent waiting for data: {advice}"


# --- rules about validations ------------------------------------------------------------------------------------------


def overfitting(history: History) -> str | None:
    """The held-out loss has risen three times in a row above its best while the loss of training fell."""
    if len(history.validations) < 4:
        return None
    best = min(history.validations, key=lambda validation: validation.loss)
    since = [best, *(later for later in history.validations if later.step > best.step)]
    rising = all(later.loss > earlier.loss for earlier, later in zip(since[-4:], since[-3:], strict=False))
    if len(since) < 4 or not rising or since[-1].loss < 1.01 * best.loss:
        return None
    best_step = best.step - history.start.done
    before, now = _mean(history.losses[max(0, best_step - FEW) : max(best_step, FEW)]), history.recent
    if not now < before:
        return None
    figures = (
        f"since then, the loss on held-out rows rose from {best.loss:.3f} to {since[-1].loss:.3f} while the training "
        f"loss fell from {before:.3f} to {now:.3f} — the weights of step {best.step} are saved (…_best.pth)"
    )
    advice = "stop now, or use more rows or fewer --epochs"
    if 0 < history.start.rows <= SMALL_SET:
        advice = f"{history.start.rows} rows were memorised; answers about other images need more rows"
    return f"overfitting since step {best.step}: {figures}; {advice}"


def ignores_images(history: History) -> str | None:
    """A model that uses the images has a higher loss with images of other rows."""
    losses = [(it.loss, it.swapped_loss) for it in history.validations[-3:] if it.swapped_loss is not None]
    if len(losses) < 3 or not history.last or history.step < 0.3 * history.last.steps:
        return None
    if any(swapped < 0.05 or swapped - loss > 0.005 * swapped for loss, swapped in losses):
        return None
    return (
        f"the model ignores the images: its loss on held-out rows is {losses[-1][0]:.3f} with their images and "
        f"{losses[-1][1]:.3f} with images of other rows — check that the answers need the images and that "
        "the images are the right ones (mmv data preview). If so, pretrain longer or with a higher --lr"
    )


STEP_RULES = (
    first_loss_high,
    loss_stays_high,
    no_pictures,
    no_marks,
    projector_does_not_learn,
    no_gradient,
    answers_are_cut,
    learning_rate_too_high,
    data_is_slow,
)
VALIDATION_RULES = (overfitting, ignores_images)


def _mean(values: list[float]) -> float:
    return statistics.fmean(values) if values else math.nan
