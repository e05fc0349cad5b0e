"""The cells of a report's tables, as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from emp_callbacks.study.report.arm_results import (
    ArmSummary,
    Results,
    arm_of,
    label_of,
)
from emp_callbacks.study.report.convergence import ArmConvergence, Convergence
from emp_callbacks.study.report.equal_density import Against, EqualDensityRow
from emp_callbacks.study.report.metric_format import SPACE, MetricFormat, p_text, reference_arm
from emp_callbacks.study.report.page import DASH, number
from emp_callbacks.study.report.statistics import PairedDifference
from emp_callbacks.study.report.styles import arm_style
from emp_callbacks.study.report.svg import color_class
from emp_callbacks.trajectory import Certificate, certificate_cells


def table_rows(row: ArmSummary, metric: MetricFormat) -> list[dict[str, str]]:
    """Return the cells of an arm and, where another arm than the reference does the same once, of that comparison."""
    own = {
        "arm": row.arm,
        "color": color(row.arm),
        "mean": metric.number(row.metric.mean),
        "interval": metric.interval(row.metric) if row.metric.low is not None else DASH,
        "density": number(row.density.mean, 3),
        **_difference_cells(row.difference, metric),
        "seeds": str(row.metric.n),
        "seconds": number(row.seconds, 1),
        "verdict": _standing(row),
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


def _standing(row: ArmSummary) -> str:
    if row.reference is None:
        return DASH
    return "reference" if row.arm == row.reference else row.verdict or "no common seed"


def equal_density_rows(row: EqualDensityRow, results: Results, metric: MetricFormat) -> list[dict[str, str]]:
    """Return the cells of an arm beside one-shot pruning at its density and, for EMP, of that beside the best arm."""
    reference = arm_of(row.label) == reference_arm(results)
    own = {
        "arm": row.label,
        "color": color(row.label),
        "density": number(row.density.mean, 3),
        "mean": metric.with_sd(row.metric),
        **_against_cells(row.one_shot, metric),
        "compression": _times(row.compression, 1),
        "inference": _times(row.inference, 2),
        "training": _times(row.training, 2),
        "explored": number(row.explored, 2),
        "point": str(row.point),
    }
    if reference:
        own |= {"verdict": "reference"}
    if row.best is None:
        return [own]
    best = {
        **dict.fromkeys(own, ""),
        "arm": f"{SPACE}{SPACE}vs {arm_of(row.best.label)}",
        "point": str(row.point),
        "density": number(row.best.density, 3),
        **_against_cells(row.best, metric),
    }
    return [own, best]


def _against_cells(against: Against | None, metric: MetricFormat) -> dict[str, str]:
    if against is None:
        return {**_difference_cells(None, metric), "other": DASH, "seeds": DASH, "verdict": DASH}
    return {
        "other": metric.number(against.metric),
        **_difference_cells(against.difference, metric),
        "seeds": str(against.difference.n),
        "verdict": against.verdict,
    }


def _times(value: float | None, decimals: int) -> str:
    return DASH if value is None else f"{number(value, decimals)}\u00d7"


def target_text(found: Convergence, results: Results, metric: MetricFormat) -> str:
    """Return the heading of the column of first steps."""
    sign = "\u2265" if results["study"]["higher_is_better"] else "\u2264"
    return f"first step {sign}{SPACE}{metric.value(found.target)}" if found.target is not None else "first step"


def convergence_row(row: ArmConvergence, found: Convergence, metric: MetricFormat) -> dict[str, str]:
    """Return the cells of an arm's convergence."""
    difference = row.difference
    return {
        "arm": row.arm,
        "color": color(row.arm),
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


def run_row(run: Mapping[str, Any], results: Results, metric: MetricFormat) -> dict[str, str]:
    """Return the cells of one run."""
    return {
        "arm": label_of(run),
        "color": color(run["arm"]),
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


def record_row(record: Mapping[str, Any]) -> dict[str, str]:
    """Return the cells of one row of a trajectory."""
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


def layer_tables(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
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


def _certificate_cells(record: Mapping[str, Any] | None) -> tuple[str, str, str] | None:
    """Return what a certificate speaks of, its bound and what was measured."""
    if record is None:
        return None
    certificate = Certificate(**record)
    return (certificate.says, *certificate_cells(certificate))


def color(label: str) -> str:
    """Return the class that has the colour of an arm, the same in all pictures and tables."""
    return color_class(arm_style(label).color)
