"""The comparison at equal density over several studies: tables in Markdown and one picture.

python benchmarks/equal_density.py benchmarks/results/equal_density_*/results.json
python benchmarks/equal_density.py ... --pair A B  arm A minus arm B, paired by seed, at each density
python benchmarks/equal_density.py ... --full      every arm at every density: interval, Holm's p, equivalence
python benchmarks/equal_density.py ... --picture benchmarks/results/equal_density.png   (and _dark.png)
python benchmarks/equal_density.py --thin results.json   keep no more of each trajectory than the report shows, in place
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.spines import Spine
from matplotlib.text import Text

from emp_callbacks.study.report.arm_results import arm_of, label_of, labelled, prunes_by_n_eff, runs_of
from emp_callbacks.study.report.equal_density import Against, EqualDensityRow, equal_density
from emp_callbacks.study.report.metric_density import scale_values, spread_out
from emp_callbacks.study.report.metric_format import MetricFormat, p_text
from emp_callbacks.study.report.page import DASH, MINUS
from emp_callbacks.study.report.statistics import all_differences, equivalence, mean_interval
from emp_callbacks.study.report.styles import CARD, HEADING, INK, TEXT, arm_style, for_dark, style_axes

COLUMNS = {
    "one_shot": "one-shot",
    "one_shot_erk": "one-shot, ERK",
    "one_shot_finetune_lr": "one-shot, fine-tuned",
    "gmp": "GMP",
    "training_freeze": "EMP `freeze`",
    "training_feedback": "EMP `feedback`",
    "fixed_magnitude": "fixed density",
}
SPELLED_OUT = {
    "one_shot_erk": "one-shot ERK",
    "one_shot_finetune_lr": "one-shot + fine-tuning",
    "gmp": "gradual magnitude (GMP)",
}
TASKS = {
    "digits": "digits, Vision Transformer",
    "resnet": "Fashion-MNIST, ResNet",
    "gpt": "text, small GPT",
}
TICKS = (0.02, 0.05, 0.1, 0.2, 0.4)
DARK_PAGE = "#0d1117"  # of code hosts


def main() -> None:
    """Print the tables, draw the picture, or thin the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, help="results.json of `emp compare` with study.points")
    parser.add_argument("--full", action="store_true", help="every arm, with interval, p and equivalence")
    parser.add_argument("--pair", nargs=2, metavar=("A", "B"), help="arm A minus arm B at each density")
    parser.add_argument("--picture", type=Path, help="draw metric against density into this file")
    parser.add_argument("--thin", action="store_true", help="keep of trajectories what the report shows, in place")
    options = parser.parse_args()
    studies = {path: json.loads(path.read_text()) for path in options.results}
    if options.thin:
        for path, results in studies.items():
            path.write_text(json.dumps(thinned(results), separators=(",", ":")) + "\n")
    elif options.picture:
        draw([(name_of(path), results) for path, results in studies.items()], options.picture)
    elif options.pair:
        print(pair_table([(name_of(path), results) for path, results in studies.items()], *options.pair))
    elif options.full:
        print(full_table([(name_of(path), results) for path, results in studies.items()]))
    else:
        print(short_table([(name_of(path), results) for path, results in studies.items()]))


def name_of(path: Path) -> str:
    """Return what a study is called: its folder."""
    return path.parent.name.removeprefix("equal_density_")


def short_table(studies: list[tuple[str, dict[str, Any]]]) -> str:
    """Return mean +- SD of each arm, one row for each study and density."""
    lines = ["| task | density | " + " | ".join(COLUMNS.values()) + " |", "|---|---|" + "---|" * len(COLUMNS)]
    for name, results in studies:
        metric = MetricFormat.of(results)
        rows = {row.label: row for row in equal_density(results)}
        dense = mean_interval([run["metrics"][results["study"]["metric"]] for run in runs_of(results, "dense")])
        unit = "accuracy, %" if metric.percent else "perplexity"
        first = f"**{name}** ({unit}; dense {spread(metric, dense)})"
        for point in results["study"]["points"]:
            cells = []
            for arm in COLUMNS:
                row = rows.get(f"{arm} @ {point:g}")
                reached = row is not None and abs(row.density.mean - point) > 0.1 * point
                at = f" (at {row.density.mean:.3f})" if reached else ""
                cells.append(f"{spread(metric, row.metric)}{at}" if row is not None else DASH)
            lines.append(f"| {first} | {point:g} | " + " | ".join(cells) + " |")
            first = ""
    return "\n".join(lines)


