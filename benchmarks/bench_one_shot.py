"""EMP once on trained networks: how many components N_eff keeps, and what that does to the metric, for several beta.

    OMP_NUM_THREADS=1 python benchmarks/bench_one_shot.py --out benchmarks/results

Networks of the EMP paper (arXiv:2509.25606) on Fashion-MNIST and a GPT-2 on Python's own documentation are trained
densely, once per seed; the trained weights are kept in --cache and reused. Each is then pruned once for every beta,
without further training, and tested. Writes one_shot.json and one_shot.png. Training takes about 8 minutes per seed
on one CPU core.
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import os
import platform
import shlex
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

import pytorch_lightning as pl
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

import emp_callbacks.study.networks  # noqa: F401  (registers emp_fc2, ... with timm)
from emp_callbacks import EMPPruner
from emp_callbacks.study.data import FashionMNISTData, InMemoryData, TextData
from emp_callbacks.study.tasks import ImageClassification, LanguageModel

BETAS = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
# arXiv:2509.25606: FC2 on MNIST, global weight magnitude, beta = 1.
PAPER = {"network": "FC2", "data": "MNIST", "beta": 1.0, "sparsity": 0.3697, "change": 0.02}

Row = dict[str, Any]
Make = Callable[["Sizes"], tuple[pl.LightningModule, InMemoryData]]


@dataclass(frozen=True)
class Sizes:
    """What --quick and --folder change."""

    quick: bool
    folder: str


@dataclass(frozen=True)
class Network:
    """How one network is trained and tested; `make` also gives its data."""

    name: str
    title: str
    make: Make
    trainer: dict[str, Any]
    quick: dict[str, Any]
    metric: str = "accuracy"


def image_network(name: str, title: str, epochs: int = 5, model: str = "", **settings: Any) -> Network:
    def make(sizes: Sizes) -> tuple[pl.LightningModule, InMemoryData]:
        task = ImageClassification(model or name, weight_decay=0.0, **settings)
        limit = 6_400 if sizes.quick else None
        return task, FashionMNISTData(sizes.folder, batch_size=128, limit_train=limit)

    return Network(name, title, make, {"max_epochs": epochs}, {"max_epochs": 1})


def language_model(sizes: Sizes) -> tuple[pl.LightningModule, InMemoryData]:  # noqa: ARG001
    # The sizes of recipes/gpt_stdlib.yaml.
    task = LanguageModel(n_layer=4, n_head=4, n_embd=96, sequence_length=64, lr=3e-3, warmup_fraction=0.05)
    return task, TextData(sequence_length=64, batch_size=8)


NETWORKS = (
    # The paper's batch size, epochs and learning rate, which it holds constant; a cosine follows it here.
    image_network("emp_fc2_short", "FC2, 5 epochs, rate 1e-4", model="emp_fc2", lr=1e-4),
    image_network("emp_fc2", "FC2, 20 epochs, rate 1e-3", epochs=20),
    image_network("emp_fc5", "FC5, Fashion-MNIST"),
    image_network("emp_fc12", "FC12, Fashion-MNIST", lr=5e-4),
    # Normalised pixels lie in [-0.81, 2.02].
    image_network("emp_kan", "KAN, Fashion-MNIST", model_args={"grid_range": [-2.1, 2.1]}),
    Network(
        "gpt2",
        "GPT-2 (4 blocks), Python's docs",
        language_model,
        {"max_steps": 1800, "gradient_clip_val": 1.0},
        {"max_steps": 60, "gradient_clip_val": 1.0},
        metric="perplexity",
    ),
)
ALL = tuple(network.name for network in NETWORKS)
FULLY_CONNECTED = ("emp_fc2_short", "emp_fc2", "emp_fc5", "emp_fc12")


@dataclass(frozen=True)
class Way:
    """One way of pruning: what the components are, how they are scored, where they compete, and on which networks."""

    target: str
    criterion: str
    scope: str
    color: str
    networks: tuple[str, ...] = ALL

    @property
    def label(self) -> str:
        return f"{self.target} x {self.criterion}, {self.scope}"


WAYS = (
    Way("weights", "magnitude", "global", "#0072B2"),
    Way("weights", "magnitude", "row", "#009E73"),
    Way("neurons", "weight_norm", "tensor", "#8C564B", FULLY_CONNECTED),
    Way("neurons", "weight_norm", "global", "#D55E00", FULLY_CONNECTED),
    Way("heads", "weight_norm", "global", "#CC79A7", ("gpt2",)),
    Way("kan_nodes", "spline", "global", "#E69F00", ("emp_kan",)),
)
TARGETS = tuple(dict.fromkeys(way.target for way in WAYS))


@dataclass
class Trained:
    """A trained network with its test results, and what else one needs to test it again."""

    task: pl.LightningModule
    data: InMemoryData
    weights: dict[str, torch.Tensor]
    metrics: dict[str, float]
    seconds: float
    reused: bool
    trainer: pl.Trainer

    def test(self) -> dict[str, float]:
        (metrics,) = self.trainer.test(self.task, datamodule=self.data, verbose=False)
        return {name: float(value) for name, value in metrics.items()}


def trained(network: Network, seed: int, sizes: Sizes, cache: Path, on_step: Callable[[int, int], None]) -> Trained:
    """Train the network, or read what an earlier call with the same settings has trained."""
    pl.seed_everything(seed, workers=True, verbose=False)
    task, data = network.make(sizes)
    lengths = network.quick if sizes.quick else network.trainer
    unused = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    quiet: dict[str, Any] = {**dict.fromkeys(unused, False), "limit_val_batches": 0, "callbacks": [Steps(on_step)]}
    trainer = pl.Trainer(accelerator="cpu", devices=1, **quiet, **lengths)
    settings = json.dumps([dict(task.hparams), lengths, data.batch_size, sizes.quick], sort_keys=True)
    path = cache / f"{network.name}{'-quick' if sizes.quick else ''}-seed{seed}.pt"
    saved = torch.load(path, weights_only=True) if path.is_file() else {}
    if saved.get("settings") == settings:
        kept = {name: saved[name] for name in ("weights", "metrics", "seconds")}
        return Trained(task, data, **kept, reused=True, trainer=trainer)
    started = time.perf_counter()
    trainer.fit(task, datamodule=data)
    seconds = time.perf_counter() - started
    weights = {name: value.detach().clone() for name, value in task.state_dict().items()}
    result = Trained(task, data, weights, {}, seconds, reused=False, trainer=trainer)
    result.metrics = result.test()
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"settings": settings, "weights": weights, "metrics": result.metrics, "seconds": seconds}, path)
    return result


class Steps(pl.Callback):
    """Tells how far the training is."""

    def __init__(self, on_step: Callable[[int, int], None]) -> None:
        self._on_step = on_step

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:  # noqa: ARG002
        self._on_step(trainer.global_step, int(trainer.estimated_stepping_batches))


def prune_once(network: Network, seed: int, dense: Trained, way: Way, beta: float) -> Row:
    """Return what one EMP step with this beta does to the dense weights."""
    dense.task.load_state_dict(dense.weights)
    pruner = EMPPruner(
        dense.task, mode="project", target=way.target, criterion=way.criterion, scope=way.scope, beta=beta
    )
    events = pruner.refresh()
    pruner.finalize()
    n, keep = sum(event.n for event in events), sum(event.keep for event in events)
    before, after = dense.metrics, dense.test()
    metric = f"test/{network.metric}"
    return {
        "network": network.name,
        "seed": seed,
        **{name: value for name, value in asdict(way).items() if name in ("target", "criterion", "scope")},
        "beta": beta,
        "n": n,
        "n_eff": sum(event.n_eff for event in events),
        "n_eff_fraction": sum(event.n_eff for event in events) / n,
        "keep": keep,
        "density": keep / n,
        "sparsity": 1 - keep / n,
        # Groups have their own mass: their mean, weighted by their components.
        "preserved_mass": sum(event.preserved_mass * event.n for event in events) / n,
        "mass_bound": events[0].mass_bound if len(events) == 1 else None,
        "metric": network.metric,
        "before": before[metric],
        "after": after[metric],
        "change": change(network.metric, before[metric], after[metric]),
        "loss_before": before["test/loss"],
        "loss_after": after["test/loss"],
    }


def change(metric: str, before: float, after: float) -> float:
    """Return points of accuracy gained, or the factor on perplexity."""
    return after / before if metric == "perplexity" else 100 * (after - before)


def measure(options: argparse.Namespace, console: Console) -> tuple[list[Row], list[Row]]:
    """Return one row per training, and one per training, way and beta."""
    networks = [network for network in NETWORKS if network.name in options.networks]
    ways = [way for way in WAYS if way.target in options.targets]
    sizes = Sizes(options.quick, options.folder)
    trainings: list[Row] = []
    rows: list[Row] = []
    columns = (TextColumn("{task.description:<34}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bars:
        all_bar = bars.add_task("networks x seeds", total=len(networks) * len(options.seeds))
        step_bar = bars.add_task("", total=None)
        for network in networks:
            for seed in options.seeds:
                bars.reset(step_bar, description=f"train {network.name}, seed {seed}", total=None)
                dense = trained(network, seed, sizes, options.cache, partial(show, bars, step_bar))
                trainings.append(training_row(network, seed, dense))
                console.print(training_line(trainings[-1]), highlight=False)
                own = [(way, beta) for way in ways if network.name in way.networks for beta in options.betas]
                bars.reset(step_bar, description=f"prune {network.name}, seed {seed}", total=len(own))
                for way, beta in own:
                    rows.append(prune_once(network, seed, dense, way, beta))
                    bars.advance(step_bar)
                bars.advance(all_bar)
    return trainings, rows


def show(bars: Progress, bar: TaskID, step: int, total: int) -> None:
    bars.update(bar, completed=step, total=total)


def training_row(network: Network, seed: int, dense: Trained) -> Row:
    return {
        "network": network.name,
        "seed": seed,
        "parameters": sum(value.numel() for value in dense.weights.values()),
        "metric": network.metric,
        "value": dense.metrics[f"test/{network.metric}"],
        "loss": dense.metrics["test/loss"],
        "seconds": round(dense.seconds, 1),
        "reused": dense.reused,
    }


def training_line(row: Row) -> str:
    where = "trained earlier" if row["reused"] else "trained"
    return f"{row['network']} seed {row['seed']}: {row['metric']} {row['value']:.4f}, {where} in {row['seconds']:.0f} s"


# ---- tables ---------------------------------------------------------------------------------------------------------


def by_beta(rows: Iterable[Row]) -> dict[float, list[Row]]:
    groups: dict[float, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["beta"]].append(row)
    return dict(sorted(groups.items()))


def of(rows: Sequence[Row], network: str, way: Way) -> list[Row]:
    key = (network, way.target, way.criterion, way.scope)
    return [row for row in rows if (row["network"], row["target"], row["criterion"], row["scope"]) == key]


def average(rows: Sequence[Row], name: str) -> float:
    return mean(row[name] for row in rows)


def shown_change(metric: str, value: float) -> str:
    return f"x{value:.3f}" if metric == "perplexity" else f"{value:+.2f}"


def result_table(rows: Sequence[Row]) -> Table:
    """One line per network and way: N_eff and mass at beta = 1, and the change of the metric for each beta."""
    betas = list(by_beta(rows))
    table = Table(
        "network", "pruned", "N", "N_eff / N", "sparsity", "mass", "bound", *[f"{b:g}" for b in betas], "falls most"
    )
    table.title = "EMP once, after training (mean over seeds)"
    table.caption = (
        "sparsity, mass and its bound at beta = 1; under each beta the change of the metric: points of accuracy, or "
        "the factor on perplexity; last the two neighbouring beta between which the metric falls most"
    )
    for network in NETWORKS:
        for way in WAYS:
            if groups := by_beta(of(rows, network.name, way)):
                changes = [shown_change(network.metric, average(groups[beta], "change")) for beta in betas]
                table.add_row(network.name, way.label, *at_one(groups), *changes, steepest(network.metric, groups))
        table.add_section()
    return table


def at_one(groups: dict[float, list[Row]]) -> list[str]:
    """Return N, N_eff / N, sparsity, mass and its bound; the last three only where beta = 1 was measured."""
    every = next(iter(groups.values()))
    found = groups.get(1.0, [])
    bounds = [row["mass_bound"] for row in found if row["mass_bound"] is not None]
    figures = [average(found, name) if found else None for name in ("sparsity", "preserved_mass")]
    figures.append(mean(bounds) if bounds else None)
    shown = ["-" if figure is None else f"{figure:.3f}" for figure in figures]
    return [f"{every[0]['n']:,}", f"{average(every, 'n_eff_fraction'):.3f}", *shown]


def steepest(metric: str, groups: dict[float, list[Row]]) -> str:
    values = {beta: average(found, "after") for beta, found in groups.items()}
    steps = {(high, low): change(metric, values[high], values[low]) for low, high in pairwise(values)}
    if not steps:
        return "-"
    pick = max if metric == "perplexity" else min
    high, low = pick(steps, key=lambda pair: steps[pair])
    return f"{high:g} to {low:g}: {shown_change(metric, steps[high, low])}"


def beside_the_paper(rows: Sequence[Row]) -> Table:
    table = Table("FC2, weights x magnitude, global, beta = 1", "sparsity", "change of accuracy, points")
    table.add_row(f"paper, {PAPER['data']}", f"{PAPER['sparsity']:.2%}", f"{PAPER['change']}")
    for name in ("emp_fc2_short", "emp_fc2"):
        for row in by_beta(of(rows, name, WAYS[0])).get(1.0, []):
            what = f"{name}, Fashion-MNIST, seed {row['seed']}"
            table.add_row(what, f"{row['sparsity']:.2%}", f"{row['change']:+.2f}")
    return table


# ---- picture --------------------------------------------------------------------------------------------------------


def draw(rows: Sequence[Row]) -> Figure:
    """Draw metric (above) and density (below) against beta, one column per network; bands: min to max over seeds."""
    networks = [network for network in NETWORKS if any(row["network"] == network.name for row in rows)]
    figure = Figure(figsize=(1.2 + 3.4 * len(networks), 6.4), layout="constrained", dpi=130)
    panels = figure.subplots(2, len(networks), sharex=True, squeeze=False, height_ratios=[3, 2])
    for column, network in enumerate(networks):
        above, below = panels[:, column]
        above.set_title(network.title, loc="left", fontsize=10.5, fontweight="bold")
        draw_metric(above, network, rows)
        draw_lines(below, network, rows, "density")
        below.set(ylim=(0, 1.05), xlabel="beta (dashed: 1)", xticks=list(by_beta(rows)))
        below.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        for axes in (above, below):
            style(axes)
    panels[1, 0].set_ylabel("density (kept / all)")
    pairs = [pair for axes in panels[0] for pair in zip(*axes.get_legend_handles_labels(), strict=True)]
    handles = {label: handle for handle, label in pairs}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), frameon=False)
    return figure


def draw_metric(axes: Axes, network: Network, rows: Sequence[Row]) -> None:
    dense = [row["before"] for row in rows if row["network"] == network.name]
    axes.axhline(mean(dense), color="black", linewidth=1, label="dense")
    draw_lines(axes, network, rows, "after")
    better = "lower" if network.metric == "perplexity" else "higher"
    axes.set_ylabel(f"test {network.metric} ({better} is better)", fontsize=9)


def draw_lines(axes: Axes, network: Network, rows: Sequence[Row], name: str) -> None:
    for way in WAYS:
        groups = by_beta(of(rows, network.name, way))
        if not groups:
            continue
        values = [[row[name] for row in found] for found in groups.values()]
        axes.plot(list(groups), [mean(v) for v in values], color=way.color, marker="o", markersize=4, label=way.label)
        low, high = [min(v) for v in values], [max(v) for v in values]
        axes.fill_between(list(groups), low, high, color=way.color, alpha=0.2, linewidth=0)


def style(axes: Axes) -> None:
    axes.axvline(1.0, color="#888888", linestyle=(0, (4, 3)), linewidth=1, zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e6e6e6", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8.5)


# ---- command --------------------------------------------------------------------------------------------------------


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--quick", action="store_true", help="seed 0, one short training each: shows in two minutes that all works")
    add("--networks", nargs="+", choices=ALL, default=ALL, metavar="NAME", help=f"{', '.join(ALL)} (default: all)")
    add("--targets", nargs="+", choices=TARGETS, default=TARGETS, metavar="TARGET",
        help=f"what is pruned: {', '.join(TARGETS)} (default: all)")  # fmt: skip
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="SEED", help="one training each (default: 0 1 2)")
    add("--betas", nargs="+", type=float, default=BETAS, metavar="BETA", help=f"default: {' '.join(map(str, BETAS))}")
    add("--out", type=Path, default=Path("benchmarks/results"), metavar="FOLDER",
        help="for one_shot.json and one_shot.png; written anew (default: benchmarks/results)")  # fmt: skip
    add("--cache", type=Path, default=Path("runs/one_shot"), metavar="FOLDER",
        help="trained weights, reused where the settings are the same (default: runs/one_shot)")  # fmt: skip
    add("--folder", default="/usr/share/datasets/fashion-mnist",
        help="Fashion-MNIST's four files (default: where Debian's dataset-fashion-mnist has them)")  # fmt: skip
    options = parser.parse_args()
    if options.quick:
        options.seeds = options.seeds[:1]
    return options


def write(options: argparse.Namespace, trainings: Sequence[Row], rows: Sequence[Row]) -> Path:
    stem = "one_shot_quick" if options.quick else "one_shot"
    options.out.mkdir(parents=True, exist_ok=True)
    head = {
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "machine": {
            "platform": platform.platform(),
            "cpus": os.cpu_count(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
        },
        "paper": PAPER,
    }
    lists = {"trainings": trainings, "rows": rows}
    # One row a line: a change of one figure is one line of a diff.
    parts = [f'"{name}": {json.dumps(value)}' for name, value in head.items()]
    parts += [f'"{name}": [\n ' + ",\n ".join(map(json.dumps, value)) + "\n]" for name, value in lists.items()]
    path = options.out / f"{stem}.json"
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n")
    draw(rows).savefig(path.with_suffix(".png"))
    return path


def main() -> None:
    options = parse()
    warnings.filterwarnings("ignore", message=r".*does not have many workers|.*LeafSpec|.*`limit_val_batches=0`")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    console = Console(width=None if sys.stdout.isatty() else 170)
    trainings, rows = measure(options, console)
    console.print(result_table(rows))
    console.print(beside_the_paper(rows))
    console.print(f"wrote {write(options, trainings, rows)} and .png", highlight=False)


if __name__ == "__main__":
    main()
