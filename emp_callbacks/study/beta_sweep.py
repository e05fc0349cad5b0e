"""`emp sweep-beta`: trained models are pruned once for each beta. Is beta = 1 where the metric begins to fall?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from statistics import fmean
from typing import Any

from emp_callbacks.config import EMPConfig
from emp_callbacks.signatures import cliff_without_sparsity, nearly_all
from emp_callbacks.study import once_plots
from emp_callbacks.study.dense_models import DenseModel
from emp_callbacks.study.once import Harm, OnCase, OnceStudy, Row, harms_of
from emp_callbacks.study.page import DASH, Grid, Page, Section, interval, number
from emp_callbacks.study.statistics import mean_interval, paired_difference
from emp_callbacks.trajectory import PruneEvent

__all__ = ["BETAS", "Curve", "beta_sweep", "curves", "outcome"]

BETAS = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0)  # those of the paper

Results = Mapping[str, Any]


def beta_sweep(
    *, betas: Sequence[float] = BETAS, tolerance: float = 0.5, overrides: Mapping[str, Any] | None = None
) -> OnceStudy:
    """Return the study.

    Args:
        betas: Factors on N_eff, each > 0.
        tolerance: Harm that counts as none, in points of accuracy or percent of another metric.
        overrides: Fields of EMPConfig that replace those of every recipe.

    Raises:
        ValueError: A beta or the tolerance is invalid.
    """
    for beta in betas:
        EMPConfig(beta=beta)
    EMPConfig().once(**overrides or {})
    if not tolerance > 0:
        raise ValueError(f"tolerance must be > 0 (points of accuracy, or percent of another metric), got {tolerance}")
    settings = {"betas": sorted(set(betas)), "overrides": dict(overrides or {})}
    shown = {"tolerance": tolerance}
    return OnceStudy(command="sweep-beta", settings=settings, measure=measure, page=page, shown=shown)


def measure(dense: DenseModel, settings: Mapping[str, Any], on_case: OnCase) -> list[Row]:
    """Return one row per beta."""
    config, metric = dense.training.recipe_config.once(**settings["overrides"]), dense.recipe.study.metric
    rows = []
    for done, beta in enumerate(settings["betas"]):
        on_case(done, len(settings["betas"]))
        pruner = dense.pruner(config.once(beta=beta))
        found = outcome(pruner.refresh(), pruner.config)
        rows.append({**found, **tested(dense, metric, dense.test(pruner))})
    return rows


def outcome(events: Sequence[PruneEvent], config: EMPConfig) -> Row:
    """Return what one refresh kept, over its groups."""
    n, keep = sum(event.n for event in events), sum(event.keep for event in events)
    n_eff = sum(event.n_eff for event in events)
    bound = events[0] if len(events) == 1 else None
    return {
        "target": config.target,
        "criterion": config.criterion_name,
        "scope": config.scope,
        "beta": config.beta if config.density is None else None,
        "n": n,
        "n_eff": n_eff,
        "n_eff_fraction": n_eff / n,
        "keep": keep,
        "density": sum(event.density * event.n for event in events) / n,
        # Groups have their own mass: their mean, weighted by their components.
        "preserved_mass": sum(event.preserved_mass * event.n for event in events) / n,
        "mass_bound": bound.mass_bound if bound else None,
        "tight_mass_bound": bound.tight_mass_bound if bound else None,
    }


def tested(dense: DenseModel, metric: str, after: Mapping[str, float]) -> Row:
    """Return the test metric and loss before and after pruning."""
    return {
        "before": dense.metrics[metric],
        "after": after[metric],
        "loss_before": dense.metrics.get("test/loss"),
        "loss_after": after.get("test/loss"),
    }


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One model and way of pruning over all betas and seeds.

    Attributes:
        model: Name.
        way: Target, criterion and scope as one text.
        harm: How its metric is read.
        rows: beta -> rows of the seeds, betas ascending.
    """

    model: str
    way: str
    harm: Harm
    rows: Mapping[float, Sequence[Row]]

    def harms(self, beta: float) -> dict[int, float]:
        """Return seed -> harm at a beta."""
        return {row["seed"]: self.harm.of(self.harm.change(row["before"], row["after"])) for row in self.rows[beta]}

    def mean_harm(self, beta: float) -> float:
        """Return the mean harm over seeds."""
        return fmean(self.harms(beta).values())

    def mean(self, beta: float, key: str) -> float:
        """Return the mean of a column over seeds."""
        return fmean(row[key] for row in self.rows[beta])

    def least_tolerated(self, tolerance: float) -> float | None:
        """Return the lowest beta from which on no harm is above the tolerance; None if the highest is not tolerated."""
        tolerated = None
        for beta in sorted(self.rows, reverse=True):
            if self.mean_harm(beta) > tolerance:
                break
            tolerated = beta
        return tolerated

    def steepest(self) -> tuple[float, float] | None:
        """Return the two neighbouring betas between which harm rises fastest per unit of beta, the lower first."""
        pairs = list(pairwise(sorted(self.rows)))
        rise = {pair: (self.mean_harm(pair[0]) - self.mean_harm(pair[1])) / (pair[1] - pair[0]) for pair in pairs}
        return max(pairs, key=lambda pair: rise[pair]) if pairs and max(rise.values()) > 0 else None

    def is_cliff(self, tolerance: float) -> bool:
        """Return whether the metric is unharmed from beta = 1 on and harmed at the next lower beta."""
        return self.least_tolerated(tolerance) == 1.0


