"""What a refresh costs, beside the paper's sort, torch's own pruning and the passes over memory that nobody can save.

    python benchmarks/bench_refresh.py                          # all parts: about 20 minutes on two cores, 8 GB
    python benchmarks/bench_refresh.py --scale 0.05 --out DIR   # the same on a twentieth of the weights: two minutes
    python benchmarks/bench_refresh.py --only global growth     # these parts; the file's other parts stay
    python benchmarks/bench_refresh.py --draw                   # the picture again, from the stored file

Parts (--only):
    global  9 GPT-2 blocks, 64 million float32 weights, one vector of scores: against the paper's algorithm,
            torch.nn.utils.prune.global_unstructured at the same count, and the floor
    rows    the MLP of a Llama-7B block, a threshold for each row: against the paper's sort of each row
    ties    the global case with weights rounded to five levels, and in bfloat16
    memory  peak memory per weight, at 60 million and at a thousand million weights; each in a fresh process
    growth  seconds from 1e6 to 5e8 weights and the exponent of a power of them
    shards  two gloo ranks with FSDP2 shards, one thread each, against one process with one thread

"refresh" is all of `EMPPruner.refresh()`: scores, masks, masks applied, row of the trajectory, with older masks in
place. "selection" is the part that finds the masks. All ways of one part are timed in turn in one process, on the
same weights, which are put back before each; figures are medians. Every choice is checked against the paper's rule
in float64 before it is timed. "plain floor" is one sum of absolute values and one comparison for each tensor; "tight
floor" is the same by pieces that stay in cache, in memory that is there already. Writes refresh.json and refresh.png.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_communication import measure_shards
from contestants import (
    GPT2_BLOCK,
    Chosen,
    Subject,
    differences,
    flat_row,
    gpt2_like,
    llama_mlp,
    paper_global,
    paper_rows,
    plain_floor,
    refresh,
    select,
    selection,
    tight_floor,
    torch_prune,
)
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from scratch_memory import in_fresh_process, paper_memory, refresh_memory
from timing import Contestant, Row, in_turn, machine, medians, row
from torch import Tensor

from emp_callbacks.core.threshold import SAMPLE

Part = dict[str, Any]

OURS: dict[str, dict[str, Any]] = {
    "refresh": {"mode": "project"},
    "refresh, feedback": {"mode": "feedback"},
    "refresh, observe_only": {"observe_only": True},
}


# ---- seconds on the same weights ------------------------------------------------------------------------------------


def measure_global(options: argparse.Namespace) -> Part:
    subject = Subject(gpt2_like(options.scale * 9 * GPT2_BLOCK))
    chosen, found = check_global(subject)
    same_but_for_rounding(found)
    weights, threshold = list(subject.weights.values()), float(chosen.threshold_g1)
    others = {
        "paper's sort": Contestant(partial(paper_global, weights), subject.restore),
        "torch prune": torch_prune(subject, subject.size - chosen.keep),
        "plain floor": Contestant(partial(plain_floor, weights, threshold), subject.restore),
        "tight floor": Contestant(tight_floor(weights, threshold), subject.restore),
    }
    seconds = timed(ours(subject), others, found["keep"], options.repeats)
    rows = beside(seconds, "paper's sort", {"refresh": 25, "selection": 25}, at_least=True)
    rows += beside(seconds, "torch prune", {"refresh": 20, "selection": 20}, at_least=True)
    for floor in ("plain floor", "tight floor"):
        rows += beside(seconds, floor, {"refresh": 3, "selection": 3})
    return {**found, "median_seconds": medians(seconds), "seconds": seconds, "rows": rows}


def measure_rows(options: argparse.Namespace) -> Part:
    subject = Subject(llama_mlp(options.scale))
    weights = list(subject.weights.values())
    chosen = [Chosen(weight) for weight in weights]
    masks = first_masks(subject, "row")
    for way, own in masks.items():
        for each, weight, mask in zip(chosen, weights, own, strict=True):
            each.check(weight, mask, way)
    found = facts(subject, sum(each.keep for each in chosen), masks["refresh"], paper_rows(weights))
    same_but_for_rounding(found)
    thresholds = [each.threshold_g1 for each in chosen]

    def floor() -> list[Tensor]:
        return [mask for w, t in zip(weights, thresholds, strict=True) for mask in plain_floor([w], t)]

    others = {
        "paper's sort": Contestant(partial(paper_rows, weights), subject.restore),
        "plain floor": Contestant(floor, subject.restore),
    }
    seconds = timed(ours(subject, "row"), others, found["keep"], options.repeats)
    rows = beside(seconds, "paper's sort", {"refresh": 8, "selection": 8}, at_least=True)
    rows += beside(seconds, "plain floor", {"refresh": None, "selection": None})
    return {**found, "median_seconds": medians(seconds), "seconds": seconds, "rows": rows}


def measure_ties(options: argparse.Namespace) -> Part:
    changes: dict[str, Callable[[Tensor], Tensor]] = {
        "five levels": lambda weight: (weight / 0.02).round_().clamp_(-2, 2),
        "bfloat16": lambda weight: weight.bfloat16(),
    }
    parts = {name: measure_tied(options, change) for name, change in changes.items()}
    rows = [{**each, "what": f"{name}: {each['what']}"} for name, found in parts.items() for each in found["rows"]]
    return {"cases": parts, "rows": rows}


def measure_tied(options: argparse.Namespace, change: Callable[[Tensor], Tensor]) -> Part:
    subject = Subject(gpt2_like(options.scale * 9 * GPT2_BLOCK), change)
    _, found = check_global(subject)
    weights = list(subject.weights.values())
    others = {"paper's sort": Contestant(partial(paper_global, weights), subject.restore)}
    seconds = timed(ours(subject), others, found["keep"], options.repeats)
    rows = beside(seconds, "paper's sort", {"refresh": None, "selection": None}, at_least=True)
    return {**found, "median_seconds": medians(seconds), "seconds": seconds, "rows": rows}


def measure_growth(options: argparse.Namespace) -> Part:
    sizes = [options.scale * size for size in options.sizes]
    curve = [growth_at(size, options.repeats, with_paper=size <= options.paper_up_to) for size in sizes]
    rows = [row(f"exponent, from {curve[0]['weights']:,} weights", exponent(curve), 1.05, unit="")]
    large = [at for at in curve if at["weights"] > options.scale * 5e6]
    if len(large) > 1 and len(large) < len(curve):
        # Small models cost what any refresh costs, which hides growth: the larger ones alone show it.
        rows.append(row(f"exponent, from {large[0]['weights']:,} weights", exponent(large), 1.05, unit=""))
    for at in curve:
        seconds = at["median_seconds"]["refresh"]
        what = f"refresh of {at['weights']:,} weights: {seconds:.3g} s"
        rows.append(row(what, seconds / at["weights"] * 1e9, unit="ns per weight"))
    return {"curve": curve, "rows": rows}


def growth_at(size: float, repeats: int, *, with_paper: bool) -> Part:
    subject = Subject(gpt2_like(size))
    weights = list(subject.weights.values())
    contestants = {
        "refresh": refresh(subject, mode="project"),
        "tight floor": Contestant(tight_floor(weights, 0.01), subject.restore),
    }
    if with_paper:
        contestants["paper's sort"] = Contestant(partial(paper_global, weights), subject.restore)
    seconds = in_turn(contestants, repeats)
    return {"weights": subject.size, "median_seconds": medians(seconds), "seconds": seconds}


def exponent(curve: Sequence[Part]) -> float:
    """Return the slope of log seconds over log weights, by least squares."""
    if len(curve) < 2:
        return float("nan")
    points = [(at["weights"], at["median_seconds"]["refresh"]) for at in curve]
    log_weights, log_seconds = np.log(points).T
    return float(np.polyfit(log_weights, log_seconds, 1)[0])


def ours(subject: Subject, scope: str = "global") -> dict[str, Contestant]:
    ways = {name: refresh(subject, scope=scope, **how) for name, how in OURS.items()}
    return {**ways, "selection": selection(subject, scope)}


def timed(
    ways: dict[str, Contestant], others: dict[str, Contestant], keep: int, repeats: int
) -> dict[str, list[float]]:
    """Return the seconds of all; raise if a refresh of ours has come to do other work by being repeated."""
    seconds = in_turn({**ways, **others}, repeats)
    for name in OURS:
        ways[name].prepare()
        kept = sum(event.keep for event in ways[name].work())
        if kept != keep:
            raise RuntimeError(f"{name} keeps {kept:,} when repeated, {keep:,} at first")
    return seconds


def first_masks(subject: Subject, scope: str = "global") -> dict[str, list[Tensor]]:
    """Return the masks of every way of ours, from the dense weights; leaves those in place."""
    masks = {name: subject.masks(scope=scope, **how) for name, how in OURS.items()}
    subject.restore()
    return {**masks, "selection": select(subject, scope)}


def check_global(subject: Subject) -> tuple[Chosen, Part]:
    """Return what must be kept, and what the paper's code keeps beside it; raise if ours keeps anything else."""
    scores = flat_row(subject.dense)
    chosen, masks = Chosen(scores), first_masks(subject)
    for way, own in masks.items():
        chosen.check(scores, flat_row(own), way)
    del scores
    return chosen, facts(subject, chosen.keep, masks["refresh"], paper_global(list(subject.weights.values())))


