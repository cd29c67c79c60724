"""Words with the numbers: what the figures of a run say is wrong with it, each told once, with the next step to take.

A rule is a function of all that has been seen so far. It returns its line when it is sure and None otherwise; being
silent over a healthy run matters more than being early. Losses are in nats per supervised token.
"""

from __future__ import annotations

import math
import os
import statistics
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from minimind_v.core.config.schema import RunConfig, usual_workers
from minimind_v.core.data.batch import Batch
from minimind_v.core.train.metrics import StepMetrics, Validation

FEW = 20  # updates whose mean is taken for the loss at a place
STRETCH = 30.0  # seconds over which the share of waiting is measured


@dataclass(frozen=True)
class Start:
    """What a run began with."""

    config: RunConfig
    loaded: bool  # weights, and not random numbers
    new_projector: bool
    done: int = 0  # updates of an earlier part of the run, which were not seen


@dataclass
class Seen:
    """What has been seen of a run until now."""

    start: Start
    losses: list[float] = field(default_factory=list)  # of each update
    norms: deque[float] = field(default_factory=lambda: deque(maxlen=FEW))
    validations: list[Validation] = field(default_factory=list)
    lowest: float = math.inf  # mean of FEW losses
    lowest_at: int = 0
    pictures: int = 0
    answers: int = 0
    cut: int = 0  # of these, cut short or cut off
    enough_at_first: bool = False  # tokens in the first update for its loss to mean something
    waiting: list[float] = field(default_factory=list)  # share of each STRETCH
    last: StepMetrics | None = None
    _mark: tuple[float, float] | None = None  # seconds and seconds of waiting where the stretch began

    @property
    def begun(self) -> bool:
        """Whether it was watched from its first update on."""
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


class Signs:
    """Watches a run and tells each thing that is wrong once."""

    def __init__(self, start: Start, told: Iterable[str] = (), validations: Iterable[Validation] = ()) -> None:
        """`told` names the rules that an earlier part of the run has told; `validations` are that part's."""
        self.seen = Seen(start, validations=list(validations))
        self.told = set(told)

    def batch(self, batch: Batch) -> None:
        """A batch that is about to be learnt from."""
        self.seen.pictures += 0 if batch.pixel_values is None else len(batch.pixel_values)
        self.seen.pictures += 0 if batch.image_features is None else len(batch.image_features)
        self.seen.answers += batch.answers
        self.seen.cut += batch.answers_cut

    def step(self, metrics: StepMetrics) -> dict[str, str]:
        """An update; returns what there is to say, by rule."""
        self.seen.add(metrics)
        return self._ask(STEP_RULES)

    def validated(self, found: Validation) -> dict[str, str]:
        """A validation; returns what there is to say, by rule."""
        self.seen.validations.append(found)
        return self._ask(VALIDATION_RULES)

    def _ask(self, rules: Iterable[Callable[[Seen], str | None]]) -> dict[str, str]:
        found = {}
        for rule in rules:
            if rule.__name__ not in self.told and (line := rule(self.seen)):
                found[rule.__name__] = line
        self.told |= found.keys()
        return found


# --- rules about updates ----------------------------------------------------------------------------------------------


def base_not_loaded(seen: Seen) -> str | None:
    """Before anything is learnt a loaded base is already better than guessing, and soon after it is much better."""
    config, guessing = seen.start.config, math.log(seen.start.config.model.vocab_size)
    if not (seen.start.loaded and seen.begun):
        return None
    if seen.step == 1 and seen.losses[0] > 0.9 * guessing:
        figure = f"the first loss is {seen.losses[0]:.2f}"
    elif seen.step == 3 * FEW and seen.recent > 0.8 * guessing:
        figure = f"the loss is still {seen.recent:.2f} after {seen.step} updates"
    else:
        return None
    return (
        f"{figure} where blind guessing gives {guessing:.2f}: the base weights do not fit. Either {config.init} is not "
        f"trained, or it belongs to another tokenizer than {config.data.tokenizer}"
    )


def no_pictures(seen: Seen) -> str | None:
    """A projector learns from pictures alone."""
    if seen.start.config.stage != "pretrain" or seen.step != 10 or seen.pictures or not seen.begun:
        return None
    return (
        "none of the rows of the first 10 updates has a picture, so the projector learns nothing: look at the key "
        f"`image` of the rows (mmv data preview {seen.start.config.data.file})"
    )


