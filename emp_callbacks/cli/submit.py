"""`emp submit`: a training or a study as jobs for Slurm."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emp_callbacks.cli.console import say_first
from emp_callbacks.cli.new_parser import RECIPE, new_parser
from emp_callbacks.cli.recipes import cluster_file, find_recipe, with_files
from emp_callbacks.terminal import make_console

if TYPE_CHECKING:
    from emp_callbacks.study.recipe.recipe import Recipe
    from emp_callbacks.study.submission import Job

__all__ = ["submit", "submit_parser"]

_SAME_NAME = ("nodes", "time", "account", "partition", "mem")


def submit(words: list[str]) -> None:
    """Submit a training, or each training of a study and then its report."""
    options, overrides = submit_parser().parse_known_args(words)
    shipped = cluster_file("slurm_study.sbatch" if options.array else "slurm_fit.sbatch")
    script = Path(options.script or shipped)
    if not script.is_file():
        raise FileNotFoundError(f"script {script} does not exist; emp recipes cluster copies those of the package")
    _check_goes_with_array(options)
    own = [word for file in options.config[1:] for word in ("--config", file)] + overrides
    path = find_recipe(options.config[0])
    say_first(f"submit: reading {options.config[0]}")
    from emp_callbacks.study.quiet import SRUN
    from emp_callbacks.study.recipe.recipe import Recipe
    from emp_callbacks.study.submission import has_slurm, shell_lines
    from emp_callbacks.study.submission import submit as hand_over

    # What is wrong with the recipe shows now, not when the job begins.
    recipe = Recipe(path, with_files(own), called=options.config[0])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", SRUN)  # nothing trains here
        jobs = _study(recipe, options, script, own) if options.array else _fit(options, script, own)
    console, told = make_console(), _sbatch_options(recipe, options)
    if options.dry_run or not has_slurm():
        lines = [*shell_lines(jobs, told), "", f"# {script}", script.read_text(encoding="utf-8")]
        console.print("\n".join(lines), highlight=False, soft_wrap=True)
        if not options.dry_run:
            raise FileNotFoundError("there is no sbatch on this machine: nothing was submitted; the lines above do it")
        return
    for job, number in zip(jobs, hand_over(jobs, told), strict=True):
        console.print(f"job {number}: {job.what}", highlight=False)


def _check_goes_with_array(options: argparse.Namespace) -> None:
    for name in ("throttle", "out", "overwrite"):
        if getattr(options, name) and not options.array:
            raise ValueError(f"--{name} is for a study: add --array, or leave it out")
    if options.array and options.ckpt_path:
        raise ValueError("--ckpt_path is for one training, and each of a study starts anew: leave it out, or --array")


def _fit(options: argparse.Namespace, script: Path, words: Sequence[str]) -> list[Job]:
    from emp_callbacks.study.submission import Job

    resumed = ["--ckpt_path", options.ckpt_path] if options.ckpt_path else []
    return [Job(what="training", words=[str(script), options.config[0], *words, *resumed])]


def _study(recipe: Recipe, options: argparse.Namespace, script: Path, words: Sequence[str]) -> list[Job]:
    from emp_callbacks.study.submission import StudyPlan, study_jobs, write_cells

    per_node, nodes = _per_node(recipe, options) or 1, options.nodes or 1
    _check_processes(recipe.resolved()["trainer"], devices=("--gpus", per_node), num_nodes=("--nodes", nodes))
    out = Path(options.out or recipe.study.out or Path("runs", recipe.path.stem))
    plan = StudyPlan(recipe, out, per_node * nodes)
    if not options.dry_run:
        plan.open_folder(overwrite=options.overwrite)
    needs = plan.needs(anew=options.overwrite)
    file = write_cells(plan.cells, out, dry=options.dry_run)
    named = [str(file), "--config", options.config[0], "--out", str(out), *words]
    return study_jobs(plan.cells, needs, script, named, options.throttle)


def _check_processes(trainer: Mapping[str, Any], **started: tuple[str, int]) -> None:
    """Check that the jobs have the processes that the recipe asks for, before they have waited for their turn."""
    for name, (option, count) in started.items():
        if _number(trainer[name]) not in (None, count):
            raise ValueError(
                f"the study trains with trainer.{name}={trainer[name]}, and its jobs have {count}: "
                f"add {option} {trainer[name]}, or --trainer.{name} {count}"
            )


def _per_node(recipe: Recipe, options: argparse.Namespace) -> int | None:
    """Return how many processes a node starts: one for each GPU, or the recipe's devices on CPUs; None: not said."""
    return options.gpus if options.gpus != 0 else _number(recipe.resolved()["trainer"]["devices"]) or 1