def facts(subject: Subject, keep: int, ours: Sequence[Tensor], papers: Sequence[Tensor]) -> Part:
    """Return sizes and counts. The paper's code sums in float32 and keeps all equal scores: it may differ a bit."""
    return {
        "weights": subject.size,
        "dtype": str(subject.dense[0].dtype),
        "keep": keep,
        "paper_keeps": sum(int(mask.sum()) for mask in papers),
        "paper_differs_in": differences(ours, papers),
    }


def same_but_for_rounding(found: Part) -> None:
    if found["paper_differs_in"] > 1e-5 * found["weights"]:
        raise RuntimeError(f"the paper's masks differ from ours in {found['paper_differs_in']:,} weights")


def beside(
    seconds: dict[str, list[float]], other: str, targets: dict[str, float | None], *, at_least: bool = False
) -> list[Row]:
    """Return how many times as fast as another each of our ways is, or with a floor: how many times as slow."""
    median = medians(seconds)
    targets = {**targets, **{way: None for way in OURS if way in seconds and way not in targets}}
    rows = []
    for way, target in targets.items():
        value = median[other] / median[way] if at_least else median[way] / median[other]
        what = f"{other} / {way}" if at_least else f"{way} / {other}"
        rows.append(row(what, value, target, at_least=at_least))
    return rows


