"""Messages of a run: its announcement, its broken rows, and the reason of its end."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from minimind_v.core.config.generation import generation_of
from minimind_v.core.config.schema import RunConfig
from minimind_v.core.data.dataset import BrokenRow
from minimind_v.core.data.loader import LANES, WINDOW, BatchPlan
from minimind_v.core.errors import DataError, RunError
from minimind_v.core.model.vlm import VLM
from minimind_v.core.monitor.diagnostics import SMALL_SET
from minimind_v.core.monitor.metrics import Recalled
from minimind_v.core.wording import plural

NAMED_BROKEN = 5  # broken rows that are named one by one
FEW = 50  # broken rows that are too few for a rate
NAMED = 8  # rows of a step that are named
# Messages of torch and of CUDA's libraries after a failed allocation, which are not torch.OutOfMemoryError.
NO_MEMORY = (
    "can't allocate memory",
    "MPS backend out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDA error: out of memory",
)
FEW_HELD_OUT = 8  # rows; the loss on fewer is mostly chance
# How far a weight may move over a run (Cosine.reach). Weights are some 0.05 in size. Twelve rows at 0.0001 lowered
# the loss from 14.9 to 13.7; every answer was right at 0.03 with the small preset and at 0.15 with the demo's.
LEAST_REACH, GOOD_REACH = 0.001, 0.05
HIGHEST_RATE = 5e-4  # of the advice
FORGOTTEN = 0.05  # lost share of the answers' tokens from which a warning calls it forgetting


def announcement(config: RunConfig, plan: BatchPlan, steps: int, rows: int, model: VLM, where: str) -> str:
    """The announcement of a run: its rows, steps and learning rates."""
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    everything = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("vision_encoder."))
    held_out = len(plan.dataset) - plan.rows
    kept = f" ({held_out:,} of them held out)" if held_out else ""
    stop = ", or fewer: the run stops after two epochs in a row in which every answer is correct"
    end = stop if config.until_right else ""
    epochs = f"{steps / plan.steps_per_epoch:.3g} epochs" if steps < len(plan) else plural(config.epochs, "epoch")
    highest = generation_of(config.model).cosine.peak(config.lr)
    return (
        f"{config.stage}: {plural(len(plan.dataset), 'row')} of {config.data.file}{kept}, "
        f"{epochs}, {plural(steps, 'step')} of {plural(min(rows, plan.rows), 'row')} "
        f"on {where}{end}; learning rate {config.lr:.2g}, from {highest:.2g} down to {config.lr / 10:.2g}; "
        f"{trained:,} of {everything:,} parameters are trainable ({config.freeze})"
    )


def before_the_start(config: RunConfig, plan: BatchPlan, steps: int) -> Iterator[str]:
    """Warnings about the settings of a run, before it starts."""
    if line := too_little(config, plan.rows, steps):
        yield line
    if config.until_right and plan.rows > SMALL_SET:
        yield (
            f"{plan.rows:,} rows are too many for a run that stops when every answer is correct: it may never stop, "
            "and each row takes one step — leave out --recipe and raise --lr instead"
        )
    held_out = len(plan.dataset) - plan.rows
    if config.val_every and held_out < FEW_HELD_OUT:
        yield (
            f"only {plural(held_out, 'row')} of {len(plan.dataset)} held out: the loss on so few rows is not reliable, "
            f"but the best weights are chosen by it — leave out --val-every, or use `mmv eval` with another file"
        )


def too_little(config: RunConfig, rows: int, steps: int) -> str | None:
    """A warning that a run cannot change its weights enough, with advice; None if it can."""
    reach = generation_of(config.model).cosine.reach
    moved = reach(config.lr, steps)
    if moved >= LEAST_REACH:
        return None
    lr = max(config.lr, min(HIGHEST_RATE, float(f"{GOOD_REACH / reach(1, steps):.0e}")))
    advice = f"--lr {lr:g}" if lr > config.lr else ""
    if reach(lr, steps) < GOOD_REACH / 5:  # the steps are too few at any rate
        more = math.ceil(GOOD_REACH / 5 / reach(lr, 1))
        option = f"--epochs {math.ceil(config.epochs * more / steps)}"
        if config.max_steps == steps:
            option = f"--max-steps {more}"
        advice = f"{advice} {option}".strip()
    few = config.stage == "sft" and rows <= SMALL_SET and not config.until_right
    small = ", or --recipe small-data (for few rows)" if few else ""
    return (
        f"{plural(steps, 'step')} at --lr {config.lr:g} cannot move a weight by more than {moved:.1g}: the model "
        f"will hardly change — try {advice}{small}"
    )


def recalled(
    config: RunConfig, weights: Path, results: Mapping[str, Recalled], why: str
) -> tuple[list[str], list[str]]:
    """Messages about the accuracy of a run on its own rows and on earlier ones; second, warnings.

    `results` are those of `own`, `before` and `after`; `why` is the reason if the last two are missing.
    """
    messages, warnings = [], []
    if own := results.get("own"):
        rows = f"{plural(own.rows, 'row')} of {own.data}"
        if own.token_accuracy == 1:
            messages.append(f"learnt: every answer of the {rows} is correct, token for token")
        else:
            warnings.append(
                f"some answers were not learnt: {own.token_accuracy:.1%} of the answer tokens of {rows} are correct — "
                "raise --epochs or --lr; where two rows ask the same about the same image, only one of their answers "
                "can be correct"
            )
    if "before" not in results or "after" not in results:
        messages.append(
            f"not measured: how much {weights} has forgotten of what {config.init} knew ({why}) — "
            f"compare the two with `mmv eval --model {weights} --data FILE`"
        )
        return messages, warnings
    before, after = results["before"], results["after"]
    messages.append(
        f"kept: on {plural(after.rows, 'row')} of {after.data}, not trained on now, {before.token_accuracy:.1%} of the "
        f"answers' tokens were right before and {after.token_accuracy:.1%} are now "
        f"(loss {before.loss:.3f}, now {after.loss:.3f})"
    )
    if before.token_accuracy - after.token_accuracy > FORGOTTEN:
        warnings.append(
            f"the model has forgotten part of what {config.init} knew: add rows of {after.data} to the new ones, "
            f"or use a lower --lr (now {config.lr:g})"
        )
    return messages, warnings


def not_finite(loss: float, grad_norm: float, rows: Sequence[str]) -> str:
    """A warning about a skipped step, with its rows."""
    more = f" and {len(rows) - NAMED} more" if len(rows) > NAMED else ""
    return f"loss {loss:g}, gradient norm {grad_norm:g}: step skipped; its rows: {', '.join(rows[:NAMED])}{more}"


class BrokenRows:
    """The broken rows of a run, each counted once."""

    def __init__(self, rows: int, rows_per_step: int, allowed: float) -> None:
        """`allowed` is the share of all `rows` that may be broken."""
        self.rows, self.rows_per_step, self.allowed = rows, rows_per_step, allowed
        self.by_location: dict[str, list[str]] = {}  # location of the row → its kind and its message

    @property
    def kinds(self) -> dict[str, int]:
        """The number of rows of each kind, the most frequent first."""
        return dict(Counter(kind for kind, _ in self.by_location.values()).most_common())

    @property
    def first(self) -> str | None:
        """The message of the first row."""
        return next((message for _, message in self.by_location.values()), None)

    def add(self, rows: list[BrokenRow], read: int, warn: Callable[[str], None]) -> None:
        """Add broken rows after so many rows of the set were `read`, and name the first ones.

        Raises DataError where too many of all rows are broken, or so many of those read that the rest hardly matters.
        The result is the same after a resume and for any number of processes.
        """
        for row in rows:
            if row.location in self.by_location:
                continue
            self.by_location[row.location] = [row.kind, str(row)]
            if len(self.by_location) <= NAMED_BROKEN:
                warn(f"row skipped: {row}")
        broken = len(self.by_location)
        if broken <= min(self.allowed * self.rows, self._bearable(read)):
            return
        which = f"{self.rows}" if read == self.rows else f"the first {read}"
        advice = "fix the data (`mmv data check` lists every such row)"
        if broken < read:  # without a whole row there is nothing to allow
            advice += f", or allow more with --set data.bad_rows={_above(broken / read):g}"
        elif set(self.kinds) == {"image missing"}:
            advice = f"check --images, or {advice}"
        raise DataError(
            f"{broken} of {which} rows are broken, more than {self.allowed:.0%}; for example {self.first} — {advice}"
        )

    def _bearable(self, read: int) -> float:
        """Broken rows that `read` rows may have where the share of all is within what is allowed.

        Broken rows of a window come together, since it is sorted by length, and windows are read in lanes side by
        side. So those seen so far are set against all rows of the windows that have been begun, and beyond that count
        five standard deviations and a few rows are left to chance.
        """
        begun = min(read + LANES * WINDOW * self.rows_per_step, self.rows)
        return self.allowed * begun + 5 * math.sqrt(self.allowed * begun) + FEW


def _above(share: float) -> float:
    """A round share above this one."""
    return next((round_share for round_share in (0.02, 0.05, 0.1, 0.2, 0.5) if round_share > share), 1.0)


@contextmanager
def explained(config: RunConfig) -> Iterator[None]:
    """Turn torch's errors about memory into one with a next step."""
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        if not out_of_memory(error):
            raise
        batch, accumulate = config.data.batch_size, config.accumulate
        half = next((size for size in range(batch // 2, 0, -1) if batch % size == 0), 0)
        advice = (
            f"keep the rows per step with less memory: --batch-size {half} --accumulate "
            f"{accumulate * batch // max(half, 1)}"
        )
        if not half:
            advice = f"lower --max-length {config.data.max_length}, or choose a smaller --preset"
        raise RunError(f"out of memory — {advice}") from None


def out_of_memory(error: RuntimeError) -> bool:
    """Whether an error of torch, or of a library that it calls, means that memory is full, on a GPU or on the CPU."""
    return isinstance(error, torch.OutOfMemoryError) or any(phrase in str(error) for phrase in NO_MEMORY)
