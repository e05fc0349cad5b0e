"""`emp check`: what a recipe will do, before hours are spent on it."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emp_callbacks.cli.console import say_first
from emp_callbacks.cli.new_parser import RECIPE, new_parser
from emp_callbacks.cli.recipes import find_recipe, with_files
from emp_callbacks.terminal import FittedTable, make_console, printable

if TYPE_CHECKING:
    import argparse

    from emp_callbacks.pruning.traffic import Bounds
    from emp_callbacks.study.recipe.foresight import Foresight, Pruning

__all__ = ["check", "check_parser"]

PROBLEMS = 2


def check_parser() -> argparse.ArgumentParser:
    """Return the options of `emp check`."""
    parser = new_parser(
        "check",
        "Say what a recipe will do, without training, a GPU, or memory for its model: sizes, memory of each rank, "
        "steps, refreshes and what they send, and where files go.",
        """\
examples:
  emp check --config llama/llama_1b
  emp check --config imagenet/vit_s16 --trainer.devices 4 --trainer.num_nodes 2 --json check.json

Any key of the recipe can follow as --KEY VALUE, and further --config FILE as for emp fit. The exit code is 0, or 2
with a line for each problem: data that are missing, a schedule that never asks for a refresh, too large a batch.""",
    )
    parser.add_argument(
        "-c",
        "--config",
        required=True,
        metavar="RECIPE",
        help=f"recipe: {RECIPE}; more may follow",
    )
    parser.add_argument("--json", metavar="FILE", help="also write what was found to a JSON file")
    parser.add_argument(
        "--patience",
        type=float,
        default=30,
        metavar="SECONDS",
        help="how long the data may take to be set up; beyond that they are not looked at (default: 30)",
    )
    return parser


def check(words: list[str]) -> None:
    """Say what a recipe will do; exit with 2 where it will not."""
    first, others = _first_config(words)
    options, overrides = check_parser().parse_known_args(first)
    path, overrides = find_recipe(options.config), with_files(["emp", *overrides, *others])[1:]
    say_first(f"check: reading {options.config}")
    from emp_callbacks.study.recipe.foresight import foresee
    from emp_callbacks.study.recipe.recipe import Recipe

    seen = foresee(Recipe(path, overrides, called=options.config), options.patience)
    make_console().print(_table(seen))
    if options.json:
        Path(options.json).write_text(json.dumps(as_data(seen), indent=1) + "\n")
    for kind, lines in (("warning", seen.warnings), ("problem", seen.problems)):
        for line in lines:
            sys.stderr.write(f"emp: {kind}: {printable(' '.join(line.split()))}\n")
    if seen.problems:
        raise SystemExit(PROBLEMS)


def _first_config(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the words without the second and further --config, and these: argparse would keep the last one alone."""
    first: list[str] = []
    others: list[str] = []
    known = False
    rest = iter(words)
    for word in rest:
        is_config = word in ("-c", "--config") or word.startswith("--config=")
        own = (
            [word] if "=" in word or not is_config else [word, *([following] if (following := next(rest, "")) else [])]
        )
        (others if is_config and known else first).extend(own)
        known = known or is_config
    return first, others


def as_data(seen: Foresight) -> dict[str, Any]:
    """Return what was found as plain data: bytes, counts, steps; null where something is not known."""
    strategy, length = seen.strategy, seen.length
    return {
        "model": seen.model,
        "built": seen.built,
        **vars(seen.sizes),
        "strategy": {"told": strategy.told, "ranks": strategy.ranks, "shards": strategy.shards},
        "memory_bytes": seen.memory,
        "data": vars(seen.data),
        "examples_per_step": seen.examples,
        "optimizer_steps": length.steps,
        "steps_of_epoch": length.steps_of_epoch,
        "epochs": length.epochs,
        "pruning": [_pruning_data(one, seen.sizes.parameters) for one in seen.prunings],
        "folders": [vars(folder) for folder in seen.folders],
        "warnings": seen.warnings,
        "problems": seen.problems,
    }


