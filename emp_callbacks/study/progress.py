"""What a study shows while it runs: two bars on a terminal, one line per finished run anywhere."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column

__all__ = ["StudyProgress"]


class StudyProgress:
    """Bars over the runs of a study and over the steps of the current run.

    Args:
        console: Where to write.
        total: Number of runs.
        metric: Metric shown for a finished run.
    """

    def __init__(self, console: Console, total: int, metric: str) -> None:
        self._console, self._total, self._metric = console, total, metric
        self.finished = 0
        self._part = (0.0, 1.0)
        columns = (
            TextColumn("{task.description}", markup=False, table_column=Column(overflow="fold", min_width=17)),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left", style="progress.remaining"),
            TimeRemainingColumn(),
        )
        # The time left is that of the runs before, which may take hours: rich would forget all but 30 seconds.
        self._bars = Progress(
            *columns,
            console=console,
            disable=not console.is_terminal,
            transient=True,
            expand=True,
            speed_estimate_period=math.inf,
        )
        self._runs = self._bars.add_task("runs", total=total)
        self._steps = self._bars.add_task("", total=None, visible=False)

    def __enter__(self) -> StudyProgress:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def begin(self, name: str, done: int = 0, total: int | None = None, part: tuple[float, float] = (0.0, 1.0)) -> None:
        """Start the inner bar of the next training, or of some other work of which so much is done.

        Args:
            name: What is done.
            done: Steps that are behind.
            total: All steps, if known.
            part: Where in a run the work begins and ends, as fractions of it.
        """
        self._part = part
        self._bars.reset(self._steps, description=name, total=total, completed=done, visible=True)

    def on_step(self, step: int, total: int | None) -> None:
        """Show how far the current training is, and in whole percent of it the study."""
        self._bars.update(self._steps, completed=step, total=total)
        if total:
            first, last = self._part
            percent = min(99.0, 100 * (first + (last - first) * step / total)) // 1
            self._bars.update(self._runs, completed=self.finished + percent / 100)

    def note(self, line: str) -> None:
        """Print a line about a part of a run."""
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    @property
    def is_quiet(self) -> bool:
        """Whether nothing is shown."""
        return self._console.quiet

    def reused(self, count: int) -> None:
        """Count runs that an earlier call had finished."""
        if count:
            self.finished += count
            self._bars.update(self._runs, completed=self.finished)
            self._console.print(f"reused {count} of {self._total} runs")

    def done(self, label: str, record: Mapping[str, Any]) -> None:
        """Count one finished run, of an arm at a point, and print its line."""
        value = record["metrics"].get(self._metric)
        shown = f"{self._metric} {value:.4f}" if value is not None else f"{self._metric} not logged"
        name, density, seconds = f"{label} seed {record['seed']}", record["density"], record["seconds"]
        self.advance(f"{name}: {shown}, density {density:.3f}, {seconds:.1f} s")

    def advance(self, line: str) -> None:
        """Count one finished run and print a line about it."""
        self.finished += 1
        self._bars.update(self._runs, completed=self.finished)
        text = f"[{self.finished}/{self._total}] {line}"
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)
