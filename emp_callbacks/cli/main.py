"""The `emp` command: parses, calls, prints. Whatever is heavy is imported by the command that needs it."""

from __future__ import annotations

import argparse
import dis
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from emp_callbacks.cli.options import (
    compare_parser,
    criteria_parser,
    export_parser,
    inspect_parser,
    prune_parser,
    report_parser,
    sweep_parser,
    violations_parser,
)

if TYPE_CHECKING:
    from rich.console import Console

    from emp_callbacks.finished.export import Source
    from emp_callbacks.finished.weights_file import ExportReport
    from emp_callbacks.study.once.study import OnceStudy

__all__ = ["main"]

USAGE_ERROR, INTERRUPTED = 2, 130

_HELP = """\
usage: emp COMMAND [options]

Effective Model Pruning during training: run recipes, compare ways of pruning, look at weights.

commands:
  fit       train a recipe
  validate  evaluate a recipe's model on its validation split
  test      evaluate a recipe's model on its test split
  compare   train a recipe with several ways of pruning and several seeds, and report
  report    write the report of a finished study or of a single fit again
  inspect   show N_eff and what EMP would keep of a checkpoint or a timm model
  prune     prune a finished model once, and write its weights
  export    write the masked weights of a run as plain safetensors

studies on trained models, pruned once:
  sweep-beta        is beta = 1 where the metric begins to fall?
  compare-criteria  N_eff, metric and masks of every criterion on one model
  violations        the measured change of the loss beside every bound

examples:
  emp fit --config recipes/quickstart.yaml
  emp compare --config recipes/quickstart.yaml --out runs/quickstart
  emp inspect timm:resnet18 --pretrained
  emp export last.ckpt --out model.safetensors

options:
  -h, --help  show this message, or with a command that command's options
  --version   show the version
"""

_LIGHTNING_HELP = {
    "fit": """\
Train the model of a recipe, with the callbacks that the recipe names.

examples:
  emp fit --config recipes/quickstart.yaml
  emp fit --config recipes/quickstart.yaml --trainer.max_epochs 1 --model.init_args.lr 0.01
  emp fit --config recipes/quickstart.yaml --ckpt_path PATH     (continue from a checkpoint)
  emp fit --config recipes/quickstart.yaml --print_config       (show every setting, train nothing)

The study: section is for emp compare; it is checked here and otherwise ignored.""",
    "validate": """\
Evaluate a recipe's model on its validation split.

example:
  emp validate --config recipes/quickstart.yaml --ckpt_path PATH""",
    "test": """\
Evaluate a recipe's model on its test split.

example:
  emp test --config recipes/quickstart.yaml --ckpt_path PATH""",
}


def main(args: Sequence[str] | None = None) -> int:
    """Run one `emp` command and return its exit code: 0, 2 for a usage error, 130 after Ctrl-C."""
    words = list(sys.argv[1:] if args is None else args)
    if not words or words[0] in ("-h", "--help"):
        sys.stdout.write(_HELP)
        return 0 if words else USAGE_ERROR
    if words[0] == "--version":
        from emp_callbacks import __version__

        sys.stdout.write(f"emp {__version__}\n")
        return 0
    return _run(words[0], words[1:])


def _run(command: str, words: list[str]) -> int:
    """Run a command; what a user can put right is one line, anything else keeps its traceback."""
    if command not in _COMMANDS:
        import difflib

        near = difflib.get_close_matches(command, _COMMANDS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(_COMMANDS)}"
        return _complain(f"unknown command {command!r}; {hint}", USAGE_ERROR)
    try:
        _COMMANDS[command](words)
    except KeyboardInterrupt as stop:
        return _complain(str(stop) or "interrupted", INTERRUPTED)
    except Exception as error:
        message = _for_the_user(error)
        if message is None:
            raise
        return _complain(message, USAGE_ERROR)
    return 0


def _complain(message: str, code: int) -> int:
    sys.stderr.write(f"emp: {message}\n")
    return code


def _for_the_user(error: BaseException | None) -> str | None:
    """Return the message of an error about what the user gave: a file, or a value our own checks refused."""
    if error is None:
        return None
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    # Lightning has a word for a recipe that it cannot run.
    if _raised_by_us(error) or type(error).__name__ == "MisconfigurationException":
        return str(error)
    if _where_raised(error)[0] == "jsonargparse":  # it wraps what a class in the recipe said
        return _for_the_user(error.__cause__)
    return None


def _raised_by_us(error: BaseException) -> bool:
    """Return whether a `raise` of this package made the error, rather than a call in it that went wrong."""
    kinds = (OSError, ValueError, TypeError, ArithmeticError, NotImplementedError, ImportError)
    return isinstance(error, kinds) and _where_raised(error) == ("emp_callbacks", True)