# ---- memory and shards ----------------------------------------------------------------------------------------------


def measure_memory(options: argparse.Namespace) -> Part:
    threads = torch.get_num_threads()
    sizes = [int(options.scale * size) for size in options.memory_sizes]
    refreshes = [in_fresh_process(refresh_memory, size, threads) for size in sizes]
    paper = in_fresh_process(paper_memory, sizes[0], threads)
    rows = []
    for at in refreshes:
        for which in ("first", "second"):
            # One byte per weight is the mask that stays: of the peak, only what lies above weights and mask is scratch.
            scratch = at[f"{which}_scratch"] = at[f"{which}_peak"] - 1
            rows.append(row(f"{which} refresh, {at['weights']:,} weights", scratch, 0.3, unit="bytes per weight"))
    paper["scratch"] = paper["peak"] - 1
    rows.append(row(f"paper's sort, {paper['weights']:,} weights", paper["scratch"], unit="bytes per weight"))
    largest = refreshes[-1]["weights"]
    needed = (paper["peak"] + 4) * largest / 1e9
    rows.append(row(f"paper's sort, {largest:,} weights: with the weights, at that rate", needed, unit="GB"))
    return {"refresh": refreshes, "paper": paper, "rows": rows}


def measure_over_ranks(options: argparse.Namespace) -> Part:
    sizes = [int(options.scale * size) for size in options.shard_sizes]
    found = measure_shards(sizes, "global", 2, options.repeats)
    found += measure_shards([max(sizes)], "row", 2, options.repeats)
    rows, largest = [], max(at["weights"] for at in found)
    for at in found:
        # Small models cost what any refresh costs, on one rank or two.
        target = 0.75 if at["weights"] == largest else None
        rows.append(row(f"2 ranks / 1 process, {at['scope']}, {at['weights']:,} weights", at["alone_ratio"], target))
    # Models too small for a bracket send less. Whether equal scores have to be told apart moves a few hundred bytes.
    sent = [at["bytes_per_refresh"] for at in found if at["scope"] == "global" and at["weights"] >= 4 * SAMPLE]
    if sent:
        rows.append(row("bytes reduced per refresh, global, most / least over sizes", max(sent) / min(sent), 1.01))
        rows.append(row("bytes reduced per refresh, global, at most", max(sent) / 1024, unit="KiB"))
    return {"figures": found, "rows": rows}


