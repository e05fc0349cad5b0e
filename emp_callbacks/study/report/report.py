"""The report of a study: a table for the terminal, and one HTML file that opens offline."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from rich.console import Group
from rich.table import Table
from rich.text import Text

from emp_callbacks.pruning.signatures import nearly_all
from emp_callbacks.study.report import plots
from emp_callbacks.study.report.page import DASH, number, save_picture, template, write_html
from emp_callbacks.study.report.statistics import (
    MATCHED_TOLERANCE,
    ArmConvergence,
    ArmSummary,
    Convergence,
    Interval,
    PairedDifference,
    arm_names,
    convergence,
    fairness_checks,
    first_training_arm,
    missing_runs,
    runs_of,
    summarise,
)
from emp_callbacks.trajectory import Certificate, certificate_cells

Results = Mapping[str, Any]
SPACE = "\u00a0"

ARMS = {
    "dense": "trained without pruning: what the model can do with everything kept.",
    "one_shot": "trained like dense, then pruned once by N_eff after the last step, not trained further.",
    "one_shot_dynamic": "trained like dense; after the last step each sample keeps its own N_eff features.",
    "training_feedback": "masks recomputed by N_eff during training; what is pruned is still measured (weights keep "
    "training behind the mask) and may come back.",
    "training_project": "weights pruned at a refresh are set to zero and may grow back until the next one.",
    "training_freeze": "what is pruned stays pruned for good; N_eff is measured on the survivors: it compounds.",
    "training_dynamic": "from the first refresh on, each sample keeps its own N_eff features in every forward pass.",
    "fixed_magnitude": "the largest weights are kept, at a density set in advance to that of the first "
    "training arm: the same schedule without N_eff.",
    "random": "a fixed random mask at that same density: the control for the choice of what is kept.",
}
PLOT_TEXT = {
    "n_eff.png": "N_eff / N of the scores (of random scores in the arm random). Line: mean over seeds. Band: "
    "lowest to highest seed.",
    "metric_density.png": "Small markers: runs. Large markers: means with 95 % intervals. Line: dense.",
    "density.png": "Kept over all; constant between two refreshes.",
    "learning_curves.png": "Validation metric of the model as it is at that step, mask applied. Line: mean over "
    "seeds. Band: lowest to highest seed.",
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
        {"name": name, "text": PLOT_TEXT[name], "data": save_picture(draw(results), folder / name)}
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
        rows=[cells for row in summaries for cells in _table_rows(row, results, metric)],
        convergence=_convergence_section(results, metric),
        unit=" (%)" if metric.percent else "",
        points=" (points)" if metric.percent else "",
        images=images,
        checks=checks,
        failed=sum(not check.passed for check in checks),
        signatures=_signatures(
            [run.get("trajectory") or [] for arm in arm_names(results) for run in runs_of(results, arm)[:1]]
        ),
        missing=missing_runs(results),
        arms=[(arm, _color(arm), ARMS.get(arm, "an arm of this recipe.")) for arm in arm_names(results)],
        runs=[_run_row(run, results, metric) for arm in arm_names(results) for run in runs_of(results, arm)],
        layers=_layer_tables(runs_of(results, leader)[0].get("trajectory") or []) if leader else [],
        leader=leader,
        environment=results.get("environment", {}),
        command=results["study"].get("command") or f"emp compare --config {results['study'].get('recipe', '?')}",
    )
    return write_html(folder / "report.html", html)


def write_trajectory_report(records: Sequence[Mapping[str, Any]], folder: Path, title: str) -> Path:
    """Write `report.html` and `trajectory.png` of a single run into `folder` and return the HTML's path.

    Raises:
        ValueError: If `records` is empty.
    """
    figure = plots.plot_trajectory(records)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = (
        "N_eff / N, density, preserved mass and its tight bound; churn (changed mask bits over all); the density of "
        "each layer."
    )
    html = _template().render(
        kind="run",
        title=title,
        images=[{"name": "trajectory.png", "text": text, "data": save_picture(figure, folder / "trajectory.png")}],
        records=[_record_row(record) for record in records],
        signatures=_signatures([records]),
        layers=_layer_tables(records),
        last=_record_row(records[-1]),
    )
    return write_html(folder / "report.html", html)


def comparison_table(results: Results) -> Group:
    """Return the comparison of the arms for the terminal; where curves were recorded, that of convergence below."""
    found = convergence(results)
    tables = [_metric_table(results)]
    if found:
        tables.append(_convergence_table(results, found))
    return Group(*tables)


def _metric_table(results: Results) -> Table:
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
        for cells in _table_rows(row, results, metric):
            table.add_row(
                Text(cells["arm"]), f"{cells['mean']} {_plain(cells['interval'])}".strip(), cells["density"],
                f"{cells['difference']} {_plain(cells['difference_interval'])}".strip(), cells["p_holm"],
                Text(cells["verdict"], style=VERDICT_STYLE.get(cells["verdict"], "")), cells["seeds"],
                cells["seconds"],
            )  # fmt: skip
    return table


def _convergence_table(results: Results, found: Convergence) -> Table:
    metric = MetricFormat.of(results)
    table = Table(
        title=Text(f"Convergence: mean of {found.metric}{' (%)' if metric.percent else ''} over the training"),
        caption=f"first step at the last value of {found.baseline}, over the seeds that get there"
        * bool(found.baseline),
    )
    table.add_column("arm", no_wrap=True)
    for name in ("mean over training", f"difference to {found.baseline}", "p (Holm)"):
        table.add_column(Text(name), justify="right")
    table.add_column("verdict")
    for name in (_target_text(found, results, metric), "seeds there", "val - train loss"):
        table.add_column(Text(name), justify="right")
    for row in found.arms:
        cells = _convergence_row(row, found, metric)
        table.add_row(
            Text(row.arm), f"{cells['mean']} {_plain(cells['interval'])}",
            f"{cells['difference']} {_plain(cells['difference_interval'])}".strip(), cells["p_holm"],
            Text(cells["verdict"], style=VERDICT_STYLE.get(row.verdict or "", "")),
            cells["step"], cells["reached"], cells["gap"],
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
        return f"{leader} against {reference}: undecided ({verdict_text(row.difference, row.verdict)})."
    return f"{leader} against {reference}: {verdict_text(row.difference, row.verdict)}."


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
    text += f": {verdict_text(difference, row.verdict)}."
    return text + _once_remark(row, metric) + _density_remark(row, results)


def verdict_text(difference: PairedDifference, verdict: str | None) -> str:
    """Return the verdict with its reason, where there is no clear one."""
    if verdict in ("better", "worse"):
        return str(verdict)
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


def p_text(p: float | None) -> str:
    """Return a p-value with three decimals; a dash for None."""
    if p is None:
        return DASH
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def _equals(p: float) -> str:
    return p_text(p) if p < 0.001 else f"={SPACE}{p_text(p)}"


def _plain(cell: str) -> str:
    return "" if cell == DASH else cell.replace("[", r"\[")  # rich would read [..] as a style


def _once_remark(row: ArmSummary, metric: MetricFormat) -> str:
    if row.once_difference is None:
        return ""
    found = f"{metric.difference(row.once_difference.mean)} {metric.interval(row.once_difference, sign=True)}"
    said = verdict_text(row.once_difference, row.once_verdict)
    return f" Against {row.once}, which does the same once: {found}, {said}."


def _density_remark(row: ArmSummary, results: Results) -> str:
    densities = [run["density"] for run in runs_of(results, reference_arm(results)) if run["seed"] in row.seeds]
    if not densities or row.arm == "dense":
        return ""
    gap = row.density.mean - sum(densities) / len(densities)
    if abs(gap) <= MATCHED_TOLERANCE:
        return ""
    return f" Its density is {abs(gap):.3f} {'above' if gap > 0 else 'below'} that of {reference_arm(results)}."


def _table_rows(row: ArmSummary, results: Results, metric: MetricFormat) -> list[dict[str, str]]:
    """Return the cells of an arm and, where another arm than the reference does the same once, of that comparison."""
    own = {
        "arm": row.arm,
        "color": _color(row.arm),
        "mean": metric.number(row.metric.mean),
        "interval": metric.interval(row.metric) if row.metric.low is not None else DASH,
        "density": number(row.density.mean, 3),
        **_difference_cells(row.difference, metric),
        "seeds": str(row.metric.n),
        "seconds": number(row.seconds, 1),
        "verdict": "reference" if row.arm == reference_arm(results) else row.verdict or "no common seed",
    }
    if row.once_difference is None:
        return [own]
    against = {
        **dict.fromkeys(own, ""),
        "arm": f"{SPACE}{SPACE}against {row.once}",
        **_difference_cells(row.once_difference, metric),
        "seeds": str(row.once_difference.n),
        "verdict": str(row.once_verdict),
    }
    return [own, against]


def _convergence_section(results: Results, metric: MetricFormat) -> dict[str, Any] | None:
    found = convergence(results)
    if found is None:
        return None
    return {
        "metric": found.metric,
        "baseline": found.baseline,
        "target": _target_text(found, results, metric),
        "rows": [_convergence_row(row, found, metric) for row in found.arms],
    }


def _target_text(found: Convergence, results: Results, metric: MetricFormat) -> str:
    sign = "\u2265" if results["study"]["higher_is_better"] else "\u2264"
    return f"first step {sign}{SPACE}{metric.value(found.target)}" if found.target is not None else "first step"


def _convergence_row(row: ArmConvergence, found: Convergence, metric: MetricFormat) -> dict[str, str]:
    difference = row.difference
    return {
        "arm": row.arm,
        "color": _color(row.arm),
        "mean": metric.number(row.area.mean),
        "interval": metric.interval(row.area) if row.area.low is not None else DASH,
        **_difference_cells(difference, metric),
        "verdict": "reference" if row.arm == found.baseline else row.verdict or DASH,
        "step": number(row.first_step.mean if row.first_step else None, 0),
        "reached": f"{row.reached} of {row.seeds}" if found.target is not None else DASH,
        "gap": number(row.gap.mean if row.gap else None, 4, sign=True),
    }


def _difference_cells(difference: PairedDifference | None, metric: MetricFormat) -> dict[str, str]:
    if difference is None:
        return dict.fromkeys(("difference", "difference_interval", "p", "p_holm"), DASH)
    return {
        "difference": metric.number(difference.mean, sign=True),
        "difference_interval": metric.interval(difference, sign=True) if difference.low is not None else DASH,
        "p": p_text(difference.p_value),
        "p_holm": p_text(difference.p_holm),
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
        "tight_mass_bound": number(record.get("tight_mass_bound"), 4),
        "churn": number(record.get("churn"), 4),
        "regrown": f"{record.get('regrown', 0):,}",
    }


def _layer_tables(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
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
            "certificate": _certificate_cells(layer.get("certificate")),
        }
        for layer in layers
    ]


def _signatures(runs: Sequence[Sequence[Mapping[str, Any]]]) -> list[str]:
    """Return what the last refresh of each run warns of, each warning once."""
    found: dict[str, None] = {}
    for records in runs:
        step = max((record["step"] for record in records), default=None)
        last = [record for record in records if record["step"] == step and record.get("beta") is not None]
        groups = [(record["group"], record["n"], record["n_eff_fraction"]) for record in last]
        found |= dict.fromkeys(nearly_all(groups, last[0]["criterion"]) if last else ())
    return list(found)


def _certificate_cells(record: Mapping[str, Any] | None) -> tuple[str, str, str] | None:
    """Return what a certificate speaks of, its bound and what was measured."""
    if record is None:
        return None
    certificate = Certificate(**record)
    return (certificate.says, *certificate_cells(certificate))


def _color(arm: str) -> str:
    return plots.arm_style(arm).color


def _template() -> jinja2.Template:
    return template("report.html.j2")
