"""The commands on finished models: inspect, prune, export."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from emp_callbacks.cli.console import say_first
from emp_callbacks.cli.folder import is_for_folders, prune_folder
from emp_callbacks.cli.freed_memory import give_freed_memory_back
from emp_callbacks.cli.options import export_parser, inspect_parser, prune_parser
from emp_callbacks.cli.recipes import find_recipe
from emp_callbacks.terminal import make_console

if TYPE_CHECKING:
    from rich.console import Console

    from emp_callbacks.finished.export import Source
    from emp_callbacks.finished.weights_file import ExportReport

__all__ = ["export", "inspect", "prune"]


def inspect(words: list[str]) -> None:
    """Show what EMP would keep."""
    options = inspect_parser().parse_args(words)
    say_first(f"inspect: reading {options.source}")
    if options.data:
        _inspect_with_data(options)
        return
    for name in ("target", "criterion"):
        if getattr(options, name) is not None:
            raise ValueError(f"--{name} needs modules and data; name the recipe that builds them with --data RECIPE")
    from emp_callbacks.finished.inspection import inspect_model, report_json, report_table
    from emp_callbacks.finished.streamed_model import stream_model
    from emp_callbacks.pruning.signatures import emptied_layers, nearly_all, starved_layers

    give_freed_memory_back()
    console = make_console()
    beta, scope = 1.0 if options.beta is None else options.beta, options.scope or "global"
    loaded = stream_model(options.source, pretrained=options.pretrained)
    with _said_in_notes(), _reading_bar(console) as on_read:
        rows = inspect_model(
            loaded.module,
            beta=beta,
            scope=scope,
            include=options.include or loaded.include,
            exclude=options.exclude,
            read=loaded.read,
            on_read=on_read,
        )
    settings = {"source": options.source, "beta": beta, "scope": scope}
    console.print(report_table(rows, f"{options.source}: scope {scope}, beta {beta:g}"))
    judged = rows[-1:] if scope == "global" else rows[:-1]
    alike = nearly_all([(row.name, row.n, row.n_eff_fraction) for row in judged], "magnitude")
    few = [*emptied_layers(rows[:-1], "magnitude"), *starved_layers(rows[:-1], scope)]
    notes = [*loaded.notes, *_already_pruned(rows[-1].density), *alike, *few]
    _print_notes(console, notes)
    if options.json:
        Path(options.json).write_text(report_json(rows, **settings, notes=notes))


def _inspect_with_data(options: argparse.Namespace) -> None:
    from emp_callbacks.finished.certification import certified_json, certify_source, cost_table
    from emp_callbacks.trajectory import layer_table

    if options.pretrained:
        raise ValueError(
            "--pretrained goes without --data: let the recipe load the weights (model.init_args.pretrained)"
        )
    names = ("target", "criterion", "scope", "beta", "include", "exclude")
    settings = {name: value for name in names if (value := getattr(options, name)) is not None}
    recipe = find_recipe(options.data)
    console, steps = make_console(), 2 * options.probes * options.batches
    told = f"measuring: Tr(H) alone takes about {steps} training steps (--probes, --batches)"
    with _said_in_notes(), console.status(told):
        found = certify_source(options.source, recipe, settings, batches=options.batches, probes=options.probes)
    console.print(layer_table(found.cost.events))
    console.print(cost_table(found))
    _print_notes(console, found.notes)
    if options.json:
        Path(options.json).write_text(certified_json(found))


@contextmanager
def _reading_bar(console: Console) -> Iterator[Callable[[int, int], None]]:
    """Show on a terminal which tensor is read; from the first again, where each is read several times."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("tensors read", total=None)
        yield lambda i, count: bar.update(task, completed=i, total=count)


@contextmanager
def _said_in_notes() -> Iterator[None]:
    """Hide the warnings of a refresh that the command prints as notes."""
    from emp_callbacks.pruning.signatures import SAID_OF_A_REFRESH

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=SAID_OF_A_REFRESH)
        yield


def _print_notes(console: Console, notes: Iterable[str]) -> None:
    for note in notes:
        console.print(f"note: {note}", highlight=False, soft_wrap=True)