def projector_does_not_learn(seen: Seen) -> str | None:
    """A projector that is new speaks noise at first, so the loss must fall in the first tenth of a run."""
    if not (seen.start.new_projector and seen.begun and seen.pictures and seen.last):
        return None
    if seen.step != min(max(50, seen.last.steps // 10), 500):
        return None
    first, recent = _mean(seen.losses[:FEW]), seen.recent
    if recent < 0.97 * first or recent > 1.5 * first:  # rising is another rule's business
        return None
    return (
        f"the projector does not learn: the loss was {first:.2f} in the first {FEW} updates and is {recent:.2f} after "
        f"{seen.step} — raise --lr (now {seen.start.config.lr:g}; pretraining's recipe has 4e-4), and see whether "
        "captions belong to their pictures (mmv data preview)"
    )


def no_gradient(seen: Seen) -> str | None:
    """Where every gradient is zero nothing is learnt."""
    if len(seen.norms) < FEW or any(seen.norms):
        return None
    return f"the gradient has been zero for {FEW} updates, so nothing learns: --freeze {seen.start.config.freeze}?"


def answers_are_cut(seen: Seen) -> str | None:
    """What is cut off is never learnt, least of all how an answer ends."""
    if seen.step < seen.start.done + 10 or seen.answers < 50 or seen.cut <= 0.05 * seen.answers:
        return None
    config = seen.start.config
    return (
        f"answers are being cut: {seen.cut / seen.answers:.0%} of them do not fit into {config.data.max_length} tokens "
        f"— raise --max-length; `mmv data stats {config.data.file}` tells how long rows are"
    )


def learning_rate_too_high(seen: Seen) -> str | None:
    """A loss that stays far above what it was has been thrown out of its valley; a short jump is none of this."""
    if len(seen.losses) < FEW:
        return None
    config, first, recent = seen.start.config, seen.losses[0], seen.recent
    advice = f"--lr {config.lr:g} is too high for it; start over with --lr {config.lr / 10:g} --overwrite"
    if seen.begun and seen.enough_at_first and min(seen.losses[-FEW:]) > first and recent > _far_above(first):
        return f"the loss was {first:.2f} before the first update and is {recent:.2f} after {seen.step}: {advice}"
    if recent > _far_above(seen.lowest):
        return f"the loss has risen from {seen.lowest:.2f} (update {seen.lowest_at}) to {recent:.2f}: {advice}"
    return None


def _far_above(loss: float) -> float:
    return loss + max(1.0, 0.5 * loss)


def data_is_slow(seen: Seen) -> str | None:
    """Two stretches in a row, so that neither a start nor one slow part of a file is taken for it."""
    if len(seen.waiting) < 2 or min(seen.waiting[-2:]) <= 0.2:
        return None
    config, cores = seen.start.config, os.cpu_count() or 1
    workers, most = config.data.workers, max(1, cores // config.gpus)
    if workers < most:
        more = min(most, max(2 * workers, usual_workers(config.gpus)))
        advice = f"raise --workers (now {workers}) to {more}"
    else:
        advice = f"{cores} cores have {workers * config.gpus} workers — smaller pictures or a faster disk would help"
    return f"{seen.waiting[-1]:.0%} of the time is spent waiting for data: {advice}"


# --- rules about validations ------------------------------------------------------------------------------------------


def overfitting(seen: Seen) -> str | None:
    """The held-out loss has risen three times in a row above its best while the loss of training fell."""
    if len(seen.validations) < 4:
        return None
    best = min(seen.validations, key=lambda found: found.loss)
    since = [best, *(found for found in seen.validations if found.step > best.step)]
    rising = all(later.loss > earlier.loss for earlier, later in zip(since[-4:], since[-3:], strict=False))
    if len(since) < 4 or not rising or since[-1].loss < 1.01 * best.loss:
        return None
    there = best.step - seen.start.done
    before, now = _mean(seen.losses[max(0, there - FEW) : max(there, FEW)]), seen.recent
    if not now < before:
        return None
    return (
        f"overfitting since step {best.step}: from there on the loss on held-out rows rose from {best.loss:.3f} to "
        f"{since[-1].loss:.3f} while that of training fell from {before:.3f} to {now:.3f} — the weights of step "
        f"{best.step} are kept (…_best.pth); stop here, or train on more rows, or with fewer --epochs"
    )


def does_not_look(seen: Seen) -> str | None:
    """A model that looks is worse off with pictures of other rows."""
    found = [one for one in seen.validations[-3:] if one.swapped_loss is not None]
    if len(found) < 3 or not seen.last or seen.step < 0.3 * seen.last.steps:
        return None
    if any(one.swapped_loss < 0.05 or one.swapped_loss - one.loss > 0.005 * one.swapped_loss for one in found):  # type: ignore[operator]
        return None
    return (
        f"the model does not look: its loss on held-out rows is {found[-1].loss:.3f} with their pictures and "
        f"{found[-1].swapped_loss:.3f} with those of other rows — do the answers need the pictures, and are "
        "these the right ones (mmv data preview)? If so, pretrain for longer or with a higher --lr"
    )


STEP_RULES = (
    base_not_loaded,
    no_pictures,
    projector_does_not_learn,
    no_gradient,
    answers_are_cut,
    learning_rate_too_high,
    data_is_slow,
)
VALIDATION_RULES = (overfitting, does_not_look)


def _mean(values: list[float]) -> float:
    return statistics.fmean(values) if values else math.nan