def curves(results: Results) -> list[Curve]:
    """Return a curve for each model and way of pruning, in the order of the results."""
    harms = harms_of(results)
    grouped: dict[tuple[str, str], dict[float, list[Row]]] = {}
    for row in results["rows"]:
        key = row["model"], f"{row['target']} x {row['criterion']}, {row['scope']}"
        grouped.setdefault(key, {}).setdefault(row["beta"], []).append(row)
    return [
        Curve(model=model, way=way, harm=harms[model], rows=dict(sorted(rows.items())))
        for (model, way), rows in grouped.items()
    ]


def page(results: Results) -> Page:
    """Return the findings."""
    found = curves(results)
    betas, tolerance = results["settings"]["betas"], results["shown"]["tolerance"]
    cliffs = [curve for curve in found if curve.is_cliff(tolerance)] if 1.0 in betas else []
    seeds = sorted({row["seed"] for row in results["rows"]})
    return Page(
        title="EMP once, after training, for several beta",
        summary=f"Models {', '.join(dict.fromkeys(c.model for c in found))}; seeds {', '.join(map(str, seeds))}; beta "
        f"{', '.join(f'{beta:g}' for beta in betas)}; no training after pruning.",
        headline=f"beta = 1 is the cliff in {len(cliffs)} of {len(found)} cases: unharmed from there on "
        f"(at most {tolerance:g} points or %), harmed at the next lower beta.",
        findings=[_finding(curve, tolerance) for curve in found],
        warnings=[warning for curve in found for warning in _warnings(curve)],
        sections=[
            Section(
                heading="Change of the metric by beta, mean over seeds",
                text="Accuracy in points, other metrics in percent of the dense value, with the metric's own sign.",
                grid=_means(found, betas),
            ),
            Section(
                heading="Where it falls",
                text=f"Harm: what the metric loses. Unharmed: at most {tolerance:g} points or %. The difference of the "
                "harm between the two betas is paired by seed, with its 95 % Student t interval.",
                grid=_cliffs(found, tolerance),
            ),
            Section(
                heading="Change by beta with 95 % intervals over seeds", grid=_intervals(found, betas), printed=False
            ),
            Section(
                heading="Metric and density against beta",
                text="Line: mean over seeds. Band: lowest to highest seed. Black: dense. Dashed: beta = 1.",
                draw=partial(once_plots.plot_beta_sweep, found),
                file="sweep_beta.png",
            ),
        ],
    )


