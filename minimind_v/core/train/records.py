"""The records of a run besides weights and states: metrics, events, its settings and inputs, and the report."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

from minimind_v.core.config.load import as_settings, to_yaml
from minimind_v.core.config.schema import RunConfig
from minimind_v.core.errors import MmvError, RunError
from minimind_v.core.files import write_text
from minimind_v.core.monitor.diagnostics import Start
from minimind_v.core.monitor.manifest import write_manifest
from minimind_v.core.monitor.metrics import Best, JsonLines, Listener, StepMetrics
from minimind_v.core.monitor.recorder import Recorder
from minimind_v.core.monitor.records import EVALUATIONS
from minimind_v.core.monitor.trackers import open_tracker
from minimind_v.core.pages.run_report import write_report
from minimind_v.core.train.run_folder import RunFolder


@contextmanager
def errors_as_warnings(listener: Listener, step: int) -> Iterator[None]:
    """A full disk must not end the run."""
    try:
        yield
    except RunError as error:
        listener.lost(f"step {step}: {error}")


class Records:
    """The records of a run, written by its leading process."""

    def __init__(
        self,
        config: RunConfig,
        folder: RunFolder,
        origin: Mapping[str, Any],
        start: Start,
        recorder: Recorder,
        processes: int = 1,
    ) -> None:
        self.config, self.folder, self.origin, self.start = config, folder, origin, start
        self.recorder, self.processes = recorder, processes
        self._begun = 0

    def open(self, done: int) -> Best | None:
        """Start the records of a run, or resume them after `done` steps; returns the best weights until then."""
        config, folder, tracker = self.config, self.folder.folder, None
        self._begun = done
        if config.track != "none":
            tracker = open_tracker(config.track, folder, folder.name, as_settings(config), done)
            self.recorder.message(f"curves: {tracker.where}")
        self._describe()
        if not done:  # those of an earlier run
            best = self.folder.best_weights
            for path in (best, best.with_suffix(".json"), self.folder.folder / EVALUATIONS):
                path.unlink(missing_ok=True)
            shutil.rmtree(self.folder.evaluations, ignore_errors=True)
        self.recorder.begin(replace(self.start, done=done), tracker)
        self._metrics = JsonLines(self.folder.metrics, done)
        return self.recorder.best

    def log(self, metrics: StepMetrics) -> None:
        """Add a line to `metrics.jsonl`."""
        with errors_as_warnings(self.recorder, metrics.step):
            if self._metrics.write(asdict(metrics)):
                self.recorder.warning(
                    f"step {metrics.step}: {self.folder.metrics} was removed during the run and is written again "
                    f"— check what else is missing in {self.config.out}"
                )
                self._describe()

    def keep_best(self, best: Best) -> None:
        """Note which weights are kept as the best."""
        self.recorder.keep_best(best)

    @property
    def evaluated_step(self) -> int | None:
        """The step of the last evaluation by a task."""
        return self.recorder.evaluated_step

    def restore(self, done: int) -> None:
        """Write removed files again, so that the report at the end is true."""
        with errors_as_warnings(self.recorder, done):
            if self._metrics.write():
                self.recorder.warning(f"{self.folder.metrics} was removed during the run and is written again")
            if not (self.folder.folder / "config.yaml").exists():
                self._describe()

    def report(self) -> None:
        """Write `report.html`."""
        try:
            write_report(self.folder.folder, self.recorder.warning)
        except MmvError as error:  # a full disk, or no metrics because of one
            self.recorder.lost(f"no report: {error}")

    def close(self) -> None:
        self._metrics.close()

    def _describe(self) -> None:
        """Write the settings and inputs of the run."""
        folder, config = self.folder.folder, self.config
        write_text(folder / "config.yaml", to_yaml(config))
        write_manifest(folder / "manifest.json", config, self.origin, self._begun, self.processes)
