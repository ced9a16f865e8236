"""Print the lines, progress bars and tables of a run."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from ggam_fast.training.measure.classification import Metrics, confused_with

_PACKAGE = "ggam_fast.training"
# Without a terminal, a line of progress is printed at most this often, in seconds.
_PLAIN_SECONDS = 10.0


class Bar:
    """Shows a count as a progress bar on a terminal. Elsewhere it prints a line from time to time."""

    def __init__(self, console: Console, progress: Progress | None, name: str, total: int, done: int) -> None:
        self._console = console
        self._progress = progress
        self._name = name
        self._total = total
        self._done = self._before = done
        self._start = self._spoke = time.monotonic()
        self._task = TaskID(0)
        if progress is not None:
            self._task = progress.add_task(name, total=total, completed=done, numbers="")

    def advance(self, count: int, numbers: str = "", name: str | None = None) -> None:
        self._done += count
        self._name = name or self._name
        if self._progress is not None:
            self._progress.update(self._task, advance=count, description=self._name, numbers=numbers)
            return
        now = time.monotonic()
        if now - self._spoke >= _PLAIN_SECONDS or self._done == self._total:
            self._spoke = now
            left = (now - self._start) / (self._done - self._before) * (self._total - self._done)
            numbers = f"  {numbers}" if numbers else ""
            self._console.print(
                f"{self._name}: {self._done}/{self._total}{numbers}  {left:.0f} s left",
                highlight=False,
                soft_wrap=True,
            )


def parts_of_loss(numbers: Mapping[str, float], guidance_weight: float, position_weight: float = 0.0) -> str:
    """The training loss as the sum that it is: cross entropy + lambda * guidance, and the position loss."""
    entropy = f"cross entropy {numbers['cross_entropy']:.4g}"
    rest = ""
    for name, weight in (("guidance", guidance_weight), ("positions", position_weight)):
        if weight and name in numbers:
            rest += f" + {name} {weight * numbers[name]:.4g} ({weight:g} x {numbers[name]:.4g})"
    return f"loss {numbers['loss']:.4g} = {entropy}{rest}" if rest else f"loss: {entropy}"


class Report:
    """Prints tables and progress bars and, while it listens, the log of this package.

    `console`: where to print. The default is standard output.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console()

    @classmethod
    def silent(cls) -> Report:
        """A report that prints nothing."""
        return cls(Console(quiet=True, force_terminal=False))

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside the `with` block, print each log record of this package. In nested blocks, print it once."""
        logger = logging.getLogger(_PACKAGE)
        if any(isinstance(one, _Notes) and one.report.console is self.console for one in logger.handlers):
            yield
            return
        handler, level = _Notes(self), logger.level
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        try:
            yield
        finally:
            logger.removeHandler(handler)
            logger.setLevel(level)

    def note(self, text: str) -> None:
        self.console.print(escape(text), highlight=False, soft_wrap=True)

    def epoch(self, numbers: dict[str, float], epochs: int, weights: tuple[float, float]) -> None:
        val = ""
        if "val_accuracy" in numbers:
            val = f"  validation loss {numbers['val_loss']:.4g}  validation accuracy"
            val += f" {numbers['val_accuracy']:.3f}"
        if "val_accuracy_last" in numbers:
            val += f" (averaged weights; last weights {numbers['val_accuracy_last']:.3f})"
        self.note(
            f"epoch {numbers['epoch']}/{epochs}  {parts_of_loss(numbers, *weights)}"
            f"  training accuracy {numbers['accuracy']:.3f}{val}"
            f"  {numbers['images_per_second']:.0f} images/s"
        )

    @contextmanager
    def bar(self, name: str, total: int, done: int = 0) -> Iterator[Bar]:
        if not self.console.is_terminal:
            yield Bar(self.console, None, name, total, done)
            return
        with Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(compact=True),
            console=self.console,
            expand=True,
            transient=True,
        ) as progress:
            yield Bar(self.console, progress, name, total, done)

    def table(self, metrics: Metrics, classes: Sequence[str], split: str) -> None:
        table = Table(title=f"{split} split, {metrics.images} images", title_justify="left")
        table.add_column("class")
        for column in ("images", "recall", "most confused with"):
            table.add_column(column, justify="right")
        for index, name in enumerate(classes):
            confused = confused_with(metrics.confusion, index, classes)
            recall = f"{metrics.recall[index]:.3f}" if metrics.support[index] else "-"
            table.add_row(escape(name), str(metrics.support[index]), recall, escape(confused))
        self.console.print(table)
        self.note(
            f"accuracy {metrics.accuracy:.3f} (always the commonest class: {metrics.majority:.3f})"
            f"   balanced accuracy {metrics.balanced_accuracy:.3f}   macro F1 {metrics.macro_f1:.3f}"
        )


class _Notes(logging.Handler):
    """Prints each log record as a line of a report."""

    def __init__(self, report: Report) -> None:
        super().__init__()
        self.report = report

    def emit(self, record: logging.LogRecord) -> None:
        self.report.note(record.getMessage())
