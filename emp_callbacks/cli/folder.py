"""The commands on Hugging Face folders that need not fit memory: `emp prune FOLDER --out FOLDER2`, `emp perplexity`."""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path

from emp_callbacks.cli.console import say_first
from emp_callbacks.cli.folder_options import perplexity_parser
from emp_callbacks.cli.freed_memory import give_freed_memory_back

__all__ = ["is_for_folders", "perplexity", "prune_folder"]

# Options that say what the model reads, and those that need all of it in memory.
_SHOWN = ("text", "images", "sounds", "eval_text")
_IN_MEMORY = ("config", "shrink", "uniform", "pretrained", "prefix", "input_size")
_OTHER_TARGETS = ("heads", "neurons", "experts", "kan_nodes", "features", "attention_edges")


def is_for_folders(options: argparse.Namespace) -> bool:
    """Return whether `emp prune` is asked for what is done block by block.

    Raises:
        ValueError: Texts, images or sounds are given for what is not.
    """
    from emp_callbacks.checkpoint.whole_output import is_folder

    source, out = Path(options.source), options.out
    folder = (source / "config.json").is_file() and find_spec("transformers") is not None
    given = [name for name in _IN_MEMORY if getattr(options, name) not in (None, False)]
    given += ["target"] * (options.target in _OTHER_TARGETS)
    fits = folder and not given and is_folder(out)
    if not (source.exists() or options.source.startswith("timm:")):
        raise FileNotFoundError(f"{source} does not exist; name a checkpoint, a folder, or timm:NAME")
    shown = [name for name in _SHOWN if getattr(options, name) is not None]
    if shown and not fits:
        option = f"--{shown[0].replace('_', '-')}"
        reason = f"with --{given[0].replace('_', '-')}" if given else f"for {source} and --out {out}"
        raise ValueError(
            f"{option} is read where the weights of a Hugging Face folder are pruned into a folder (--out NAME), not "
            f"{reason}"
        )
    return fits


def prune_folder(options: argparse.Namespace, loss_tolerance: float | None) -> None:
    """Prune a folder into another one; `loss_tolerance` looks for the budget."""
    from emp_callbacks.cli.folder_work import prune

    give_freed_memory_back()
    prune(options, loss_tolerance)


def perplexity(words: list[str]) -> None:
    """Measure the perplexity of a language model in a folder."""
    options = perplexity_parser().parse_args(words)
    say_first(f"perplexity: reading {options.source}")
    from emp_callbacks.cli.folder_work import measure

    give_freed_memory_back()
    measure(options)