def _where_raised(error: BaseException) -> tuple[str, bool]:
    """Return the package that an error comes from, and whether a `raise` statement there made it."""
    trace = error.__traceback__
    if trace is None:
        return "", False
    while trace.tb_next is not None:
        trace = trace.tb_next
    package = trace.tb_frame.f_globals.get("__name__", "").partition(".")[0]
    return package, trace.tb_frame.f_code.co_code[trace.tb_lasti] == dis.opmap["RAISE_VARARGS"]


def _lightning(command: str) -> Callable[[list[str]], None]:
    def run(words: list[str]) -> None:
        from emp_callbacks.study.recipe.recipe import run_lightning

        run_lightning(command, words, _LIGHTNING_HELP[command])

    return run


def _compare(words: list[str]) -> None:
    """Run a study and show what it found."""
    options, overrides = compare_parser().parse_known_args(words)
    from emp_callbacks.study.comparison import run_study, study_cells
    from emp_callbacks.study.recipe.recipe import Recipe
    from emp_callbacks.study.report.report import comparison_table, write_report

    console = _console()
    recipe = Recipe(options.config, overrides)
    if options.list_cells:
        console.print("\n".join(study_cells(recipe)), highlight=False)
        return
    out = Path(options.out or recipe.study.out or Path("runs", recipe.path.stem))
    results = run_study(recipe, out, overwrite=options.overwrite, only=options.only, console=console)
    if results is None:
        console.print(f"runs are left; the same command without --only merges all in {out} into one report")
        return
    report = write_report(results, out)
    console.print(comparison_table(results))
    console.print(f"report: {report}", highlight=False, soft_wrap=True)


def _sweep(words: list[str]) -> None:
    """Prune trained models for several beta."""
    options, overrides = sweep_parser().parse_known_args(words)
    from emp_callbacks.study.once.beta_sweep import BETAS, beta_sweep

    names = ("target", "criterion", "scope")
    settings = {name: value for name in names if (value := getattr(options, name)) is not None}
    study = beta_sweep(betas=options.betas or BETAS, tolerance=options.tolerance, overrides=settings)
    _run_once(study, options, overrides, words)


def _criteria(words: list[str]) -> None:
    """Prune trained models by every criterion."""
    options, overrides = criteria_parser().parse_known_args(words)
    from emp_callbacks.study.once.criteria_comparison import criteria_comparison

    study = criteria_comparison(
        targets=options.targets, density=options.density, batches=options.batches, scope=options.scope
    )
    _run_once(study, options, overrides, words)


def _violations(words: list[str]) -> None:
    """Measure losses beside their bounds."""
    options, overrides = violations_parser().parse_known_args(words)
    from emp_callbacks.study.once.beta_sweep import BETAS
    from emp_callbacks.study.once.violations import CRITERIA, violations

    study = violations(
        criteria=options.criteria or CRITERIA,
        betas=options.betas or BETAS,
        batches=options.batches,
        probes=options.probes,
        scope=options.scope,
    )
    _run_once(study, options, overrides, words)


def _run_once(study: OnceStudy, options: argparse.Namespace, overrides: list[str], words: Sequence[str]) -> None:
    """Run a study on trained models and show what it found."""
    from emp_callbacks.study.once.study import run_once_study
    from emp_callbacks.study.recipe.recipe import Recipe
    from emp_callbacks.study.report.page import print_page, write_page

    console, out = _console(), Path(options.out)
    results = run_once_study(
        study,
        [Recipe(path, overrides) for path in options.config],
        out,
        models=Path(options.models),
        seeds=options.seeds,
        overwrite=options.overwrite,
        console=console,
        words=[study.command, *words],
    )
    page = study.page(results)
    written = write_page(page, out, results)
    print_page(page, console)
    console.print(f"report: {written}", highlight=False, soft_wrap=True)


def _report(words: list[str]) -> None:
    """Write the report of a folder again."""
    folder = Path(report_parser().parse_args(words).folder)
    results, rows = folder / "results.json", folder / "emp_trajectory.jsonl"
    console = _console()
    if results.is_file():
        page = _report_of_study(results, console)
    elif rows.is_file():
        from emp_callbacks.study.report.report import write_trajectory_report
        from emp_callbacks.trajectory import Trajectory

        page = write_trajectory_report(Trajectory.read(rows).records(), folder, folder.name)
    else:
        raise FileNotFoundError(_nothing_to_report(folder))
    console.print(f"report: {page}", highlight=False, soft_wrap=True)