def _pruning_data(one: Pruning, parameters: int) -> dict[str, Any]:
    config, traffic = one.config, one.traffic
    names = ("target", "criterion_name", "scope", "mode")
    return {
        "name": one.name,
        **{name.removesuffix("_name"): getattr(config, name) for name in names},
        "layers": one.layers,
        "groups": one.groups,
        "components": one.components,
        "masked_weights": one.masked.weights,
        "masked_share": one.masked.weights / parameters,
        "refreshes": None if one.refreshes is None else list(one.refreshes),
        "collectives_per_refresh": list(traffic.collectives),
        "bytes_per_refresh": [most if math.isfinite(most) else None for most in traffic.nbytes],
    }


def _table(seen: Foresight) -> FittedTable:
    table = FittedTable(f"{seen.model}, built {seen.built}")
    table.add_column("")
    table.add_column("", words=True)
    sections = (
        _of_model(seen),
        *map(_of_pruning, seen.prunings),
        _of_memory(seen),
        _of_training(seen),
        _of_files(seen),
    )
    for section in sections:
        for row in section:
            table.add_row(*row)
        table.add_section()
    return table


Rows = Iterable[tuple[str, str]]


def _of_model(seen: Foresight) -> Rows:
    sizes = seen.sizes
    yield "parameters", f"{sizes.parameters:,}; {sizes.trained:,} are trained"
    masked = sum(one.masked.weights for one in seen.prunings)
    yield "under masks", f"{masked:,}, {masked / sizes.parameters:.1%}" if sizes.parameters else "0"


def _of_pruning(one: Pruning) -> Rows:
    config = one.config
    called = f"EMPCallback {one.name}".strip()
    applied = "observes only" if config.observe_only else f"mode {config.mode}"
    yield called, f"{config.target} by {config.criterion_name}, scope {config.scope}, {applied}"
    parts = "known from the first batch on" if one.components is None else f"{one.components:,} components"
    groups = "" if one.groups is None else f", {one.groups:,} {'group' if one.groups == 1 else 'groups'}"
    yield "  in", f"{one.layers:,} {'layer' if one.layers == 1 else 'layers'}: {parts}{groups}"
    yield "  refreshes", _refreshes(one)
    if one.traffic.sums:
        counts, nbytes = one.traffic.collectives, one.traffic.nbytes
        yield "  each sends", f"{_bounds(counts)} collectives, {_bounds(nbytes)} bytes from each rank"


def _refreshes(one: Pruning) -> str:
    steps = one.refreshes
    if steps is None:
        return f"{one.config.schedule.told}; how many is not known"
    if not steps:
        return "0"
    shown = [f"{step:,}" for step in steps]
    if len(shown) > 6:
        shown[3:-2] = ["..."]
    return f"{len(steps):,}, after {'step' if len(steps) == 1 else 'steps'} {', '.join(shown)}"


def _bounds(bounds: Bounds) -> str:
    if bounds.least == bounds.most:
        return f"{bounds.least:,}"
    return f"{bounds.least:,} to {bounds.most:,}" if math.isfinite(bounds.most) else f"{bounds.least:,} or more"


def _of_memory(seen: Foresight) -> Rows:
    yield "each rank holds", seen.strategy.told
    total = sum(nbytes for nbytes in seen.memory.values() if nbytes is not None)
    unit, name = (1e9, "GB") if total >= 1e8 else (1e6, "MB")
    for what, nbytes in seen.memory.items():
        if nbytes is None or nbytes:
            yield f"  {what}", "not known" if nbytes is None else f"{nbytes / unit:,.3f} {name}"
    yield "  in all", f"{total / unit:,.3f} {name}, without activations and what is gathered or copied for a while"


def _of_training(seen: Foresight) -> Rows:
    data, length = seen.data, seen.length
    batches = "" if data.batches is None else f", {data.batches:,} batches per rank and epoch"
    yield "data", f"{data.told}{batches}"
    if seen.examples is not None:
        ranks = seen.strategy.batches
        yield (
            "examples per step",
            f"{seen.examples:,} = {data.batch:,} x {ranks:,} ranks x {seen.accumulated:,} batches",
        )
    steps = "not known" if length.steps is None else f"{length.steps:,}"
    epochs = "" if length.epochs is None else f", {length.epochs:,} epochs of {length.steps_of_epoch:,}"
    yield "optimizer steps", f"{steps}{epochs}"


def _of_files(seen: Foresight) -> Rows:
    for folder in seen.folders:
        can = "" if folder.writable else ", not asked" if folder.writable is None else ", cannot be written"
        system = f" ({folder.file_system})" if folder.file_system else ""
        yield folder.what, f"{folder.path}{system}{can}"