def _finding(curve: Curve, tolerance: float) -> str:
    name, unit = f"{curve.model}, {curve.way}", curve.harm.unit
    if 1.0 not in curve.rows:
        return f"{name}: beta = 1 was not measured."
    least, at_one = curve.least_tolerated(tolerance), curve.mean_harm(1.0)
    where = "never unharmed" if least is None else f"unharmed down to beta = {least:g}"
    return f"{name}: {1 - curve.mean(1.0, 'density'):.1%} pruned at beta = 1 for {at_one:+.2f} {unit} of harm; {where}."


def _warnings(curve: Curve) -> list[str]:
    lower = [beta for beta in curve.rows if beta < 1]
    if 1.0 not in curve.rows or not lower:
        return []
    sparsity = 1 - curve.mean(1.0, "density")
    below = curve.mean_harm(max(lower))
    name, at_one = f"{curve.model}, {curve.way}", curve.rows[1.0][0]
    alike = nearly_all([(name, at_one["n"], curve.mean(1.0, "n_eff_fraction"))], at_one["criterion"])
    return [*alike, *cliff_without_sparsity(name, sparsity, curve.mean_harm(1.0), below, curve.harm.unit)]


def _means(found: Sequence[Curve], betas: Sequence[float]) -> Grid:
    rows = []
    for curve in found:
        middle = 1.0 if 1.0 in curve.rows else max(curve.rows)
        rows.append([
            curve.model,
            curve.way,
            f"{curve.rows[middle][0]['n']:,}",
            number(curve.mean(middle, "n_eff_fraction"), 3),
            number(1 - curve.mean(middle, "density"), 3),
            *(number(_mean_change(curve, beta), 2, sign=True) if beta in curve.rows else DASH for beta in betas),
            curve.harm.unit,
        ])  # fmt: skip
    headers = ["model", "pruned", "N", "N_eff / N", "sparsity at 1", *(f"beta {beta:g}" for beta in betas), "in"]
    return Grid(headers=headers, rows=rows, texts=2)


def _mean_change(curve: Curve, beta: float) -> float:
    return curve.harm.of(curve.mean_harm(beta))


def _cliffs(found: Sequence[Curve], tolerance: float) -> Grid:
    rows = []
    for curve in found:
        steepest, least = curve.steepest(), curve.least_tolerated(tolerance)
        below = max((beta for beta in curve.rows if beta < 1), default=None)
        difference = None
        if below is not None and 1.0 in curve.rows:
            difference = paired_difference(curve.harms(below), curve.harms(1.0))
        shown = DASH
        if difference is not None:
            ends = "" if difference.low is None else f" [{difference.low:+.2f}, {difference.high:+.2f}]"
            shown = f"{difference.mean:+.2f}{ends}"
        rows.append([
            curve.model,
            curve.way,
            DASH if least is None else f"{least:g}",
            DASH if steepest is None else f"{steepest[1]:g} to {steepest[0]:g}",
            shown,
            "yes" if curve.is_cliff(tolerance) else "no",
        ])  # fmt: skip
    names = ["model", "pruned", "unharmed down to", "falls fastest", "harm below 1 - harm at 1", "cliff at 1"]
    return Grid(headers=names, rows=rows, texts=2)


def _intervals(found: Sequence[Curve], betas: Sequence[float]) -> Grid:
    rows = [[c.model, c.way, *(_interval(c, beta) for beta in betas), c.harm.unit] for c in found]
    return Grid(headers=["model", "pruned", *(f"beta {beta:g}" for beta in betas), "in"], rows=rows, texts=2)


def _interval(curve: Curve, beta: float) -> str:
    if beta not in curve.rows:
        return DASH
    return interval(mean_interval([curve.harm.of(harm) for harm in curve.harms(beta).values()]))
