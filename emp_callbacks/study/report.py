"""The report of a study: a table for the terminal, and one HTML file that opens offline."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.figure import Figure
from rich.table import Table
from rich.text import Text

from emp_callbacks.study import plots
from emp_callbacks.study.statistics import (
    MATCHED_TOLERANCE,
    ArmSummary,
    Interval,
    PairedDifference,
    arm_names,
    fairness_checks,
    first_training_arm,
    missing_runs,
    runs_of,
    summarise,
)

Results = Mapping[str, Any]
MINUS, DASH, SPACE = "\u2212", "\u2013", "\u00a0"

ARMS = {
    "dense": "trained without pruning: what the model can do with all its weights.",
    "one_shot": "trained like dense, then pruned once by N_eff after the last step, not trained further.",
    "training_feedback": "masks recomputed by N_eff during training; pruned weights keep training behind the "
    "mask and may come back.",
    "training_project": "weights pruned at a refresh are set to zero and may grow back until the next one.",
    "training_freeze": "pruned weights stay zero for good; N_eff is measured on the survivors: it compounds.",
    "fixed_magnitude": "the largest weights are kept, at a density set in advance to that of the first "
    "training arm: the same schedule without N_eff.",
    "random": "a fixed random mask at that same density: the control for the choice of weights.",
}
PLOT_TEXT = {
    "n_eff.png": "N_eff / N of the scores (of random scores in the arm random). Line: mean over seeds. Band: "
    "lowest to highest seed.",
    "metric_density.png": "Small markers: runs. Large markers: means with 95 % intervals. Line: dense.",
    "density.png": "Kept weights over all weights; constant between two refreshes.",
    "learning_curves.png": "Validation metric of the model as it is at that step, mask applied.",
}
VERDICT_STYLE = {"better": "green", "worse": "red"}


@dataclass(frozen=True, slots=True)
class MetricFormat:
    """How values of the study's metric are written: accuracies in percent, everything else as it is."""

    percent: bool
    decimals: int

    @classmethod
    def of(cls, results: Results) -> MetricFormat:
        """Choose the format that suits all runs of `results`."""
        metric = results["study"]["metric"]
        values = [run["metrics"][metric] for run in results["runs"] if metric in run["metrics"]]
        largest = max((abs(value) for value in values if math.isfinite(value)), default=1.0)
        if "accuracy" in metric and all(0 <= value <= 1 for value in values):
            return cls(percent=True, decimals=2)
        return cls(percent=False, decimals=1 if largest >= 1000 else 2 if largest >= 10 else 4)

    def number(self, value: float | None, sign: bool = False) -> str:
        """Return the bare number, without unit; a dash for None."""
        scaled = None if value is None else value * (100 if self.percent else 1)
        return number(scaled, self.decimals, sign)

    def value(self, value: float) -> str:
        """Return a value with its unit."""
        return self.number(value) + (f"{SPACE}%" if self.percent else "")

    def difference(self, value: float) -> str:
        """Return a signed difference with its unit; differences of percentages are points."""
        return self.number(value, sign=True) + (f"{SPACE}points" if self.percent else "")

    def interval(self, interval: Interval | PairedDifference, sign: bool = False) -> str:
        """Return the interval in brackets, or that there is none."""
        if interval.low is None:
            return "(one seed, no interval)" if interval.n == 1 else "(no interval)"
        return f"[{self.number(interval.low, sign)}, {self.number(interval.high, sign)}]"


def write_report(results: Results, folder: Path) -> Path:
    """Write `report.html` and its PNGs into `folder` and return the path of the HTML file.

    The HTML holds the pictures and its style itself: it needs no network and no script.

    Raises:
        ValueError: If `results` cannot be summarised (see `statistics.check_results`).
    """
    folder = Path(folder)
    summaries = summarise(results)  # before anything is written: refused results leave no half report
    folder.mkdir(parents=True, exist_ok=True)
    checks = fairness_checks(results)
    images = [
        {"name": name, "text": PLOT_TEXT[name], "data": _save(draw(results), folder / name)}
        for name, draw in plots.STUDY_PLOTS.items()
    ]
    metric = MetricFormat.of(results)
    leader = first_training_arm(results)
    told = sorted(summaries, key=lambda row: row.arm != leader)  # the question first, the rest in study order
    html = _template().render(
        kind="study",
        title=f"Pruning during training: {results['study']['metric']}",
        study=results["study"],
        headline=headline(results, summaries),
        sentences=[(row.arm, _color(row.arm), answer(row, results, metric)) for row in told],
        rows=[_table_row(row, results, metric) for row in summaries],
        unit=" (%)" if metric.percent else "",
        points=" (points)" if metric.percent else "",
        images=images,
        checks=checks,
        failed=sum(not check.passed for check in checks),
        missing=missing_runs(results),
        arms=[(arm, _color(arm), ARMS.get(arm, "an arm of this recipe.")) for arm in arm_names(results)],
        runs=[_run_row(run, results, metric) for arm in arm_names(results) for run in runs_of(results, arm)],
        layers=_layer_tables(runs_of(results, leader)[0].get("trajectory") or []) if leader else [],
        leader=leader,
        environment=results.get("environment", {}),
        command=results["study"].get("command") or f"emp compare --config {results['study'].get('recipe', '?')}",
    )
    return _write(folder / "report.html", html)


