"""What `emp violations` found: how often each bound is broken, where, and what goes with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from scipy import stats

from emp_callbacks.cost.pruning_cost import LOSS_BOUNDS
from emp_callbacks.study.once import plots
from emp_callbacks.study.once.results import Results, Row
from emp_callbacks.study.once.seen import bounds_seen, causes_seen
from emp_callbacks.study.report.page import DASH, Grid, Page, Section

__all__ = ["BOUNDS", "Bound", "compare", "is_violated", "page", "pairs_of", "pruned_rows"]

# float32 losses of some batches are known to about this share of themselves.
RESOLUTION = 1e-6


@dataclass(frozen=True, kw_only=True)
class Bound:
    """One bound and the quantity that it speaks of.

    Attributes:
        says: What it bounds.
        assumes: Under which conditions; a case outside them is counted, too, but proves nothing against it.
        lower: Whether it bounds from below.
    """

    says: str
    assumes: str
    lower: bool = False


BOUNDS: dict[str, Bound] = {
    "mass": Bound(says="preserved mass >= paper's theorem 4.2", assumes="beta = 1", lower=True),
    "tight_mass": Bound(says="preserved mass >= tight bound", assumes="nothing", lower=True),
    "wanda": Bound(says="error of a layer's outputs <= pruned score sum", assumes="wanda"),
    "taylor": Bound(says="first-order change of the loss <= pruned score sum", assumes="taylor"),
    "taylor_loss": Bound(says="change of the loss <= pruned score sum", assumes="taylor; small steps"),
    "distance": Bound(
        says="change of the loss <= (1 - rho) / (2 N rho) Tr(H) d^2", assumes="magnitude; docs/certificates.md"
    ),
    "norm": Bound(
        says="change of the loss <= the distance form with the bound on d^2 that follows from N_eff",
        assumes="magnitude; docs/certificates.md",
    ),
    "curvature": Bound(says="change of the loss <= Tr(H) d^2 / 2", assumes="minimum, H >= 0, quadratic"),
    "asymptotic": Bound(says="change of the loss <= paper's equation 5", assumes="magnitude; N to infinity"),
    "inverse_trace": Bound(says="change of the loss <= equation 5 with Tr(H) in the denominator", assumes="a misprint"),
}


def pruned_rows(results: Results) -> list[Row]:
    """Return the rows in which something was pruned and the change of the loss can be told from rounding."""
    return [
        row
        for row in results["rows"]
        if row["density"] < 1 and abs(row["change"]) > RESOLUTION * max(1.0, abs(row["loss_before"]))
    ]


def compare(row: Row, name: str) -> tuple[float, float] | None:
    """Return (measured, bound) of one bound in a row; None where it says nothing."""
    if name in ("mass", "tight_mass"):
        bound = row["mass_bound"] if name == "mass" else row["tight_mass_bound"]
        return None if bound is None else (row["preserved_mass"], bound)
    if name == "wanda":
        return None if row["output_tightness"] is None else (row["output_tightness"], 1.0)
    if name == "taylor":
        bound = row["bounds"]["taylor"]
        return None if bound is None else (abs(row["first_order"]), bound)
    bound = row["bounds"]["taylor" if name == "taylor_loss" else name]
    return None if bound is None else (abs(row["change"]), bound)


def is_violated(name: str, measured: float, bound: float) -> bool:
    """Return whether a measured value lies on the wrong side of its bound, beyond float32's rounding."""
    if BOUNDS[name].lower:
        return measured < bound - 1e-9
    return measured > bound * (1 + 1e-5)


def pairs_of(rows: Sequence[Row], name: str) -> list[tuple[Row, float, float]]:
    """Return (row, measured, bound) of the rows of which a bound speaks."""
    found = [(row, compare(row, name)) for row in rows]
    return [(row, *pair) for row, pair in found if pair is not None]


