"""The `emp` command: parses, calls, prints. Whatever is heavy is imported by the command that needs it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

from emp_callbacks.cli import check, finished, folder, recipes, study, submit, tokenize
from emp_callbacks.cli.console import warnings_in_lines
from emp_callbacks.cli.errors import for_the_user
from emp_callbacks.cli.stopping import outlive_time_signal, stopped_by, terminable
from emp_callbacks.terminal import any_output, printable

__all__ = ["COMMANDS", "main"]

USAGE_ERROR = 2

_HELP = """\
usage: emp COMMAND [options]

Effective Model Pruning during training: run recipes, compare ways of pruning,
look at weights, prune finished models.

commands:
  fit        train a recipe
  validate   evaluate a recipe's model on its validation split
  test       evaluate a recipe's model on its test split
  check      say what a recipe will do: memory, steps, files; trains nothing
  compare    train a recipe with several ways of pruning and seeds, and report
  submit     hand a training, or a whole study, to Slurm
  report     write the report of a finished study or of a single fit again
  recipes    list the recipes of the package, or copy one out to edit
  inspect    show N_eff and what EMP would keep: checkpoint, folder, timm model
  prune      prune a finished model once: a checkpoint, folder or timm model
  export     write the masked weights of a run as plain safetensors
  perplexity measure a language model in a Hugging Face folder of any size
  tokenize   write text as the tokens that a language model trains on

studies on trained models:
  sweep-beta        is beta = 1 where the metric begins to fall?
  compare-criteria  N_eff, metric and masks of every criterion on one model
  violations        the measured change of the loss beside every bound
  gates             heads chosen by EMP beside gates that learn

examples:
  emp fit --config quickstart
  emp compare --config quickstart --out runs/quickstart
  emp inspect timm:resnet18 --pretrained
  emp export last.ckpt --out model.safetensors
  emp prune llama --criterion wanda --text train.txt --out llama-pruned

A recipe is a YAML file, or the name of one that comes with the package.

options:
  -h, --help  show this message, or with a command that command's options
  --version   show the version

An error is one line; EMP_TRACEBACK=1 emp COMMAND ... shows where it was raised.
"""

COMMANDS: dict[str, Callable[[list[str]], None]] = {
    **{command: study.lightning(command) for command in study.LIGHTNING_HELP},
    "check": check.check,
    "compare": study.compare,
    "sweep-beta": study.sweep_beta,
    "compare-criteria": study.compare_criteria,
    "violations": study.violations,
    "gates": study.gates,
    "submit": submit.submit,
    "report": study.report,
    "recipes": recipes.recipes,
    "inspect": finished.inspect,
    "prune": finished.prune,
    "export": finished.export,
    "perplexity": folder.perplexity,
    "tokenize": tokenize.tokenize,
}


def main(args: Sequence[str] | None = None) -> int:
    """Run one `emp` command and return its exit code: 0, 2 for a usage error, 130 after Ctrl-C, 143 after SIGTERM."""
    if args is None:
        sys.path.append(os.getcwd())  # recipes name what is the user's own by 'module.name'; last: it hides no package
    with any_output():
        return _main(list(sys.argv[1:] if args is None else args))


def _main(words: list[str]) -> int:
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
    if command not in COMMANDS:
        import difflib

        near = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(COMMANDS)}"
        return _complain(f"unknown command {command!r}; {hint}", USAGE_ERROR)
    try:
        with terminable(), warnings_in_lines():
            if command != "fit":  # Lightning answers the signal in a fit, and only if nobody else does
                outlive_time_signal()
            COMMANDS[command](words)
            outlive_time_signal()
    except (KeyboardInterrupt, SystemExit) as stop:
        code = stopped_by(stop)
        if code is None:
            raise
        return _complain(_unfinished(command, stop), code)
    except Exception as error:
        message = for_the_user(error)
        if message is None:
            raise
        return _complain(message, USAGE_ERROR)
    return 0


def _unfinished(command: str, stop: BaseException) -> str:
    """Return what to say of a command that a signal ended, and how to go on."""
    if isinstance(stop, KeyboardInterrupt) and str(stop):  # a study knows how far it came
        return str(stop)
    if command == "fit":
        return "stopped: training did not finish; add --ckpt_path last to go on from its last checkpoint"
    return f"stopped: {command} did not finish; run the same command again"


def _complain(message: str, code: int) -> int:
    sys.stderr.write(f"emp: {printable(' '.join(message.split()))}\n")  # on one line, whatever a library said
    return code