def write_trajectory_report(records: Sequence[Mapping[str, Any]], folder: Path, title: str) -> Path:
    """Write `report.html` and `trajectory.png` of a single run into `folder` and return the HTML's path.

    Raises:
        ValueError: If `records` is empty.
    """
    figure = plots.plot_trajectory(records)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = "N_eff / N and density, churn (changed mask bits over all), and the density of each layer."
    html = _template().render(
        kind="run",
        title=title,
        images=[{"name": "trajectory.png", "text": text, "data": _save(figure, folder / "trajectory.png")}],
        records=[_record_row(record) for record in records],
        layers=_layer_tables(records),
        last=_record_row(records[-1]),
    )
    return _write(folder / "report.html", html)


def comparison_table(results: Results) -> Table:
    """Return the comparison of the arms for the terminal."""
    study, metric = results["study"], MetricFormat.of(results)
    direction = "higher" if study["higher_is_better"] else "lower"
    unit = " (%)" if metric.percent else ""
    table = Table(
        title=Text(f"{study['metric']}{unit}, {direction} is better"),
        caption="mean [95 % interval over seeds, per comparison]; verdicts by Holm-adjusted p < 0.05",
    )
    table.add_column("arm", no_wrap=True)
    for name in (study["metric"], "density", f"difference to {reference_arm(results)}", "p (Holm)"):
        table.add_column(Text(name), justify="right")
    table.add_column("verdict")
    table.add_column("seeds", justify="right")
    table.add_column("seconds", justify="right")
    for row in summarise(results):
        cells = _table_row(row, results, metric)
        style = VERDICT_STYLE.get(row.verdict or "", "")
        table.add_row(
            Text(row.arm), f"{cells['mean']} {_plain(cells['interval'])}", cells["density"],
            f"{cells['difference']} {_plain(cells['difference_interval'])}".strip(), cells["p_holm"],
            Text(cells["verdict"], style=style), cells["seeds"], cells["seconds"],
        )  # fmt: skip
    return table


def headline(results: Results, summaries: Sequence[ArmSummary]) -> str:
    """Answer the study's question in one sentence, for the first training arm."""
    reference = reference_arm(results)
    compared = [row for row in summaries if row.arm.startswith("training_") and row.arm != reference]
    if not compared:
        return "No arm that prunes during training was compared with another arm."
    row, leader = compared[0], compared[0].arm
    if row.difference is None:
        return f"{leader} and {reference} have no finished seed in common: no comparison yet."
    if row.verdict in ("better", "worse"):
        return f"{leader} is {row.verdict} than {reference}."
    if row.verdict == "undecided":
        return f"{leader} against {reference}: undecided ({verdict_text(row.difference, row)})."
    return f"{leader} against {reference}: {verdict_text(row.difference, row)}."


def answer(row: ArmSummary, results: Results, metric: MetricFormat) -> str:
    """Say in plain words what the runs of one arm show."""
    reference = reference_arm(results)
    at = f"{metric.value(row.metric.mean)} {metric.interval(row.metric)} at density {row.density.mean:.3f}"
    if row.arm == reference:
        return f"{at}; the reference."
    if row.difference is None:
        return f"{at}; no finished seed in common with {reference}."
    difference = row.difference
    found = f"{metric.difference(difference.mean)} {metric.interval(difference, sign=True)}"
    text = f"{at}; difference to {reference} {found}"
    if difference.p_value is not None:
        text += f", p{SPACE}{_equals(difference.p_value)}, Holm{SPACE}{p_text(difference.p_holm)}"
    text += f": {verdict_text(difference, row)}."
    return text + _density_remark(row, results)


def verdict_text(difference: PairedDifference, row: ArmSummary) -> str:
    """Return the verdict with its reason, where there is no clear one."""
    if row.verdict in ("better", "worse"):
        return str(row.verdict)
    if not math.isfinite(difference.mean):
        return "a run has no finite metric"
    if difference.n == 1:
        return "one seed in common, no test possible"
    if difference.p_value is None and difference.mean == 0:
        return f"the same result in all {difference.n} seeds"
    if difference.p_value is None:
        return f"the same difference in all {difference.n} seeds, p undefined"
    return f"no difference that these {difference.n} seeds can show"


def reference_arm(results: Results) -> str:
    """Return the arm with which the others are compared."""
    return str(results["study"].get("reference", "one_shot"))


