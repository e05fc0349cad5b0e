"""What the commands on Hugging Face folders do, and what they print."""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBar

from emp_callbacks.config import EMPConfig
from emp_callbacks.criteria import make_criterion
from emp_callbacks.finished.budget import budget_table
from emp_callbacks.folders.budget import FolderTrials, smallest_folder_budget
from emp_callbacks.folders.layer_row import LayerRow, by_kind
from emp_callbacks.folders.measuring import Measured, measure_perplexity
from emp_callbacks.folders.output import check_out
from emp_callbacks.folders.perplexity import Scored, measure_of, perplexity_windows
from emp_callbacks.folders.progress import Progress
from emp_callbacks.folders.pruning import FolderReport
from emp_callbacks.folders.pruning import prune_folder as prune_a_folder
from emp_callbacks.folders.samples import Samples, image_samples, text_samples
from emp_callbacks.folders.skeleton import Skeleton, configuration_of
from emp_callbacks.folders.sound_samples import sound_samples
from emp_callbacks.pruning.signatures import emptied_layers, nearly_all, starved_layers
from emp_callbacks.terminal import FittedTable, make_console

__all__ = ["measure", "prune"]

_HELD_OUT = 0.1  # of the tokens of --text, on which perplexity is measured where no other text is given
_SETTINGS = ("criterion", "scope", "beta", "density", "pattern", "min_density", "include", "exclude")


def prune(options: argparse.Namespace, loss_tolerance: float | None) -> None:
    """Prune a folder into another one.

    Args:
        options: Of the command.
        loss_tolerance: Look for the smallest beta that raises the loss by this share at most.
    """
    console, out = make_console(), Path(options.out)
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if loss_tolerance is not None and world_size > 1:
        raise ValueError(f"--tolerance tries one budget after another, and here are {world_size} processes: start one")
    check_out(out, overwrite=options.overwrite)
    config = _config(options)
    with _bar(console, shown=not rank) as progress:
        samples = _samples(options, config, progress)

        def pruned(config: EMPConfig, to: Path) -> FolderReport | None:
            return prune_a_folder(
                Path(options.source),
                to,
                config,
                samples=samples,
                order="sequential" if options.sequential else "dense",
                dtype=_dtype(options.dtype),
                device=_device(options.device),
                rank=rank,
                world_size=world_size,
                overwrite=options.overwrite,
                progress=progress,
            )

        scored, notes = (None, []) if rank else _windows(options)

        def perplexity_of(folder: Path) -> Measured | None:
            return None if scored is None else measure_perplexity(_skeleton(folder, options), scored, progress)

        before, found = perplexity_of(Path(options.source)), None
        if loss_tolerance is not None:
            if before is None:
                raise ValueError(
                    "--tolerance measures the loss on a text; name one with --eval-text FILE or --text FILE"
                )
            # A folder of its own: what a stop leaves is in nobody's way, and nothing of the user's is removed.
            with TemporaryDirectory(prefix=f"{out.name}.trial-", dir=out.absolute().parent) as own:
                trials = _Trials(pruned, perplexity_of, Path(own) / "pruned")
                found = smallest_folder_budget(trials, config, math.log(before.value), loss_tolerance=loss_tolerance)
            config = found.config
        report = pruned(config, out)
        after = None if report is None else perplexity_of(out)
    if found is not None:
        console.print(budget_table(found))
        _say(console, [found.says])
    if report is not None:
        _print_report(console, report, config, before, after, notes)


class _Trials(FolderTrials):
    """Budgets are tried as the command prunes, by the perplexity that it prints."""

    def __init__(
        self,
        pruned: Callable[[EMPConfig, Path], FolderReport | None],
        perplexity_of: Callable[[Path], Measured | None],
        place: Path,
    ) -> None:
        self._pruned, self._perplexity_of, self.place = pruned, perplexity_of, place

    def prune(self, config: EMPConfig) -> FolderReport:
        report = self._pruned(config, self.place)
        assert report is not None  # of the only process
        return report

    def loss(self) -> float:
        measured = self._perplexity_of(self.place)
        return math.inf if measured is None else math.log(measured.value)


def measure(options: argparse.Namespace) -> None:
    """Measure the perplexity of a language model in a folder."""
    console, folder = make_console(), Path(options.source)
    skeleton = _skeleton(folder, options)
    scored = perplexity_windows(
        folder,
        skeleton.config,
        options.text,
        length=options.length,
        stride=options.stride,
        limit=options.limit,
        tokenizer=options.tokenizer,
    )
    with _bar(console, shown=True) as progress:
        found = measure_perplexity(skeleton, scored, progress)
    _say(
        console,
        [
            f"{found.kind} {found.value:.4f} on {found.tokens:,} tokens in {found.windows:,} windows",
            *_cost(found.seconds),
        ],
    )
    _notes(console, found.notes)
    if options.json:
        Path(options.json).write_text(json.dumps({"source": options.source, **vars(found)}, indent=1) + "\n")


def _config(options: argparse.Namespace) -> EMPConfig:
    settings = {name: value for name in _SETTINGS if (value := getattr(options, name)) is not None}
    if make_criterion(options.criterion, "weights").needs == "inputs" and options.pattern is None:
        settings.setdefault("scope", "row")
    return EMPConfig().once(**settings)