def _report_of_study(path: Path, console: Console) -> Path:
    from emp_callbacks.study.run_store import read_results

    results = read_results(path)
    if isinstance(results["study"], str):
        from emp_callbacks.study.once.studies import PAGES
        from emp_callbacks.study.report.page import print_page, write_page

        found = PAGES[results["study"]](results)
        print_page(found, console)
        return write_page(found, path.parent, results)
    from emp_callbacks.study.report.report import comparison_table, write_report

    written = write_report(results, path.parent)
    console.print(comparison_table(results))
    return written


def _nothing_to_report(folder: Path) -> str:
    if not folder.is_dir():
        return f"folder {folder} does not exist"
    below = [path.parent for name in ("results.json", "emp_trajectory.jsonl") for path in folder.rglob(name)]
    hint = f"; there is one in {min(below, key=lambda path: len(path.parts))}" if below else ""
    return f"{folder} holds neither results.json (emp compare) nor emp_trajectory.jsonl (emp fit){hint}"


def _inspect(words: list[str]) -> None:
    """Show what EMP would keep."""
    options = inspect_parser().parse_args(words)
    if options.data:
        _inspect_with_data(options)
        return
    for name in ("target", "criterion"):
        if getattr(options, name) is not None:
            raise ValueError(f"--{name} needs modules and data; name the recipe that builds them with --data RECIPE")
    from emp_callbacks.finished.inspection import inspect_model, load_model, report_json, report_table
    from emp_callbacks.pruning.signatures import nearly_all

    console = _console()
    beta, scope = 1.0 if options.beta is None else options.beta, options.scope or "global"
    loaded = load_model(options.source, pretrained=options.pretrained)
    rows = inspect_model(
        loaded.module,
        beta=beta,
        scope=scope,
        include=options.include or loaded.include,
        exclude=options.exclude,
    )
    settings = {"source": options.source, "beta": beta, "scope": scope}
    console.print(report_table(rows, f"{options.source}: scope {scope}, beta {beta:g}"))
    judged = rows[-1:] if scope == "global" else rows[:-1]
    alike = nearly_all([(row.name, row.n, row.n_eff_fraction) for row in judged], "magnitude")
    notes = [*loaded.notes, *_already_pruned(rows[-1].density), *alike]
    for note in notes:
        console.print(f"note: {note}", highlight=False, soft_wrap=True)
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
    console, steps = _console(), 2 * options.probes * options.batches
    with console.status(f"measuring: Tr(H) alone takes about {steps} training steps (--probes, --batches)"):
        found = certify_source(options.source, options.data, settings, batches=options.batches, probes=options.probes)
    console.print(layer_table(found.cost.events))
    console.print(cost_table(found))
    for note in found.notes:
        console.print(f"note: {note}", highlight=False, soft_wrap=True)
    if options.json:
        Path(options.json).write_text(certified_json(found))


def _already_pruned(density: float) -> list[str]:
    if density > 0.999:
        return []
    return [f"{1 - density:.1%} of these weights are zero already: N_eff is that of the rest, and keep prunes further"]


def _prune(words: list[str]) -> None:
    """Prune a finished model once."""
    options = prune_parser().parse_args(words)
    from emp_callbacks.finished.export import prune
    from emp_callbacks.trajectory import layer_table

    names = ("target", "criterion", "scope", "beta", "density", "include", "exclude")
    settings = {name: value for name in names if (value := getattr(options, name)) is not None}
    pruner, report = prune(
        _source(options),
        options.out,
        settings,
        batches=options.batches,
        shrink_units=options.shrink,
        overwrite=options.overwrite,
    )
    _console().print(layer_table(pruner.last_events))
    _print_export(report)


def _export(words: list[str]) -> None:
    """Write masked weights."""
    options = export_parser().parse_args(words)
    from emp_callbacks.finished.export import export

    report = export(_source(options), options.out, shrink_units=options.shrink, overwrite=options.overwrite)
    _print_export(report)


def _source(options: argparse.Namespace) -> Source:
    from emp_callbacks.finished.export import Source

    return Source(options.source, options.config, options.prefix, options.pretrained, options.input_size)


def _print_export(report: ExportReport) -> None:
    from emp_callbacks.finished.weights_file import report_lines, shrink_table

    console = _console()
    if report.shrunk and report.shrunk.layers:
        console.print(shrink_table(report.shrunk))
    console.print("\n".join(report_lines(report)), highlight=False, soft_wrap=True)


def _console() -> Console:
    from rich.console import Console

    # A pipe or a file has no width: tables there must not be cut at 80 columns.
    return Console() if sys.stdout.isatty() else Console(width=160)


_COMMANDS: dict[str, Callable[[list[str]], None]] = {
    **{command: _lightning(command) for command in _LIGHTNING_HELP},
    "compare": _compare,
    "sweep-beta": _sweep,
    "compare-criteria": _criteria,
    "violations": _violations,
    "report": _report,
    "inspect": _inspect,
    "prune": _prune,
    "export": _export,
}