def full_table(studies: list[tuple[str, dict[str, Any]]]) -> str:
    """Return every arm at every density against one-shot, and EMP's against the best arm of a given density."""
    lines = []
    for name, results in studies:
        metric, margin = MetricFormat.of(results), results["study"].get("margin")
        said = f", equivalence within ±{margin * (100 if metric.percent else 1):g}" if margin else ""
        seeds = len(results["study"]["seeds"])
        head = (
            "density | mean ± SD | against | difference [95 %] | Holm p | verdict | N / kept | FLOPs | training FLOPs"
        )
        lines += [f"### {name}: {results['study']['metric']}, {seeds} seeds{said}", "", f"| arm | {head} |"]
        lines += ["|---|---|---|---|---|---|---|---|---|---|"]
        for row in equal_density(results):
            own = f"| `{row.label}` | {row.density.mean:.3f} | {spread(metric, row.metric)} | "
            costs = " | ".join(
                DASH if value is None else f"{value:.2f}" for value in (row.compression, row.inference, row.training)
            )
            if row.one_shot is None:
                lines.append(f"{own}{DASH} | {DASH} | {DASH} | {DASH} | {costs} |")
                continue
            lines.append(f"{own}one-shot {against(metric, row.one_shot)} | {costs} |")
            if row.best is not None:
                lines.append(f"| | | | `{arm_of(row.best.label)}` {against(metric, row.best)} | | | |")
        lines.append("")
    return "\n".join(lines).rstrip()


def pair_table(studies: list[tuple[str, dict[str, Any]]], arm: str, other: str) -> str:
    """Return the difference of two arms at each density, paired by seed; p by Holm over the densities of a study.

    TOST p: of the hypothesis that they differ by more than the study's margin.
    """
    lines = [
        f"| task | density | `{arm}` | `{other}` | difference [95 %] | Holm p | TOST p |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, results in studies:
        metric, key = MetricFormat.of(results), results["study"]["metric"]
        values = {
            label: {run["seed"]: run["metrics"][key] for run in runs_of(results, label)} for label in labels(results)
        }
        points = [point for point in (None, *results["study"]["points"]) if labelled(arm, point) in values]
        pairs = [(labelled(arm, point), labelled(other, point)) for point in points]
        pairs = [(mine, theirs if theirs in values else other) for mine, theirs in pairs]
        found = all_differences(values, [pair for pair in pairs if pair[1] in values])
        for (mine, theirs), difference in found.items():
            if difference is None:
                continue
            cells = []
            for label in (mine, theirs):
                density = mean_interval([run["density"] for run in runs_of(results, label)]).mean
                cells.append(f"{spread(metric, mean_interval(list(values[label].values())))} (at {density:.3f})")
            shown = f"{metric.difference(difference.mean)} {metric.interval(difference, sign=True)}".replace(MINUS, "-")
            point = mine.partition(" @ ")[2] or "own"
            margin = results["study"].get("margin")
            alike = equivalence(difference, margin) if margin else None
            tests = f"{p_text(difference.p_holm)} | {p_text(alike.p_value if alike else None)}"
            lines.append(f"| {name} | {point} | {' | '.join(cells)} | {shown} | {tests} |")
    return "\n".join(lines)


def labels(results: dict[str, Any]) -> set[str]:
    """Return the labels of all runs."""
    return {label_of(run) for run in results["runs"]}


def against(metric: MetricFormat, found: Against) -> str:
    """Return the cells of a comparison: the other's mean, difference and interval, p, verdict."""
    shown = p_text(found.difference.p_holm)
    interval = metric.interval(found.difference, sign=True)
    difference = f"{metric.difference(found.difference.mean)} {interval}".replace(MINUS, "-")
    return f"{metric.number(found.metric)} | {difference} | {shown} | {found.verdict}"


def spread(metric: MetricFormat, found: Any) -> str:
    """Return mean +- SD as text."""
    deviation = "" if found.sd is None else f" ± {metric.number(found.sd)}"
    return f"{metric.number(found.mean)}{deviation}".replace(MINUS, "-")


def draw(studies: list[tuple[str, dict[str, Any]]], path: Path) -> None:
    """Draw metric against density, one panel for each study; and once more for dark pages, into NAME_dark.png."""
    figure = Figure(figsize=(9.6, 4.5), dpi=200, layout="constrained")
    axes = figure.subplots(1, len(studies), squeeze=False)[0]
    for axis, (name, results) in zip(axes, studies, strict=True):
        panel(axis, name, results)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, frameon=False, fontsize=TEXT, labelcolor=INK, ncols=4, loc="outside lower center",
        handlelength=3, columnspacing=1.6,
    )  # fmt: skip
    figure.savefig(path)
    darken(figure)
    figure.savefig(path.with_stem(f"{path.stem}_dark"))


