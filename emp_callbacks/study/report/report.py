"""The report of a study or of a single run: one HTML file that opens offline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from emp_callbacks.pruning.signatures import nearly_all
from emp_callbacks.study.arms import ARMS
from emp_callbacks.study.report import plots
from emp_callbacks.study.report.arm_results import (
    ArmSummary,
    Results,
    arm_names,
    arm_of,
    at_middle_point,
    first_training_arm,
    middle_point,
    missing_runs,
    points_of,
    prunes_by_n_eff,
    runs_of,
    summarise,
)
from emp_callbacks.study.report.cells import (
    color,
    convergence_row,
    equal_density_rows,
    layer_tables,
    record_row,
    run_row,
    table_rows,
    target_text,
)
from emp_callbacks.study.report.convergence import convergence
from emp_callbacks.study.report.equal_density import equal_density
from emp_callbacks.study.report.fairness import MATCHED_TOLERANCE, fairness_checks
from emp_callbacks.study.report.findings import findings
from emp_callbacks.study.report.metric_format import SPACE, MetricFormat, p_text, reference_arm, verdict_text
from emp_callbacks.study.report.page import drawn, grouped, rendered, write_files
from emp_callbacks.study.report.seen import SEEN, trajectory_seen
from emp_callbacks.study.report.styles import arm_style
from emp_callbacks.study.report.svg import Drawings

PLOT_TEXT = {
    "n_eff.png": "N_eff / N of the scores (of random scores in the arm random). Line: mean over seeds. Band: "
    "lowest to highest seed.",
    "metric_density.png": "{how} Means over seeds with 95 % intervals, which may leave the frame. Line: dense, its "
    "interval as a band.",
    "density.png": "Kept over all; constant between two refreshes. Line: mean over seeds. Band: lowest to highest "
    "seed.",
    "learning_curves.png": "Validation metric of the model as it is at that step, mask applied; the frame holds the "
    "second half of the training, so that curves may begin outside of it. Line: mean over seeds. Band: lowest to "
    "highest seed.",
}
_BY_ARM = "Left: density. Right: metric; small open circles are runs."
_OVER_DENSITY = (
    "Thick: one-shot. Open markers: pruned after dense training. Arms are moved sideways by 2 % each, so that none "
    "hides another."
)


def write_report(results: Results, folder: Path) -> Path:
    """Write `report.html` and its PNGs into `folder` and return the path of the HTML file.

    The HTML holds the pictures and its style itself: it needs no network and no script.

    All of it is made before the first file is written: results that cannot be shown leave no half report.

    Raises:
        ValueError: If `results` cannot be summarised (see `statistics.check_results`).
    """
    summaries = summarise(results)
    checks = fairness_checks(results)
    drawings, shown, pictures = Drawings(), [], {}
    for name, draw in plots.STUDY_PLOTS.items():
        text = PLOT_TEXT[name].format(how=_OVER_DENSITY if points_of(results) else _BY_ARM)
        own, pictures[name] = drawn(drawings, partial(draw, results), partial(SEEN[name], results), text, name)
        shown.append(own)
    metric = MetricFormat.of(results)
    leader = first_training_arm(at_middle_point(results))
    # The question first, the rest in study order; a study at points has its answers in `findings`.
    told = [] if points_of(results) else sorted(summaries, key=lambda row: row.arm != leader)
    equal = equal_density(results)
    found = findings(equal, results) or [headline(results, summaries)]
    arms = list(dict.fromkeys(map(arm_of, arm_names(results))))
    for arm in arms:
        drawings.use(arm_style(arm).color)
    text = rendered(
        "report.html.j2",
        drawings,
        kind="study",
        title=f"Pruning during training: {results['study']['metric']}",
        study=results["study"],
        headline=found[0],
        findings=found[1:],
        middle=middle_point(results),
        tolerance=MATCHED_TOLERANCE,
        equal=[cells for row in equal for cells in equal_density_rows(row, results, metric)],
        margin=metric.margin(results["study"]["margin"]) if results["study"].get("margin") else None,
        sentences=[(row.arm, color(row.arm), answer(row, results, metric)) for row in told],
        rows=[cells for row in summaries for cells in table_rows(row, metric)],
        convergence=_convergence_section(results, metric),
        unit=" (%)" if metric.percent else "",
        points=" (points)" if metric.percent else "",
        pictures=shown,
        checks=checks,
        failed=sum(not check.passed for check in checks),
        warnings=grouped(
            _signatures(
                [run.get("trajectory") or [] for arm in arm_names(results) for run in runs_of(results, arm)[:1]]
            )
        ),
        missing=missing_runs(results),
        arms=[(arm, color(arm), ARMS[arm].summary if arm in ARMS else "an arm of this recipe") for arm in arms],
        runs=[run_row(run, results, metric) for arm in arm_names(results) for run in runs_of(results, arm)],
        layers=layer_tables(runs_of(results, leader)[0].get("trajectory") or []) if leader else [],
        leader=leader,
        environment=results.get("environment", {}),
        command=results["study"].get("command") or f"emp compare --config {results['study'].get('recipe', '?')}",
    )
    return write_files(Path(folder), text, pictures)


def write_trajectory_report(records: Sequence[Mapping[str, Any]], folder: Path, title: str) -> Path:
    """Write `report.html` and `trajectory.png` of a single run into `folder` and return the HTML's path.

    Raises:
        ValueError: If `records` is empty.
    """
    drawings = Drawings()
    own, png = drawn(
        drawings,
        partial(plots.plot_trajectory, records),
        partial(trajectory_seen, records),
        "N_eff / N, density, preserved mass and its tight bound; churn; the density of each layer.",
        "trajectory.png",
    )
    text = rendered(
        "report.html.j2",
        drawings,
        kind="run",
        title=title,
        pictures=[own],
        records=[record_row(record) for record in records],
        warnings=grouped(_signatures([records])),
        layers=layer_tables(records),
        last=record_row(records[-1]),
    )
    return write_files(Path(folder), text, {"trajectory.png": png})


def headline(results: Results, summaries: Sequence[ArmSummary]) -> str:
    """Answer the study's question in one sentence, for the first training arm."""
    reference = reference_arm(results)
    compared = [row for row in summaries if prunes_by_n_eff(arm_of(row.arm)) and row.arm != reference]
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


def _equals(p: float) -> str:
    return p_text(p) if p < 0.001 else f"={SPACE}{p_text(p)}"


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


def _convergence_section(results: Results, metric: MetricFormat) -> dict[str, Any] | None:
    found = convergence(results)
    if found is None:
        return None
    return {
        "metric": found.metric,
        "baseline": found.baseline,
        "target": target_text(found, results, metric),
        "rows": [convergence_row(row, found, metric) for row in found.arms],
    }


def _signatures(runs: Sequence[Sequence[Mapping[str, Any]]]) -> list[str]:
    """Return what the last refresh of each run warns of, each warning once."""
    found: dict[str, None] = {}
    for records in runs:
        step = max((record["step"] for record in records), default=None)
        last = [record for record in records if record["step"] == step and record.get("beta") is not None]
        groups = [(record["group"], record["n"], record["n_eff_fraction"]) for record in last]
        found |= dict.fromkeys(nearly_all(groups, last[0]["criterion"]) if last else ())
    return list(found)
