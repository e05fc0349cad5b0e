"""The commands on recipes: fit, validate, test, studies and their reports."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emp_callbacks.cli.console import say_first
from emp_callbacks.cli.once_options import criteria_parser, gates_parser, sweep_parser, violations_parser
from emp_callbacks.cli.options import compare_parser, report_parser
from emp_callbacks.cli.recipes import find_recipe, with_files
from emp_callbacks.terminal import make_console

if TYPE_CHECKING:
    from rich.console import Console

    from emp_callbacks.study.once.study import OnceStudy

__all__ = ["LIGHTNING_HELP", "compare", "compare_criteria", "gates", "lightning", "report", "sweep_beta", "violations"]

LIGHTNING_HELP = {
    "fit": """\
Train the model of a recipe, with the callbacks that the recipe names.

examples:
  emp fit --config quickstart
  emp fit --config quickstart --trainer.max_epochs 1 --model.init_args.lr 0.01
  emp fit --config quickstart --ckpt_path last
  emp fit --config quickstart --print_config

--ckpt_path goes on from a checkpoint, here from the last of this recipe;
--print_config shows every setting, and trains nothing. --KEY VALUE replaces
a key of the recipe; the keys are listed below.
The study: section is for emp compare; it is checked here and otherwise ignored.""",
    "validate": """\
Evaluate a recipe's model on its validation split.

example:
  emp validate --config quickstart --ckpt_path PATH""",
    "test": """\
Evaluate a recipe's model on its test split.

