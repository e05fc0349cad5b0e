"""The comparison of the arms for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Group
from rich.table import Table
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
    margin = study.get("margin")
    unit = " in %" if metric.percent else ""
    direction = "higher" if study["higher_is_better"] else "lower"
    table = Table(
        title=Text(f"At equal density: difference to one-shot, {study['metric']}{unit}, {direction} is better"),
        caption=Text(
            "one-shot: the dense model of the same seed pruned once to the same count; p by Holm over this table\n"
            f"vs: the best arm of a density set in advance, equal within {MATCHED_TOLERANCE}, instead of one-shot"
            + (f"\nequivalent: within {metric.margin(margin)} by TOST" if margin else "")
            + "\nn seeds; N / kept; FLOPs of a forward pass and of the training, dense = 1; weights ever active"
        ),
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    table.add_column("arm", no_wrap=True)
    for name in ("density", "mean \u00b1 SD", "one-shot", "difference [95 %]", "Holm p"):
        table.add_column(Text(name), justify="right", no_wrap=True)
    table.add_column("verdict", min_width=13)  # the width of "no difference"
    for name in ("n", "N/\nkept", "FLOPs", "train\nFLOPs", "ever\nactive"):
        table.add_column(Text(name), justify="right")
    point = rows[0].point
    for row in rows:
        if row.point != point:
            table.add_section()
            point = row.point
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
    middle = middle_point(results)
    at = f" at density {middle:g}" if middle else ""
    table = Table(
        title=Text(f"Convergence{at}: mean of {found.metric}{' (%)' if metric.percent else ''} over the training"),
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
