"""The progress view of a training run: live on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from itertools import pairwise

from rich.console import Console, ConsoleOptions, RenderResult
from rich.control import Control
from rich.live import Live
from rich.live_render import LiveRender
from rich.segment import Segment
from rich.text import Text

from minimind_v.cli.terminal import Terminal
from minimind_v.core.monitor.metrics import Listener, StepMetrics, TaskScores, Validation, describe_scores

BARS = "▁▂▃▄▅▆▇█"
RECENT = 20  # steps over which rates are measured
POINTS = 128  # of a curve, at most twice as many


class Curve:
    """A curve in a limited number of points: when there are too many, neighbours become their mean."""

    def __init__(self) -> None:
        self.points: list[float] = []
        self._each, self._sum, self._count = 1, 0.0, 0

    def add(self, value: float) -> None:
        self._sum, self._count = self._sum + value, self._count + 1
        if self._count < self._each:
            return
        self.points.append(self._sum / self._count)
        self._sum, self._count = 0.0, 0
        if len(self.points) == 2 * POINTS:
            self.points = [(left + right) / 2 for left, right in zip(self.points[::2], self.points[1::2], strict=True)]
            self._each *= 2


def sparkline(points: list[float], width: int) -> str:
    """A curve as a line of blocks of at most `width` characters."""
    if not points or width < 1:
        return ""
    width = min(width, len(points))
    edges = [column * len(points) // width for column in range(width + 1)]
    means = [sum(points[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    scale = (len(BARS) - 1) / (high - low) if high - low > 0 else 0.0  # a NaN is not above 0 either
    return "".join(BARS[round((mean - low) * scale)] if scale else BARS[0] for mean in means)


class Drawn(LiveRender):
    """The drawing on the terminal. It is wiped whole also after the terminal became narrower and broke its lines."""

    def __init__(self, console: Console) -> None:
        super().__init__("")
        self.console = console
        self.widths: list[int] = []  # of the lines

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        self.widths = [0]
        for segment in super().__rich_console__(console, options):
            assert isinstance(segment, Segment)
            if segment.text == "\n":
                self.widths.append(0)
            else:
                self.widths[-1] += segment.cell_length
            yield segment

    def position_cursor(self) -> Control:
        """Move the cursor to the first line of the drawing."""
        if self._shape is not None:
            width = max(1, self.console.width)
            self._shape = width, sum(max(1, -(-cells // width)) for cells in self.widths)
        return super().position_cursor()


class TrainView(Listener):
    """A listener that shows a run."""

    def __init__(self, terminal: Terminal, stage: str) -> None:
        self.terminal, self.stage = terminal, stage
        self._reset()

    def _reset(self) -> None:
        self.curve = Curve()
        self.recent: deque[StepMetrics] = deque(maxlen=RECENT + 1)
        self.validation: Validation | None = None
        self.best: Validation | None = None
        self.scores: TaskScores | None = None
        self.gains: list[float] = []
        self.saved_at: int | None = None
        self._live = Live(
            get_renderable=self._draw, console=self.terminal.err, refresh_per_second=4, vertical_overflow="crop"
        )
        self._live._live_render = Drawn(self.terminal.err)

    def __enter__(self) -> TrainView:
        if self.terminal.is_live:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._live.transient = not self.recent  # the last step stays on the terminal
        self._live.stop()

    def begin_stage(self) -> None:
        """Leave the last step of a run where it is, and show what comes below it."""
        self.__exit__()
        self._reset()
        self.__enter__()

    # --- events of the run --------------------------------------------------------------------------------------------

    def message(self, text: str) -> None:
        self.terminal.say(text)

    def warning(self, text: str) -> None:
        self.terminal.warn(text)

    def lost(self, text: str) -> None:
        self.terminal.warn(text, always=True)

    def step(self, metrics: StepMetrics, logged: bool) -> None:
        self.recent.append(metrics)
        self.curve.add(metrics.loss)
        if logged and not self._live.is_started:
            self.terminal.say("  ".join(cell.plain for cell in self._cells(metrics)))

    def validated(self, result: Validation) -> None:
        self.validation = result
        self.best = result if self.best is None or result.loss < self.best.loss else self.best
        if not self._live.is_started:
            swapped = result.swapped_loss
            other = "" if swapped is None else f", {swapped:.4f} with images of other rows"
            self.terminal.say(
                f"step {result.step}  validation loss {result.loss:.4f}{other}  "
                f"token accuracy {result.token_accuracy:.0%}" + ("  (the best so far)" if result.best else "")
            )

    def evaluated(self, scores: TaskScores) -> None:
        self.scores = scores
        if (gain := scores.gain["value"]) is not None:
            self.gains.append(gain)
        if not self._live.is_started:
            best = "  (the best so far)" if scores.best else ""
            self.terminal.say(f"step {scores.step}  {describe_scores(scores)}{best}")

    def saved(self, step: int) -> None:
        self.saved_at = step

    # --- drawing ------------------------------------------------------------------------------------------------------

    def _cells(self, metrics: StepMetrics) -> list[Text]:
        """The values of a step, in cells that are not broken over lines."""
        before = self.recent[0]
        seconds = metrics.seconds - before.seconds
        if len(self.recent) == 1 or seconds <= 0:  # the first step: rates since the start of the run
            samples, tokens, waited, seconds = metrics.samples, metrics.tokens, metrics.data_seconds, metrics.seconds
        else:
            samples, tokens = metrics.samples - before.samples, metrics.tokens - before.tokens
            waited = metrics.data_seconds - before.data_seconds
        seconds = max(seconds, 1e-9)
        share = waited / seconds
        return [
            Text(f"step {metrics.step}/{metrics.steps}"),
            Text(f"loss {metrics.loss:.4f}", "bold"),
            Text(f"token accuracy {metrics.token_accuracy:.0%}"),
            Text(f"lr {metrics.lr:.2e}"),
            Text(f"grad {metrics.grad_norm:.2f}"),
            Text(f"{samples / seconds:.1f} samples/s"),
            Text(f"{tokens / seconds:.0f} tokens/s"),
            Text(f"waiting for data {share:.0%}", "yellow" if share > 0.2 else ""),
            Text(f"memory {memory()}"),
            Text(f"left {clock(metrics.seconds_left)}"),
        ]

    def _draw(self) -> Text:
        width = self.terminal.err.width
        if not self.recent:
            return Text(f"{self.stage}: starting …", "dim", no_wrap=True, overflow="ellipsis")
        metrics = self.recent[-1]
        step, loss, *others = self._cells(metrics)
        room = max(8, min(40, width // 3))
        done = round(room * metrics.step / max(metrics.steps, 1))
        bar = Text.assemble(("━" * done, "green"), ("━" * (room - done), "dim"))
        curve = Text(sparkline(self.curve.points, room), "cyan")
        cells = [bar, step, Text(f"epoch {metrics.epoch:.2f}"), others.pop()]
        cells += [curve, loss, *others, *self._milestones()]
        return flow(cells, width)

    def _milestones(self) -> Iterable[Text]:
        if last := self.validation:
            best = f" (best {self.best.loss:.4f} at {self.best.step})" if self.best and self.best != last else ""
            yield Text(f"validation {last.loss:.4f} at {last.step}{best}")
            if last.swapped_loss is not None:
                yield Text(f"with images of other rows {last.swapped_loss:.4f}")
        if scores := self.scores:
            yield Text(f"{describe_scores(scores)} at {scores.step}")
            yield Text.assemble("images add ", (sparkline(self.gains, POINTS), "cyan"))
        yield Text("not saved yet" if self.saved_at is None else f"saved at {self.saved_at}")


def flow(cells: Iterable[Text], width: int) -> Text:
    """Cells side by side, in as many lines as they need. A cell that is wider than a line loses its end."""
    lines: list[Text] = []
    for cell in cells:
        if lines and lines[-1].cell_len + 3 + cell.cell_len < width:
            lines[-1].append("   ").append_text(cell)
        else:
            lines.append(cell.copy())
    text = Text("\n").join(lines)
    text.no_wrap, text.overflow = True, "ellipsis"
    return text


def memory() -> str:
    """The peak memory of this process, as text."""
    from minimind_v.core.device import peak_memory

    process, gpu = peak_memory()
    return f"{process / 2**30:.2f} GiB" + (f", GPU {gpu / 2**30:.2f} GiB" if gpu else "")


def clock(seconds: float) -> str:
    """`5:03`, `2:05:03`."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
