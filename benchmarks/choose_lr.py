"""Chooses the learning rate of a recipe by the validation metric of its dense model; the test part is never read.

    python benchmarks/choose_lr.py --config recipes/equal_density_resnet.yaml --lrs 3e-3 1e-2 3e-2
    python benchmarks/choose_lr.py --config recipes/equal_density_gpt.yaml --lrs 1e-3 3e-3 --trainer.max_steps 400

Trains the recipe without its callbacks, once per learning rate, from one seed that its study does not use, and
validates the final weights. Any setting of the recipe can follow as --KEY VALUE, such as a shorter training; what was
changed and how many steps were taken is printed and recorded. Writes <name of the recipe>.json with every value: the
best learning rate then goes into the recipe by hand.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from rich.console import Console
from rich.table import Table
from timing import machine

from emp_callbacks.study.recipe.recipe import Recipe

Row = dict[str, Any]


def main() -> None:
    options, overrides = _parser().parse_known_args()
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=r".*(does not have many workers|treespec, LeafSpec)")
    recipe = Recipe(options.config, overrides)
    if options.seed in recipe.study.seeds:
        raise SystemExit(f"--seed {options.seed} is a seed of the study {options.config}: choose another one")
    metric = recipe.study.metric.replace("test/", "val/", 1)
    rows = [train(options.config, lr, options.seed, metric, overrides) for lr in sorted(options.lrs)]
    result = {
        "recipe": options.config.name,
        "overrides": overrides,
        "seed": options.seed,
        "metric": metric,
        "higher_is_better": recipe.study.higher_is_better,
        "best_lr": best(rows, recipe.study.higher_is_better)["lr"],
        "rows": rows,
        "machine": machine(),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{options.config.stem}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    console = Console()
    console.print(table_of(result))
    if result["best_lr"] in (rows[0]["lr"], rows[-1]["lr"]):
        console.print(f"the best learning rate, {result['best_lr']:g}, is at an end of --lrs: try rates beyond it")
    console.print(f"written to {path}")


def train(config: Path, lr: float, seed: int, metric: str, overrides: Sequence[str]) -> Row:
    """Return the validation metric of the dense model after training with this learning rate; null if not finite."""
    pl.seed_everything(seed, workers=True, verbose=False)
    recipe = Recipe(config, [*overrides, "--model.init_args.lr", repr(lr)])
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    recipe.build_bare(enable_checkpointing=False, **quiet)
    started = time.perf_counter()
    recipe.trainer.fit(recipe.model, datamodule=recipe.datamodule)
    seconds, steps = time.perf_counter() - started, recipe.trainer.global_step
    (metrics,) = recipe.trainer.validate(recipe.model, datamodule=recipe.datamodule, verbose=False)
    if metric not in metrics:
        raise SystemExit(f"{metric} is not logged by the validation of {config}; logged: {', '.join(metrics)}")
    value = float(metrics[metric])
    return {"lr": lr, "value": value if math.isfinite(value) else None, "steps": steps, "seconds": round(seconds, 1)}


def best(rows: Sequence[Row], higher_is_better: bool) -> Row:
    """Return the row with the best value; of equal ones the lowest learning rate."""
    finite = [row for row in rows if row["value"] is not None]
    if not finite:
        raise SystemExit("no learning rate gave a finite metric: try lower ones")
    return (max if higher_is_better else min)(finite, key=lambda row: row["value"])


def table_of(result: Row) -> Table:
    changed = " ".join(result["overrides"]) or "nothing changed"
    table = Table("learning rate", result["metric"], "steps", "seconds", title=f"{result['recipe']}, dense, {changed}")
    for row in result["rows"]:
        value = "not finite" if row["value"] is None else f"{row['value']:.4f}"
        mark = "  best" if row["lr"] == result["best_lr"] else ""
        table.add_row(f"{row['lr']:g}", value + mark, str(row["steps"]), f"{row['seconds']:.0f}")
    return table


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", type=Path, required=True, metavar="RECIPE")
    parser.add_argument("--lrs", type=float, nargs="+", required=True, metavar="LR", help="learning rates, > 0")
    parser.add_argument("--seed", type=int, default=1000, help="a seed that no study uses")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "choose_lr", metavar="DIR")
    return parser


if __name__ == "__main__":
    main()