def panel(axis: Axes, name: str, results: dict[str, Any]) -> None:
    """Draw one study."""
    style_axes(axis)
    metric, key = MetricFormat.of(results), results["study"]["metric"]
    factor = 100 if metric.percent else 1
    rows: list[EqualDensityRow] = equal_density(results)
    dense = factor * mean_interval([run["metrics"][key] for run in runs_of(results, "dense")]).mean
    axis.axhline(dense, color=INK, linewidth=1.4, label="dense")
    drawn = [dense]
    aside = spread_out(list(COLUMNS))
    for arm, label in COLUMNS.items():
        mine = sorted((row for row in rows if arm_of(row.label) == arm), key=lambda row: row.density.mean)
        mine = [row for i, row in enumerate(mine) if not i or row.density.mean - mine[i - 1].density.mean > 1e-4]
        look, means = arm_style(arm), [factor * row.metric.mean for row in mine]
        at, thick = [aside[arm] * row.density.mean for row in mine], arm == "one_shot"
        ends = [factor * np.array([row.metric.low, row.metric.high], dtype=float) for row in mine]
        errors = np.abs(np.array(ends).T - np.array(means)) if mine else None
        axis.errorbar(at, means, errors, fmt="none", ecolor=look.color, elinewidth=1.0, capsize=2, alpha=0.8, zorder=2)
        axis.plot(
            at, means, label=SPELLED_OUT.get(arm, label).replace("`", ""), color=look.color, linestyle=look.line,
            marker=look.marker, linewidth=4 if thick else 1.8, markersize=7 if thick else 6, zorder=2 if thick else 3,
            markerfacecolor=look.color if look.filled else CARD, markeredgecolor=CARD if look.filled else look.color,
            markeredgewidth=0.5 if look.filled else 1.4,
        )  # fmt: skip
        drawn += means
    axis.set_xscale("log")
    axis.set_xticks(TICKS, [f"{tick:g}" for tick in TICKS])
    axis.minorticks_off()
    margin = 0.06 * (max(drawn) - min(drawn))
    limits = (min(drawn) - margin, max(drawn) + margin)
    scaled = scale_values(axis, "y", drawn, limits, percent=metric.percent)
    if not scaled:  # a perplexity
        limits = (min(drawn) / 1.06, max(drawn) * 1.06)
        axis.set_yscale("log")
        axis.set_ylim(limits)
        marks = [mark for mark in (4, 5, 6, 8, 10, 15, 20, 30, 40) if limits[0] <= mark <= limits[1]]
        axis.set_yticks(marks, [str(mark) for mark in marks])
        axis.minorticks_off()
        scaled = "log scale"
    axis.set_title(TASKS.get(name, name), **HEADING)
    axis.set_xlabel("density (log scale)")
    said = f"{key.replace('/', ' ')}{' (%)' if metric.percent else ''}"
    better = "higher" if results["study"]["higher_is_better"] else "lower"
    axis.set_ylabel(f"{said}, {better} is better\n({scaled})")


def darken(figure: Figure) -> None:
    """Give everything in a figure the twin of its colour on a dark page."""
    figure.set_facecolor(DARK_PAGE)
    for axis in figure.axes:
        axis.set_facecolor(DARK_PAGE)
    for line in figure.findobj(Line2D):
        line.set(color=twin(line.get_color()))
        line.set(markerfacecolor=twin(line.get_markerfacecolor()), markeredgecolor=twin(line.get_markeredgecolor()))
    for text in figure.findobj(Text):
        text.set_color(twin(text.get_color()))
    for bars in figure.findobj(LineCollection):
        bars.set_color([twin(color) for color in bars.get_colors()])
    for spine in figure.findobj(Spine):
        spine.set_edgecolor(twin(spine.get_edgecolor()))


def twin(color: Any) -> str:
    """Return the twin of a colour on a dark page."""
    if isinstance(color, str) and color == "None":
        return color
    return DARK_PAGE if to_hex(color) == CARD else for_dark(to_hex(color))


def thinned(results: dict[str, Any]) -> dict[str, Any]:
    """Return results whose trajectories name single layers at the last refresh only.

    Of arms of a given density whose every layer has a row, the other refreshes are left out.
    """
    for run in results["runs"]:
        rows = run["trajectory"]
        last = max((row["step"] for row in rows), default=None)
        if rows and rows[0]["scope"] != "global" and not prunes_by_n_eff(run["arm"]):
            rows = [row for row in rows if row["step"] == last]
        run["trajectory"] = [row if row["step"] == last else {**row, "layers": []} for row in rows]
    return results


if __name__ == "__main__":
    main()
