"""The comparison of the arms for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group
from rich.table import Table
from rich.text import Text

from emp_callbacks.study.report.arm_results import (
    Results,
    summarise,
)
from emp_callbacks.study.report.cells import convergence_row, equal_density_rows, table_rows, target_text
from emp_callbacks.study.report.convergence import Convergence, convergence
from emp_callbacks.study.report.equal_density import EqualDensityRow, equal_density
from emp_callbacks.study.report.fairness import MATCHED_TOLERANCE
from emp_callbacks.study.report.findings import findings
from emp_callbacks.study.report.metric_format import NO_SPREAD, MetricFormat, reference_arm
from emp_callbacks.study.report.page import DASH

VERDICT_STYLE = {"better": "green", "worse": "red"}


def comparison_table(results: Results) -> Group:
    """Return the comparison of the arms for the terminal.

    That at equal density stands first, where there are pairs, with what it shows; that of convergence last, where
    curves were recorded.
    """
    found = convergence(results)
    equal = equal_density(results)
    shown: list[Table | Text] = [_equal_density_table(equal, results)] if equal else []
    shown += [Text(sentence) for sentence in findings(equal, results)]
    shown.append(_metric_table(results))
    if found:
        shown.append(_convergence_table(results, found))
    return Group(*shown)


def _equal_density_table(rows: Sequence[EqualDensityRow], results: Results) -> Table:
    study, metric = results["study"], MetricFormat.of(results)
    table = Table(
        title=Text("At equal density: difference to one-shot"),
        caption=Text(
            "one-shot: the dense model of the same seed pruned once to the same count; p by Holm over this table; "
            f"FLOPs of dense = 1; against: the best arm of a density set in advance, equal within {MATCHED_TOLERANCE}"
        ),
    )
    table.add_column("arm", no_wrap=True)
    unit = " (%)" if metric.percent else ""
    heads = ("density", f"{study['metric']}{unit} \u00b1 SD", "one-shot", "difference [95 %]", "p (Holm)")
    for name in heads:
        table.add_column(Text(name), justify="right")
    table.add_column("verdict")
    for name in ("seeds", "N / kept", "FLOPs", "training FLOPs", "explored"):
        table.add_column(Text(name), justify="right")
    for row in rows:
        for cells in equal_density_rows(row, results, metric):
            table.add_row(
                Text(cells["arm"]), cells["density"], Text(cells["mean"]), cells["other"],
                _text(cells["difference"], cells["difference_interval"]), cells["p_holm"],
                Text(cells["verdict"], style=VERDICT_STYLE.get(cells["verdict"], "")), cells["seeds"],
                cells["compression"], cells["inference"], cells["training"], cells["explored"],
            )  # fmt: skip
    return table


def _metric_table(results: Results) -> Table:
    study, metric, summaries = results["study"], MetricFormat.of(results), summarise(results)
    direction = "higher" if study["higher_is_better"] else "lower"
    unit = " (%)" if metric.percent else ""
    table = Table(
        title=Text(f"{study['metric']}{unit}, {direction} is better"),
        caption=Text(
            "mean [95 % interval over seeds, per comparison]; verdicts by Holm-adjusted p < 0.05"
            + f"\na difference without an interval is the same in all seeds, {NO_SPREAD}"
            * any(row.difference is not None and row.difference.has_no_spread for row in summaries)
        ),
    )
    table.add_column("arm", no_wrap=True)
    for name in (study["metric"], "density", f"difference to {reference_arm(results)}", "p (Holm)"):
        table.add_column(Text(name), justify="right")
    table.add_column("verdict")
    table.add_column("seeds", justify="right")
    table.add_column("seconds", justify="right")
    for row in summaries:
        for cells in table_rows(row, metric):
            table.add_row(
                Text(cells["arm"]), _text(cells["mean"], cells["interval"]), cells["density"],
                _text(cells["difference"], cells["difference_interval"]), cells["p_holm"],
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
    for name in (target_text(found, results, metric), "seeds there", "val - train loss"):
        table.add_column(Text(name), justify="right")
    for row in found.arms:
        cells = convergence_row(row, found, metric)
        table.add_row(
            Text(row.arm), _text(cells["mean"], cells["interval"]),
            _text(cells["difference"], cells["difference_interval"]), cells["p_holm"],
            Text(cells["verdict"], style=VERDICT_STYLE.get(row.verdict or "", "")),
            cells["step"], cells["reached"], cells["gap"],
        )  # fmt: skip
    return table


def _text(value: str, interval: str) -> Text:
    return Text(
        value if interval == DASH else f"{value} {interval}".strip()
    )  # in a str, rich would read [..] as a style