def page(results: Results) -> Page:
    """Return the findings."""
    told = results["rows"]
    rows = pruned_rows(results)
    models = list(dict.fromkeys(row["model"] for row in told))
    seeds = sorted({row["seed"] for row in told})
    summary = (
        f"Models {', '.join(models)}; seeds {', '.join(map(str, seeds))}, "
        f"{len(results['settings']['criteria'])} criteria, {len(results['settings']['betas'])} beta: {len(told)} "
        f"cases; {len(told) - len(rows)} in which nothing was pruned, or the loss moved by less than its rounding, are "
        "left out of what follows."
    )
    return Page(
        title="Measured loss beside the bounds",
        summary=summary,
        headline=_headline(rows),
        findings=_findings(rows),
        warnings=[],
        sections=[
            Section(
                heading="Bounds",
                text="Violated at high trace: also with the upper end of the 95 % interval of Tr(H). Slack: median of "
                "bound / measured (mass: measured - bound).",
                grid=_bound_grid(rows),
            ),
            Section(
                heading="Where the distance form is violated",
                text="Violated cases of all, by model and criterion. (1 - rho) / (2 N rho) Tr(H) ||d||^2, the lemma "
                "solved for the loss.",
                grid=_where(rows, models, "distance"),
            ),
            Section(
                heading="What goes with it",
                text="Spearman's rank correlation of |change| / bound (distance form) with properties of a case, "
                "magnitude only and all criteria. Above 1 the bound is violated.",
                grid=_explanations(rows),
            ),
            Section(
                heading="The furthest violations of the distance form",
                text="quadratic: g d + d H d / 2. gradient: share of it that is g d (at a minimum 0). alignment: "
                "curvature along d over the mean curvature.",
                grid=_furthest(rows, "distance"),
            ),
            Section(
                heading="Measured against bound",
                text="A point is a model, seed, criterion and beta. Above the diagonal the bound is violated.",
                draw=partial(plots.plot_violations, _plotted(rows)),
                seen=partial(bounds_seen, _plotted(rows)),
                file="violations.png",
            ),
            Section(
                heading="Why",
                text="Measured change of the loss over the distance form, against what the lemma leaves out. Above "
                "1 it is violated.",
                draw=partial(plots.plot_causes, _causes(rows)),
                seen=partial(causes_seen, _causes(rows)),
                file="violations_why.png",
            ),
        ],
    )


def _count(rows: Sequence[Row], name: str) -> tuple[int, int]:
    found = pairs_of(rows, name)
    return sum(is_violated(name, measured, bound) for _, measured, bound in found), len(found)


def _magnitude(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["criterion"] == "magnitude"]


def _headline(rows: Sequence[Row]) -> str:
    mass = [_count(rows, name) for name in ("mass", "tight_mass")]
    proved = [_count(rows, name) for name in ("wanda", "taylor")]
    broken, cases = _count(_magnitude(rows), "distance")
    return (
        f"Mass bounds: {sum(b for b, _ in mass)} of {sum(c for _, c in mass)} violated; certificates of wanda and "
        f"taylor: {sum(b for b, _ in proved)} of {sum(c for _, c in proved)}; the bound on the loss that the paper "
        f"takes from a lemma (the distance form), for weights pruned by magnitude: {broken} of {cases}."
    )


def _findings(rows: Sequence[Row]) -> list[str]:
    told = _at_one(_magnitude(rows))
    for name in ("norm", "asymptotic", "inverse_trace", "curvature"):
        broken, cases = _count(_magnitude(rows), name)
        slack = _slack(_magnitude(rows), name)
        told.append(f"{BOUNDS[name].says}: violated in {broken} of {cases} magnitude cases, median slack {slack}.")
    for criterion in sorted({row["criterion"] for row in rows} - {"magnitude"}):
        broken, cases = _count([row for row in rows if row["criterion"] == criterion], "distance")
        told.append(f"the distance form for {criterion}, of which the paper does not speak: {broken} of {cases}.")
    over = [row for row, measured, bound in pairs_of(rows, "distance") if is_violated("distance", measured, bound)]
    if over:
        curved = sum(row["alignment"] > 1 for row in over)
        sloped = sum(_gradient_share(row) > 0.5 for row in over)
        beyond = sum(_beyond_quadratic(row) > 0.5 for row in over)
        told.append(
            f"of the {len(over)} violations of the distance form, in {curved} the loss is more curved along the pruned "
            f"weights than on average, in {sloped} most of the quadratic change is the gradient's (no minimum), in "
            f"{beyond} most of the change is beyond second order."
        )
    return told


def _at_one(rows: Sequence[Row]) -> list[str]:
    """Say what the paper's own setting, magnitude at beta = 1, does to the loss."""
    own = [row for row in rows if row["beta"] == 1.0]
    if not own:
        return []
    changes = [row["change"] for row in own]
    broken, cases = _count(own, "distance")
    return [
        f"magnitude at beta = 1 changes the loss by {min(changes):+.4f} to {max(changes):+.4f} (median "
        f"{np.median(changes):+.4f}), above the distance form in {broken} of {cases} cases."
    ]


def _gradient_share(row: Row) -> float:
    whole = abs(row["first_order"]) + abs(row["second_order"]) / 2
    return float(abs(row["first_order"]) / whole) if whole else 0.0


def _quadratic(row: Row) -> float:
    return float(row["first_order"] + row["second_order"] / 2)


def _beyond_quadratic(row: Row) -> float:
    return float(abs(row["change"] - _quadratic(row)) / abs(row["change"]))


def _slack(rows: Sequence[Row], name: str) -> str:
    found = pairs_of(rows, name)
    if not found:
        return DASH
    if BOUNDS[name].lower:
        return f"{np.median([measured - bound for _, measured, bound in found]):+.3f}"
    ratios = [bound / measured for _, measured, bound in found if measured > 0]
    return f"x{np.median(ratios):.3g}" if ratios else DASH