def _samples(options: argparse.Namespace, config: EMPConfig, progress: Progress) -> Samples | None:
    """Return what the model is called with, if the criterion asks for it."""
    if make_criterion(config.criterion, config.target).needs != "inputs":
        return None
    folder = Path(options.source)
    of_model = configuration_of(folder)
    if options.images is not None:
        return image_samples(folder, of_model, options.images, count=options.samples)
    if options.sounds is not None:
        text = options.text[0] if options.text else None
        return sound_samples(folder, of_model, options.sounds, count=options.samples, text=text)
    if options.text is None:
        return None
    progress.begin("reading the text", 1)
    return text_samples(
        folder,
        of_model,
        options.text,
        count=options.samples,
        length=options.length,
        seed=options.seed,
        first=options.first,
        held_out_tail=0.0 if options.eval_text or not options.perplexity else _HELD_OUT,
        tokenizer=options.tokenizer,
    )


def _windows(options: argparse.Namespace) -> tuple[Scored | None, list[str]]:
    """Return the windows of the text on which perplexity is measured, None where there is none; and notes."""
    text = options.eval_text or (options.text if options.sounds is None else None)
    if text is None or not options.perplexity:
        return None, []
    folder = Path(options.source)
    config = configuration_of(folder)
    try:
        measure_of(config)
    except ValueError as error:
        if options.eval_text:
            raise
        return None, [str(error)]  # the text is there for calibration, and nobody asked for more
    tail = 0.0 if options.eval_text else _HELD_OUT
    settings = {"limit": options.eval_windows, "held_out_tail": tail, "tokenizer": options.tokenizer}
    return perplexity_windows(folder, config, text, **settings), []


def _skeleton(folder: Path, options: argparse.Namespace) -> Skeleton:
    return Skeleton(folder, _dtype(options.dtype), _device(options.device))


def _dtype(name: str | None) -> Any:
    return None if name is None else getattr(torch, name)


def _device(name: str | None) -> Any:
    try:
        return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ValueError(f"--device {name}: {str(error).partition(chr(10))[0]}") from error


def _print_report(
    console: Console,
    report: FolderReport,
    config: EMPConfig,
    before: Measured | None,
    after: Measured | None,
    notes: Sequence[str],
) -> None:
    console.print(_kinds_table(report.rows, f"{config.criterion_name}, scope {config.scope}"))
    lines = [f"{report.out}: density {report.density:.4f}" + ", nothing is pruned" * (report.density == 1)]
    if before is not None and after is not None:
        change = f"({after.value / before.value - 1:+.2%})"
        lines.append(
            f"{after.kind}: {before.value:.4f} dense, {after.value:.4f} pruned {change}, on {after.tokens:,} tokens"
        )
    lines += _cost(report.seconds + sum(one.seconds for one in (before, after) if one is not None))
    lines.append(f"load it with transformers.{report.architecture}.from_pretrained({str(report.out)!r})")
    _say(console, lines)
    groups = [(row.name, row.n, row.n_eff / row.n) for row in report.rows]
    few = [*emptied_layers(report.rows, config.criterion_name), *starved_layers(report.rows, str(config.scope))]
    notes = [
        *report.notes,
        *notes,
        *(() if before is None else before.notes),
        *dict.fromkeys(row.note for row in report.rows),
    ]
    _notes(console, [note for note in [*notes, *nearly_all(groups, config.criterion_name), *few] if note])


def _kinds_table(rows: Sequence[LayerRow], what: str) -> FittedTable:
    table = FittedTable(f"EMP once: {what}")
    table.add_column("kind of layer", footer="all")
    worths = {"layers": 1, "N": 3, "N_eff / N": 0, "kept": 4, "density": 0, "mass kept": 2}
    for (heading, worth), total in zip(worths.items(), _cells(rows), strict=True):
        table.add_column(heading, worth=worth, footer=total)
    for kind, of_kind in by_kind(rows).items():
        table.add_row(kind, *_cells(of_kind))
    return table


def _cells(rows: Sequence[LayerRow]) -> tuple[str, ...]:
    n, keep = sum(row.n for row in rows), sum(row.keep for row in rows)
    mass = sum(row.preserved_mass * row.n for row in rows) / n
    n_eff = sum(row.n_eff for row in rows) / n
    return f"{len(rows):,}", f"{n:,}", f"{n_eff:.3f}", f"{keep:,}", f"{keep / n:.4f}", f"{mass:.3f}"


def _cost(seconds: float) -> list[str]:
    """Return the line that says what it took: of this process, ru_maxrss is in KiB on Linux and in bytes on macOS."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return [f"{seconds:.1f} s, peak resident memory {peak / 1e9:.2f} GB"]


def _say(console: Console, lines: Sequence[str]) -> None:
    console.print("\n".join(lines), highlight=False, soft_wrap=True)


def _notes(console: Console, notes: Sequence[str]) -> None:
    for note in dict.fromkeys(notes):
        console.print(f"note: {note}", highlight=False, soft_wrap=True)


class _Bar:
    """One bar on the terminal, for the work at hand."""

    def __init__(self, bar: Any) -> None:
        self._bar = bar
        self._task: Any = None

    def begin(self, what: str, total: int) -> None:
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._task = self._bar.add_task(what, total=total)

    def advance(self, steps: int = 1) -> None:
        self._bar.advance(self._task, steps)


@contextmanager
def _bar(console: Console, *, shown: bool) -> Iterator[_Bar]:
    """Show how far the work is, on a terminal."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with ProgressBar(*columns, console=console, disable=not (shown and console.is_terminal), transient=True) as bar:
        yield _Bar(bar)