example:
  emp test --config quickstart --ckpt_path PATH""",
}


def lightning(command: str) -> Callable[[list[str]], None]:
    """Return what runs `fit`, `validate` or `test` of LightningCLI on a recipe."""

    def run(words: list[str]) -> None:
        files = with_files(words)
        named = [word for before, word in pairwise(words) if before in ("-c", "--config")]
        named += [word.partition("=")[2] for word in words if word.startswith("--config=")]
        if not named and not any(word in ("-h", "--help") or word.startswith("--model") for word in words):
            raise ValueError(
                f"name a recipe: emp {command} --config quickstart, or a YAML file (emp recipes lists more)"
            )
        say_first(f"{command}: reading {', '.join(named) or 'all options of Lightning'}")
        from emp_callbacks.study.recipe.recipe import run_lightning

        run_lightning(command, files, LIGHTNING_HELP[command])

    return run


def compare(words: list[str]) -> None:
    """Run a study and show what it found."""
    options, overrides = compare_parser().parse_known_args(words)
    path, *over = [find_recipe(given) for given in options.config]
    if options.list_cells:
        from emp_callbacks.study.cell_list import listed_cells  # before seconds of imports

        if (cells := listed_cells([path, *over], overrides)) is not None:
            sys.stdout.write("".join(f"{cell}\n" for cell in cells))
            return
    say_first(f"compare: reading {', '.join(options.config)}")
    from emp_callbacks.study.comparison import run_study, study_cells
    from emp_callbacks.study.ranks import own_rank
    from emp_callbacks.study.recipe.recipe import Recipe
    from emp_callbacks.study.report.report import write_report
    from emp_callbacks.study.report.terminal import comparison_table

    console = make_console()
    laid_over = [word for file in over for word in ("--config", file)]
    recipe = Recipe(path, [*laid_over, *overrides], called=options.config[0])
    if options.list_cells:
        console.print("\n".join(study_cells(recipe)), highlight=False)
        return
    out = Path(options.out or recipe.study.out or Path("runs", recipe.path.stem))
    if options.jobs is not None and options.only is not None:
        raise ValueError("--only trains its cells one after the other: drop --jobs, or drop --only")
    if options.jobs is not None:
        from emp_callbacks.study.side_by_side import run_side_by_side

        results: dict[str, Any] | None = run_side_by_side(
            recipe, out, options.jobs, overwrite=options.overwrite, console=console
        )
    else:
        results = run_study(recipe, out, overwrite=options.overwrite, only=options.only, console=console)
    if own_rank() != 0:  # rank 0 tells what was found
        return
    if results is None:
        console.print(
            "cells are left: the same command without --only trains them and writes the report; a study of some "
            "arms alone is --study.arms '[...]' --study.seeds '[...]', with an --out of its own"
        )
        return
    report = write_report(results, out)
    console.print(comparison_table(results))
    console.print(f"report: {report}", highlight=False, soft_wrap=True)


def sweep_beta(words: list[str]) -> None:
    """Prune trained models for several beta."""
    options, overrides = sweep_parser().parse_known_args(words)
    paths = _recipes("sweep-beta", options)
    from emp_callbacks.study.once.beta_sweep import BETAS, beta_sweep

    names = ("target", "criterion", "scope")
    settings = {name: value for name in names if (value := getattr(options, name)) is not None}
    study = beta_sweep(betas=options.betas or BETAS, tolerance=options.tolerance, overrides=settings)
    _run_once(study, options, paths, overrides, words)


def compare_criteria(words: list[str]) -> None:
    """Prune trained models by every criterion."""
    options, overrides = criteria_parser().parse_known_args(words)
    paths = _recipes("compare-criteria", options)
    from emp_callbacks.study.once.criteria_comparison import criteria_comparison

    study = criteria_comparison(
        targets=options.targets, density=options.density, batches=options.batches, scope=options.scope
    )
    _run_once(study, options, paths, overrides, words)


def violations(words: list[str]) -> None:
    """Measure losses beside their bounds."""
    options, overrides = violations_parser().parse_known_args(words)
    paths = _recipes("violations", options)
    from emp_callbacks.study.once.beta_sweep import BETAS
    from emp_callbacks.study.once.violations import CRITERIA, violations

    study = violations(
        criteria=options.criteria or CRITERIA,
        betas=options.betas or BETAS,
        batches=options.batches,
        probes=options.probes,
        scope=options.scope,
    )
    _run_once(study, options, paths, overrides, words)


def gates(words: list[str]) -> None:
    """Train on with heads that EMP, or gates, choose."""
    options, overrides = gates_parser().parse_known_args(words)
    if len(options.config) > 1:
        raise ValueError(f"emp gates is about one model, and --config names {len(options.config)} recipes; name one")
    paths = _recipes("gates", options)
    from emp_callbacks.study.gates.study import gates_study

    _run_once(gates_study(steps=options.steps, evidence_batches=options.batches), options, paths, overrides, words)


def _recipes(command: str, options: argparse.Namespace) -> list[str]:
    """Return the paths of the recipes, told before seconds of imports."""
    paths = [find_recipe(given) for given in options.config]
    say_first(f"{command}: reading {', '.join(options.config)}")
    return paths


def _run_once(
    study: OnceStudy, options: argparse.Namespace, paths: Sequence[str], overrides: list[str], words: Sequence[str]
) -> None:
    """Run a study on trained models and show what it found."""
    from emp_callbacks.study.once.study import run_once_study
    from emp_callbacks.study.recipe.recipe import Recipe
    from emp_callbacks.study.report.page import write_page
    from emp_callbacks.study.report.terminal import print_page

    console, out = make_console(), Path(options.out)
    results = run_once_study(
        study,
        [Recipe(path, overrides) for path in paths],
        out,
        models=Path(options.models),
        seeds=options.seeds,
        overwrite=options.overwrite,
        jobs=options.jobs,
        console=console,
        words=[study.command, *words],
    )
    page = study.page(results)
    written = write_page(page, out, results)
    print_page(page, console)
    console.print(f"report: {written}", highlight=False, soft_wrap=True)


def report(words: list[str]) -> None:
    """Write the report of a folder again."""
    folder = Path(report_parser().parse_args(words).folder)
    results, rows = folder / "results.json", folder / "emp_trajectory.jsonl"
    say_first(f"report: reading {folder}")
    console = make_console()
    if results.is_file():
        page = _report_of_study(results, console)
    elif rows.is_file():
        from emp_callbacks.study.report.reading import read_rows, showing
        from emp_callbacks.study.report.report import write_trajectory_report

        records = read_rows(rows)
        with showing(rows, "remove the damaged row"):
            page = write_trajectory_report(records, folder, folder.name)
    else:
        raise FileNotFoundError(_nothing_to_report(folder))
    console.print(f"report: {page}", highlight=False, soft_wrap=True)


def _report_of_study(path: Path, console: Console) -> Path:
    from emp_callbacks.study.report.reading import check_runs, showing
    from emp_callbacks.study.run_store import AGAIN, read_results

    results = read_results(path)
    with showing(path, AGAIN):
        if isinstance(results["study"], str):
            return _report_of_once_study(results, path.parent, console)
        from emp_callbacks.study.report.report import write_report
        from emp_callbacks.study.report.terminal import comparison_table

        check_runs(results, AGAIN)
        table = comparison_table(results)
        written = write_report(results, path.parent)
    console.print(table)
    return written


def _report_of_once_study(results: Mapping[str, Any], folder: Path, console: Console) -> Path:
    from emp_callbacks.study.report.page import write_page
    from emp_callbacks.study.report.terminal import print_page
    from emp_callbacks.study.studies import PAGES

    if results["study"] not in PAGES:
        raise ValueError(f"{folder / 'results.json'} is of study {results['study']!r}; known: {', '.join(PAGES)}")
    found = PAGES[results["study"]](results)
    written = write_page(found, folder, results)
    print_page(found, console)
    return written


def _nothing_to_report(folder: Path) -> str:
    if not folder.is_dir():
        return f"folder {folder} does not exist"
    below = [path.parent for name in ("results.json", "emp_trajectory.jsonl") for path in folder.rglob(name)]
    hint = f"; there is one in {min(below, key=lambda path: len(path.parts))}" if below else ""
    if (folder / "runs").is_dir():
        hint = ": its study has runs left; give its command again, which goes on and writes the report"
    return f"{folder} holds neither results.json (emp compare) nor emp_trajectory.jsonl (emp fit){hint}"