def _bound_grid(rows: Sequence[Row]) -> Grid:
    cells = []
    for name, bound in BOUNDS.items():
        groups = [("all", rows)]
        if name in LOSS_BOUNDS:
            groups = [("magnitude", _magnitude(rows)), ("others", [r for r in rows if r["criterion"] != "magnitude"])]
        for label, own in groups:
            broken, count = _count(own, name)
            if not count:
                continue
            at_high = DASH
            if name in LOSS_BOUNDS and name != "inverse_trace":
                found = [(abs(r["change"]), r["bounds_at_high_trace"][name]) for r in own]
                at_high = str(sum(is_violated(name, m, b) for m, b in found if b is not None))
            cells.append([
                name, bound.says, bound.assumes, label, str(count), str(broken), f"{broken / count:.0%}", at_high,
                _slack(own, name),
            ])  # fmt: skip
    headers = ["bound", "says", "assumes", "criteria", "cases", "violated", "share", "at high trace", "slack"]
    return Grid(headers=headers, rows=cells, texts=4)


def _where(rows: Sequence[Row], models: Sequence[str], name: str) -> Grid:
    criteria = list(dict.fromkeys(row["criterion"] for row in rows))
    cells = []
    for model in models:
        line = [model]
        for criterion in criteria:
            own = [row for row in rows if row["model"] == model and row["criterion"] == criterion]
            broken, count = _count(own, name)
            line.append(f"{broken} of {count}")
        cells.append(line)
    return Grid(headers=["model", *criteria], rows=cells)


_PROPERTIES = {
    "alignment": "curvature along d / mean curvature",
    "gradient": "share of the gradient in the quadratic change",
    "beyond": "share of the change beyond second order",
    "density": "density rho",
    "n_eff_fraction": "N_eff / N of the scores",
    "cv": "coefficient of variation of the scores",
    "kurtosis": "excess kurtosis of the scores",
    "gini": "Gini coefficient of the scores",
    "top_percent": "mass in the top 1 % of the scores",
}


def _property(row: Row, name: str) -> float:
    derived = {"gradient": _gradient_share, "beyond": _beyond_quadratic}
    return derived[name](row) if name in derived else float(row[name])


def _explanations(rows: Sequence[Row]) -> Grid:
    cells = []
    for name, meaning in _PROPERTIES.items():
        line = [meaning]
        for own in (_magnitude(rows), rows):
            found = [(m / b, _property(row, name)) for row, m, b in pairs_of(own, "distance") if b > 0]
            line.append(_correlation(found))
        cells.append(line)
    return Grid(headers=["property", "magnitude", "all criteria"], rows=cells)


def _correlation(pairs: Sequence[tuple[float, float]]) -> str:
    if len(pairs) < 4 or any(len({pair[i] for pair in pairs}) == 1 for i in (0, 1)):
        return DASH
    found = stats.spearmanr([a for a, _ in pairs], [b for _, b in pairs])
    return f"{found.statistic:+.2f} (n = {len(pairs)})"


def _furthest(rows: Sequence[Row], name: str, most: int = 15) -> Grid:
    found = [(m / b, row, b) for row, m, b in pairs_of(rows, name) if is_violated(name, m, b) and b > 0]
    found.sort(key=lambda item: -item[0])
    cells = [
        [
            row["model"], str(row["seed"]), row["criterion"], f"{row['beta']:g}", f"{row['density']:.3f}",
            f"{row['change']:+.3g}", f"{bound:.3g}", f"{ratio:.1f}",
            f"{_quadratic(row):+.3g}", f"{_gradient_share(row):.0%}",
            f"{row['alignment']:.2f}", f"{row['kurtosis']:.1f}",
        ]
        for ratio, row, bound in found[:most]
    ]  # fmt: skip
    headers = ["model", "seed", "criterion", "beta", "density", "change", "bound", "change / bound", "quadratic"]
    return Grid(headers=[*headers, "gradient", "alignment", "kurtosis"], rows=cells, texts=3)


def _plotted(rows: Sequence[Row]) -> list[plots.BoundPanel]:
    panels = []
    for name in ("distance", "norm", "asymptotic", "inverse_trace", "curvature", "taylor_loss"):
        points = [(b, m, row["criterion"]) for row, m, b in pairs_of(rows, name) if b > 0 and m > 0]
        panels.append(plots.BoundPanel(name, BOUNDS[name].says, points))
    return panels


def _causes(rows: Sequence[Row]) -> list[plots.BoundPanel]:
    panels = []
    for name in ("alignment", "gradient", "beyond", "cv"):
        points = [
            (_property(row, name), m / b, row["criterion"])
            for row, m, b in pairs_of(rows, "distance")
            if b > 0 and m > 0
        ]
        panels.append(plots.BoundPanel(name, _PROPERTIES[name], points))
    return panels