def _already_pruned(density: float) -> list[str]:
    if density > 0.999:
        return []
    return [f"{1 - density:.1%} of these weights are zero already: N_eff is that of the rest, and keep prunes further"]


def prune(words: list[str]) -> None:
    """Prune a finished model once."""
    options = prune_parser().parse_args(words)
    say_first(f"prune: reading {options.source}")
    if is_for_folders(options):
        with _said_in_notes():
            prune_folder(options, _loss_tolerance(options))
        return
    from emp_callbacks.finished.budget import budget_table
    from emp_callbacks.finished.export import prune
    from emp_callbacks.pruning.signatures import signatures_of
    from emp_callbacks.trajectory import layer_table

    tolerance = _loss_tolerance(options)
    if options.density is not None and options.beta is not None:
        raise ValueError(f"--beta {options.beta} and --density {options.density} both say how much is kept; drop one")
    names = ("target", "criterion", "scope", "beta", "density", "pattern", "min_density", "include", "exclude")
    settings = {name: value for name in names if (value := getattr(options, name)) not in (None, "auto")}
    console = make_console()
    with _said_in_notes(), _budget_bar(console, shown=tolerance is not None) as on_tried:
        pruner, report = prune(
            _source(options),
            options.out,
            settings,
            batches=options.batches,
            loss_tolerance=tolerance,
            on_tried=on_tried,
            shrink_units=options.shrink,
            uniform=_uniform(options),
            overwrite=options.overwrite,
        )
    if report.budget:
        console.print(budget_table(report.budget))
        console.print(report.budget.says, highlight=False, soft_wrap=True)
    console.print(layer_table(pruner.last_events))
    n, keep = (sum(getattr(event, key) for event in pruner.last_events) for key in ("n", "keep"))
    if keep == n:
        told = f"nothing is pruned: all {n:,} {pruner.config.target} are kept, and the weights written as they were"
        console.print(told, highlight=False, soft_wrap=True)
    _print_export(report)
    _print_notes(console, signatures_of(pruner.last_events).values())


def _loss_tolerance(options: argparse.Namespace) -> float | None:
    """Return the tolerance by which beta is looked for; None where it is given."""
    if options.tolerance is None and options.beta != "auto":
        return None
    for name in ("beta", "density", "pattern"):
        if (value := getattr(options, name)) not in (None, "auto"):
            raise ValueError(f"--{name} {value} says what is kept, and --tolerance looks for it; drop one")
    return 0.01 if options.tolerance is None else float(options.tolerance)


@contextmanager
def _budget_bar(console: Console, *, shown: bool) -> Iterator[Callable[[object], None]]:
    """Show how many budgets are measured, on a terminal, and lend what counts them."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from emp_callbacks.finished.budget import EVALUATIONS

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not (shown and console.is_terminal), transient=True) as bar:
        task = bar.add_task("budgets measured, at most", total=EVALUATIONS)
        yield lambda _: bar.advance(task)


def export(words: list[str]) -> None:
    """Write masked weights."""
    options = export_parser().parse_args(words)
    say_first(f"export: reading {options.source}")
    from emp_callbacks.finished.export import export

    report = export(
        _source(options),
        options.out,
        shrink_units=options.shrink,
        uniform=_uniform(options),
        overwrite=options.overwrite,
    )
    _print_export(report)


def _uniform(options: argparse.Namespace) -> bool:
    if options.uniform and not options.shrink:
        raise ValueError("--uniform says what --shrink leaves; give both")
    return bool(options.uniform)


def _source(options: argparse.Namespace) -> Source:
    from emp_callbacks.finished.export import Source

    config = find_recipe(options.config) if options.config else None
    return Source(options.source, config, options.prefix, options.pretrained, options.input_size)


def _print_export(report: ExportReport) -> None:
    from emp_callbacks.finished.weights_file import report_lines, shrink_table

    console = make_console()
    if report.shrunk and report.shrunk.layers:
        console.print(shrink_table(report.shrunk))
    console.print("\n".join(report_lines(report)), highlight=False, soft_wrap=True)
