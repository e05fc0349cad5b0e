"""The comparison of the arms for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console, Group
from rich.text import Text

from emp_callbacks.study.report.arm_results import (
    Results,
    middle_point,
    summarise,
)
from emp_callbacks.study.report.cells import convergence_row, equal_density_rows, table_rows, target_text
from emp_callbacks.study.report.convergence import Convergence, convergence
from emp_callbacks.study.report.equal_density import EqualDensityRow, equal_density
from emp_callbacks.study.report.fairness import MATCHED_TOLERANCE
from emp_callbacks.study.report.findings import findings
from emp_callbacks.study.report.metric_format import NO_SPREAD, MetricFormat, reference_arm
from emp_callbacks.study.report.page import DASH, Grid, Page
from emp_callbacks.terminal import FittedTable

VERDICT_STYLE = {"better": "green", "worse": "red"}
_MORE = "report.html has them"


def comparison_table(results: Results) -> Group:
    """Return the comparison of the arms for the terminal.

    That at equal density stands first, where there are pairs, with what it shows; that of convergence last, where
    curves were recorded.
    """
    found = convergence(results)
    equal = equal_density(results)
    shown: list[FittedTable | Text] = [_equal_density_table(equal, results)] if equal else []
    shown += [Text(sentence) for sentence in findings(equal, results)]
    shown.append(_metric_table(results))
    if found:
        shown.append(_convergence_table(results, found))
    return Group(*shown)


def _equal_density_table(rows: Sequence[EqualDensityRow], results: Results) -> FittedTable:
    study, metric = results["study"], MetricFormat.of(results)
    margin = study.get("margin")
    unit = " in %" if metric.percent else ""
    direction = "higher" if study["higher_is_better"] else "lower"
    table = FittedTable(
        f"At equal density: difference to one-shot, {study['metric']}{unit}, {direction} is better",
        caption="one-shot: the dense model of the same seed pruned once to the same count; p by Holm over this table\n"
        f"vs: the best arm of a density set in advance, equal within {MATCHED_TOLERANCE}, instead of one-shot"
        + (f"\nequivalent: within {metric.margin(margin)} by TOST" if margin else "")
        + "\nn seeds; N / kept; FLOPs of a forward pass and of the training, dense = 1; weights ever active",
        more=_MORE,
    )
    table.add_column("arm")
    for heading, worth in (("density", 0), ("mean \u00b1 SD", 1), ("one-shot", 3), ("difference [95 %]", 0)):
        table.add_column(heading, worth=worth)
    table.add_column("Holm p", worth=2)
    table.add_column("verdict", words=True)
    for heading, worth in (("n", 4), ("N / kept", 8), ("FLOPs", 6), ("train FLOPs", 5), ("ever active", 7)):
        table.add_column(heading, worth=worth)
    point = rows[0].point
    for row in rows:
        if row.point != point:
            table.add_section()
            point = row.point
        for cells in equal_density_rows(row, results, metric):
            table.add_row(
                cells["arm"], cells["density"], cells["mean"], cells["other"],
                _text(cells["difference"], cells["difference_interval"]), cells["p_holm"], cells["verdict"],
                cells["seeds"], cells["compression"], cells["inference"], cells["training"], cells["explored"],
                style=VERDICT_STYLE.get(cells["verdict"], ""),
            )  # fmt: skip
    return table


def _metric_table(results: Results) -> FittedTable:
    study, metric, summaries = results["study"], MetricFormat.of(results), summarise(results)
    direction = "higher" if study["higher_is_better"] else "lower"
    unit = " (%)" if metric.percent else ""
    table = FittedTable(
        f"{study['metric']}{unit}, {direction} is better",
        caption="mean [95 % interval over seeds, per comparison]; verdicts by Holm-adjusted p < 0.05"
        + f"\na difference without an interval is the same in all seeds, {NO_SPREAD}"
        * any(row.difference is not None and row.difference.has_no_spread for row in summaries),
        more=_MORE,
    )
    table.add_column("arm")
    for heading, worth in ((study["metric"], 0), ("density", 2), (f"difference to {reference_arm(results)}", 1)):
        table.add_column(heading, worth=worth)
    table.add_column("p (Holm)", worth=3)
    table.add_column("verdict", words=True)
    table.add_column("seeds", worth=4)
    table.add_column("seconds", worth=5)
    for row in summaries:
        for cells in table_rows(row, metric):
            table.add_row(
                cells["arm"], _text(cells["mean"], cells["interval"]), cells["density"],
                _text(cells["difference"], cells["difference_interval"]), cells["p_holm"], cells["verdict"],
                cells["seeds"], cells["seconds"], style=VERDICT_STYLE.get(cells["verdict"], ""),
            )  # fmt: skip
    return table


def _convergence_table(results: Results, found: Convergence) -> FittedTable:
    metric = MetricFormat.of(results)
    middle = middle_point(results)
    at = f" at density {middle:g}" if middle else ""
    table = FittedTable(
        f"Convergence{at}: mean of {found.metric}{' (%)' if metric.percent else ''} over the training",
        caption=f"first step at the last value of {found.baseline}, over the seeds that get there"
        * bool(found.baseline),
        more=_MORE,
    )
    table.add_column("arm")
    for heading, worth in (("mean over training", 1), (f"difference to {found.baseline}", 0), ("p (Holm)", 2)):
        table.add_column(heading, worth=worth)
    table.add_column("verdict", words=True)
    for heading, worth in ((target_text(found, results, metric), 3), ("seeds there", 4), ("val - train loss", 5)):
        table.add_column(heading, worth=worth)
    for row in found.arms:
        cells = convergence_row(row, found, metric)
        table.add_row(
            row.arm, _text(cells["mean"], cells["interval"]),
            _text(cells["difference"], cells["difference_interval"]), cells["p_holm"], cells["verdict"],
            cells["step"], cells["reached"], cells["gap"], style=VERDICT_STYLE.get(row.verdict or "", ""),
        )  # fmt: skip
    return table


def _text(value: str, interval: str) -> str:
    return value if interval == DASH else f"{value} {interval}".strip()


def print_page(page: Page, console: Console) -> None:
    """Show the tables of a study, then its warnings and the answer."""
    for section in page.sections:
        if section.grid is not None and section.printed:
            console.print(_grid_table(section.grid, section.heading))
            if section.text:
                console.print(Text(section.text, style="dim"))
    for warning in page.warnings:
        console.print(Text(f"warning: {warning}", style="yellow"))
    console.print(Text(page.headline, style="bold"))
    for finding in page.findings:
        console.print(Text(f"  {finding}"))


def _grid_table(grid: Grid, title: str) -> FittedTable:
    table = FittedTable(title, more=_MORE)
    for index, heading in enumerate(grid.headers):
        table.add_column(heading, worth=0 if index < grid.texts else index, words=index < grid.texts)
    for row in grid.rows:
        table.add_row(*row)
    return table
