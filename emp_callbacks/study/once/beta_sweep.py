"""`emp sweep-beta`: trained models are pruned once for each beta. Is beta = 1 where the metric begins to fall?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from emp_callbacks.config import EMPConfig
from emp_callbacks.pruning.signatures import cliff_without_sparsity, nearly_all
from emp_callbacks.study.once import plots
from emp_callbacks.study.once.dense_models import DenseModel, tested
from emp_callbacks.study.once.results import Curve, Results, Row, curves, outcome
from emp_callbacks.study.once.seen import sweep_seen
from emp_callbacks.study.once.study import OnCase, OnceStudy
from emp_callbacks.study.report.page import DASH, Grid, Page, Section, interval, number
from emp_callbacks.study.report.statistics import mean_interval, paired_difference

__all__ = ["BETAS", "beta_sweep"]

BETAS = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0)  # those of the paper


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
    return OnceStudy(command="sweep-beta", settings=settings, measure=measure, page=page, check=_pruning, shown=shown)


def _pruning(recipe: EMPConfig, settings: Mapping[str, Any]) -> EMPConfig:
    """Return what is pruned of a recipe's model, at the recipe's own beta."""
    return recipe.once(**settings["overrides"])


def measure(dense: DenseModel, settings: Mapping[str, Any], on_case: OnCase) -> list[Row]:
    """Return one row per beta."""
    config, metric = _pruning(dense.training.recipe_config, settings), dense.recipe.study.metric
    rows = []
    for done, beta in enumerate(settings["betas"]):
        on_case(done, len(settings["betas"]))
        pruner = dense.pruner(config.once(beta=beta))
        found = outcome(pruner.refresh(), pruner.config)
        rows.append({**found, **tested(dense, metric, dense.test(pruner))})
    return rows


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
                text="Above: change of the metric, on one axis for all models, even up to 1 and logarithmic beyond; "
                "worse is lower, so that the axis of a metric whose lower values are better is turned over. Below: "
                "density. Line: mean over seeds. Band: lowest to highest seed. At 0: dense.",
                draw=partial(plots.plot_beta_sweep, found),
                seen=partial(sweep_seen, found),
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
    shown = f"{number(at_one, 2, sign=True)} {unit}"
    return f"{name}: {1 - curve.mean(1.0, 'density'):.1%} pruned at beta = 1 for {shown} of harm; {where}."


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
            shown = interval(difference)
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