def number(value: float | None, decimals: int, sign: bool = False) -> str:
    """Return `value` with a fixed number of decimals and a true minus; a dash for None."""
    if value is None:
        return DASH
    text = f"{value:{'+' if sign else ''}.{decimals}f}"
    if float(text) == 0:
        text = text.replace("-", "+" if sign else "")
    return text.replace("-", MINUS)


def p_text(p: float | None) -> str:
    """Return a p-value with three decimals; a dash for None."""
    if p is None:
        return DASH
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def _equals(p: float) -> str:
    return p_text(p) if p < 0.001 else f"={SPACE}{p_text(p)}"


def _plain(cell: str) -> str:
    return "" if cell == DASH else cell.replace("[", r"\[")  # rich would read [..] as a style


def _density_remark(row: ArmSummary, results: Results) -> str:
    densities = [run["density"] for run in runs_of(results, reference_arm(results)) if run["seed"] in row.seeds]
    if not densities or row.arm == "dense":
        return ""
    gap = row.density.mean - sum(densities) / len(densities)
    if abs(gap) <= MATCHED_TOLERANCE:
        return ""
    return f" Its density is {abs(gap):.3f} {'above' if gap > 0 else 'below'} that of {reference_arm(results)}."


def _table_row(row: ArmSummary, results: Results, metric: MetricFormat) -> dict[str, str]:
    difference = row.difference
    is_reference = row.arm == reference_arm(results)
    return {
        "arm": row.arm,
        "color": _color(row.arm),
        "mean": metric.number(row.metric.mean),
        "interval": metric.interval(row.metric) if row.metric.low is not None else DASH,
        "density": number(row.density.mean, 3),
        "difference": metric.number(difference.mean, sign=True) if difference else DASH,
        "difference_interval": metric.interval(difference, sign=True)
        if difference and difference.low is not None
        else DASH,
        "p": p_text(difference.p_value if difference else None),
        "p_holm": p_text(difference.p_holm if difference else None),
        "seeds": str(row.metric.n),
        "seconds": number(row.seconds, 1),
        "verdict": "reference" if is_reference else row.verdict or "no common seed",
    }


def _run_row(run: Mapping[str, Any], results: Results, metric: MetricFormat) -> dict[str, str]:
    return {
        "arm": run["arm"],
        "color": _color(run["arm"]),
        "seed": str(run["seed"]),
        "value": metric.number(run["metrics"].get(results["study"]["metric"])),
        "loss": number(run["metrics"].get("test/loss"), 4),
        "density": number(run["density"], 4),
        "keep": f"{run['keep']:,}" if run.get("keep") is not None else DASH,
        "n": f"{run['n']:,}" if run.get("n") is not None else DASH,
        "steps": str(run.get("steps", DASH)),
        "refreshes": str(run.get("refreshes", DASH)),
        "seconds": number(run.get("seconds"), 1),
        "init": str(run.get("init_digest") or DASH)[:8],
        "batches": str(run.get("batches_digest") or DASH)[:8],
        "fingerprint": str(run.get("fingerprint") or DASH)[:8],
    }


def _record_row(record: Mapping[str, Any]) -> dict[str, str]:
    return {
        **{key: str(record.get(key, DASH)) for key in ("step", "epoch", "group", "mode", "criterion", "scope", "note")},
        "n": f"{record['n']:,}",
        "keep": f"{record['keep']:,}",
        "n_eff": f"{record['n_eff']:,.1f}",
        "n_eff_fraction": number(record["n_eff_fraction"], 4),
        "density": number(record["density"], 4),
        "preserved_mass": number(record.get("preserved_mass"), 4),
        "mass_bound": number(record.get("mass_bound"), 4),
        "churn": number(record.get("churn"), 4),
        "regrown": f"{record.get('regrown', 0):,}",
    }


def _layer_tables(records: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Return the layers of the last refresh, over all its groups."""
    last = max((record["step"] for record in records), default=None)
    layers = [layer for record in records if record["step"] == last for layer in record.get("layers") or []]
    return [
        {
            "name": layer["name"],
            "n": f"{layer['n']:,}",
            "n_eff": f"{layer['n_eff']:,.1f}",
            "keep": f"{layer['keep']:,}",
            "density": number(layer["density"], 4),
            "width": f"{100 * min(1.0, max(0.0, layer['density'])):.1f}",
            "preserved_mass": number(layer.get("preserved_mass"), 4),
        }
        for layer in layers
    ]


def _color(arm: str) -> str:
    return plots.arm_style(arm).color


def _save(figure: Figure, path: Path) -> str:
    figure.savefig(path)
    return base64.b64encode(path.read_bytes()).decode("ascii")


def _write(path: Path, html: str) -> Path:
    path.write_text(html, encoding="utf-8")
    return path


@cache
def _template() -> jinja2.Template:
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("report.html.j2")