# ---- table and picture ----------------------------------------------------------------------------------------------


def table_of(name: str, found: Part) -> Table:
    table = Table("figure", "value", "unit", "target", "met", title=name)
    for each in found["rows"]:
        table.add_row(each["what"], f"{each['value']:.3g}", each["unit"], bound(each), verdict(each))
    if "median_seconds" in found:
        seconds = (f"{way} {median:.3g}" for way, median in found["median_seconds"].items())
        table.caption = f"{found['weights']:,} weights, median seconds: {'; '.join(seconds)}"
    return table


def bound(each: Row) -> str:
    return "" if each["target"] is None else f"{'>=' if each['at_least'] else '<='} {each['target']:g}"


def verdict(each: Row) -> str:
    return {None: "", True: "yes", False: "NO"}[each["met"]]


COLORS = {
    "paper's sort": "#D55E00",
    "torch prune": "#B5477A",
    "refresh": "#0072B2",
    "selection": "#2A90C8",
    "plain floor": "#5b6675",
    "tight floor": "#7D7D7D",
}
MARKERS = dict(zip(COLORS, "oPsD^v", strict=True))


def draw(parts: dict[str, Part]) -> Figure:
    """Draw seconds against weights, and the seconds of every way in the two large cases."""
    figure = Figure(figsize=(10.5, 4.4), layout="constrained", dpi=150)
    left, right = figure.subplots(1, 2, width_ratios=[1, 1])
    draw_growth(left, parts.get("growth", {}).get("curve", []))
    draw_seconds(right, {name: parts[name] for name in ("global", "rows") if name in parts})
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="both" if axes is left else "x", color="#e1e5ea", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=9.5)
        axes.minorticks_off()
    return figure


def draw_growth(axes: Axes, curve: Sequence[Part]) -> None:
    for way in ("paper's sort", "refresh", "tight floor"):
        points = [(at["weights"], at["median_seconds"][way]) for at in curve if way in at["median_seconds"]]
        if points:
            axes.plot(*zip(*points, strict=True), color=COLORS[way], marker=MARKERS[way], markersize=6, label=way)
    axes.set(xscale="log", yscale="log", xlabel="weights (float32)", ylabel="seconds, median")
    axes.set_title("Time against number of weights", loc="left", fontsize=11, fontweight="bold")
    if curve:
        axes.legend(frameon=False, fontsize=9.5)


