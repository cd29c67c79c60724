"""The numbers of a server, in Prometheus' text form."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter

BOUNDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)  # seconds


class Histogram:
    """Seconds in buckets."""

    def __init__(self) -> None:
        self.counts, self.sum = [0] * (len(BOUNDS) + 1), 0.0

    def add(self, seconds: float) -> None:
        """Count a duration."""
        self.counts[bisect_left(BOUNDS, seconds)] += 1
        self.sum += seconds

    def lines(self, name: str) -> list[str]:
        """The lines of the buckets, the sum and the number."""
        lines, total = [], 0
        for bound, count in zip((*map(str, BOUNDS), "+Inf"), self.counts, strict=True):
            total += count
            lines.append(f'{name}_bucket{{le="{bound}"}} {total}')
        return [*lines, f"{name}_sum {self.sum:.6f}", f"{name}_count {total}"]


class Metrics:
    """Counters, gauges and histograms; all change in the event loop's thread only."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()  # by path and status
        self.accepted = 0  # chat requests that are not yet answered
        self.answering = 0  # of those, the ones whose prompt is with the engine
        self.cancelled = 0  # answers whose client was gone
        self.prompt_tokens = self.completion_tokens = 0
        self.first_token, self.total = Histogram(), Histogram()

    def text(self, models_loaded: int) -> str:
        """All of them as text."""
        requests = [
            f'mmv_requests_total{{path="{path}",code="{code}"}} {count}'
            for (path, code), count in sorted(self.requests.items())
        ]
        groups = (
            ("mmv_requests_total", "counter", "Requests by path and status.", requests),
            ("mmv_requests_active", "gauge", "Requests whose answer is being computed.", self.answering),
            ("mmv_requests_queued", "gauge", "Accepted requests that wait or are being read.",
             self.accepted - self.answering),
            ("mmv_requests_cancelled_total", "counter", "Answers whose client was gone.", self.cancelled),
            ("mmv_prompt_tokens_total", "counter", "Tokens of prompts.", self.prompt_tokens),
            ("mmv_completion_tokens_total", "counter", "Tokens of answers.", self.completion_tokens),
            ("mmv_models_loaded", "gauge", "Loaded models.", models_loaded),
            ("mmv_first_token_seconds", "histogram", "From the prepared prompt to the first token.",
             self.first_token.lines("mmv_first_token_seconds")),
            ("mmv_request_seconds", "histogram", "From the request to the end of its answer.",
             self.total.lines("mmv_request_seconds")),
        )  # fmt: skip
        lines: list[str] = []
        for name, kind, help, values in groups:
            lines += [f"# HELP {name} {help}", f"# TYPE {name} {kind}"]
            lines += values if isinstance(values, list) else [f"{name} {values}"]
        return "\n".join(lines) + "\n"