def _number(value: Any) -> int | None:
    """Return a count as a recipe (2) or an option ("2") gives it; None where it is left to the machine or is a list."""
    return int(value) if isinstance(value, int) or (isinstance(value, str) and value.isdecimal()) else None


def _sbatch_options(recipe: Recipe, options: argparse.Namespace) -> list[str]:
    found = [f"--{name}={value}" for name in _SAME_NAME if (value := getattr(options, name)) is not None]
    if options.gpus is not None:
        found += [f"--gpus-per-node={options.gpus}", f"--ntasks-per-node={_per_node(recipe, options)}"]
    return [*found, *options.sbatch]


def submit_parser() -> argparse.ArgumentParser:
    """Return the options of `emp submit`."""
    parser = new_parser(
        "submit",
        "Submit a training to Slurm; with --array a study: an array of the trainings that need no other, arrays of "
        "those that follow, and a last job that merges all into one report.",
        """\
examples:
  emp submit --config gpt_stdlib --nodes 2 --gpus 8 --time 12:00:00 --account A
  emp submit --config gpt_stdlib --config cluster/zero3 --trainer.max_steps 100000
  emp submit --config quickstart --array --gpus 1 --throttle 8
  emp submit --config quickstart --array --gpus 0 --sbatch=--qos=low --dry-run

Any key of the recipe can follow as --KEY VALUE. The same command again submits what is left of a study.
The scripts are those of emp recipes cluster; one that was edited for a cluster is named with --script.""",
    )
    parser.add_argument(
        "-c",
        "--config",
        required=True,
        action="append",
        metavar="RECIPE",
        help=f"recipe: {RECIPE}; a second is laid over it",
    )
    parser.add_argument("--array", action="store_true", help="the study of the recipe, each training its own task")
    parser.add_argument("--out", metavar="DIR", help="folder of the study (default: study.out, or runs/RECIPE)")
    parser.add_argument("--overwrite", action="store_true", help="start the study anew; what DIR holds is moved aside")
    parser.add_argument("--throttle", type=int, metavar="N", help="at most N tasks of an array at a time")
    parser.add_argument("--ckpt_path", metavar="FILE", help="checkpoint that a training goes on from")
    parser.add_argument("--nodes", type=int, metavar="N", help="nodes of a job")
    parser.add_argument(
        "--gpus", type=int, metavar="N", help="GPUs per node, a process each; 0: trainer.devices on CPUs"
    )
    parser.add_argument("--time", metavar="LIMIT", help="time limit of a job, as sbatch has it")
    parser.add_argument("--mem", metavar="SIZE", help="memory per node, as sbatch has it")
    parser.add_argument("--account", metavar="NAME", help="account that pays")
    parser.add_argument("--partition", metavar="NAME", help="partition")
    parser.add_argument(
        "--sbatch", action="append", default=[], metavar="=OPTION", help="another option of sbatch: --sbatch=--qos=low"
    )
    parser.add_argument("--script", metavar="FILE", help="batch script of yours (default: that of the package)")
    parser.add_argument("--dry-run", action="store_true", help="show the lines for a shell and the script, do nothing")
    return parser