def draw_seconds(axes: Axes, parts: dict[str, Part]) -> None:
    names = {"global": "one vector of scores", "rows": "a threshold for each row"}
    labels, longest = [], 1.0
    for name, found in parts.items():
        labels.append(f"{found['weights'] / 1e6:.0f} million weights,\n{names[name]}")
        for way in (way for way in COLORS if way in found["median_seconds"]):
            at, seconds = len(labels), found["median_seconds"][way]
            labels.append(way)
            axes.plot([seconds], [at], color=COLORS[way], marker=MARKERS[way], markersize=7, linestyle="")
            axes.annotate(
                f"{seconds:.2g} s", (seconds, at), (8, 0), textcoords="offset points", va="center", fontsize=9.5
            )
            longest = max(longest, seconds)
    axes.set_yticks(range(len(labels)), labels)
    for label in axes.get_yticklabels():
        if "million" in label.get_text():
            label.set_fontweight("bold")
    axes.set_ylim(len(labels) - 0.5, -0.8)
    axes.set(xscale="log", xlabel="seconds, median")
    axes.set_xlim(right=4 * longest)  # room for what is written
    axes.set_title("Time of every way", loc="left", fontsize=11, fontweight="bold")


# ---- command --------------------------------------------------------------------------------------------------------

PARTS: dict[str, Callable[[argparse.Namespace], Part]] = {
    "global": measure_global,
    "rows": measure_rows,
    "ties": measure_ties,
    "memory": measure_memory,
    "growth": measure_growth,
    "shards": measure_over_ranks,
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--only", nargs="+", choices=PARTS, metavar="PART", help="these parts alone (default: all)")
    add("--draw", action="store_true", help="draw refresh.png again from refresh.json, and measure nothing")
    add("--scale", type=float, default=1.0, help="factor on every number of weights (default: 1)")
    add("--repeats", type=int, default=5, help="timed repeats after one warm-up (default: 5)")
    add("--threads", type=int, default=2, help="of torch, in one process; a rank has one (default: 2)")
    add("--sizes", nargs="+", type=float, default=[1e6, 1e7, 1e8, 5e8], help="growth: numbers of weights")
    add("--paper-up-to", type=float, default=1e8, help="growth: most weights that the paper's sort is given")
    add("--memory-sizes", nargs="+", type=float, default=[6e7, 1e9], help="memory: numbers of weights")
    add("--shard-sizes", nargs="+", type=float, default=[1e6, 1e7, 1e8], help="shards: numbers of weights")
    add("--out", type=Path, default=Path("benchmarks/results"), metavar="FOLDER",
        help="for refresh.json and refresh.png (default: benchmarks/results)")  # fmt: skip
    return parser.parse_args()


def write(options: argparse.Namespace, parts: dict[str, Part]) -> Path:
    """Put the parts among those that the file holds, each with its machine and settings, and draw them all."""
    path = options.out / "refresh.json"
    options.out.mkdir(parents=True, exist_ok=True)
    before = json.loads(path.read_text()) if path.is_file() else {}
    head = {
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "machine": machine(),
        "scale": options.scale,
        "repeats": options.repeats,
    }
    everything = {**before, **{name: {**head, **found} for name, found in parts.items()}}
    ordered = {name: everything[name] for name in PARTS if name in everything}
    path.write_text(json.dumps(ordered, indent=1) + "\n")
    draw(ordered).savefig(path.with_suffix(".png"))
    return path


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    if options.draw:
        path = options.out / "refresh.json"
        draw(json.loads(path.read_text())).savefig(path.with_suffix(".png"))
        return
    console = Console(width=None if sys.stdout.isatty() else 130)
    parts = {}
    for name in options.only or PARTS:
        with console.status(f"{name} ..."):
            parts[name] = PARTS[name](options)
        write(options, {name: parts[name]})
        console.print(table_of(name, parts[name]))
    missed = [each["what"] for found in parts.values() for each in found["rows"] if each["met"] is False]
    console.print(f"{len(missed)} targets missed; wrote {options.out / 'refresh.json'} and .png", highlight=False)


if __name__ == "__main__":
    main()
