"""`emp compare-criteria`: one trained model, pruned once by every criterion that fits. How much, and which parts?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import combinations
from statistics import fmean
from typing import Any

import torch
from scipy import stats
from torch import Tensor

from emp_callbacks.config import EMPConfig
from emp_callbacks.criteria import fitting_criteria
from emp_callbacks.pruning.signatures import criteria_disagree, uniform_scores
from emp_callbacks.study.once import plots
from emp_callbacks.study.once.dense_models import DenseModel, known_criteria, tested
from emp_callbacks.study.once.results import Case, Results, Row, cases, outcome
from emp_callbacks.study.once.seen import criteria_seen
from emp_callbacks.study.once.study import OnCase, OnceStudy
from emp_callbacks.study.report.page import DASH, Grid, Page, Section, interval, number
from emp_callbacks.study.report.statistics import mean_interval
from emp_callbacks.trajectory import certified_loss_change

__all__ = ["criteria_comparison", "overlap"]


def criteria_comparison(
    *,
    targets: Sequence[str] | None = None,
    density: float = 0.5,
    batches: int = 32,
    scope: str | None = None,
) -> OnceStudy:
    """Return the study.

    Args:
        targets: What is pruned; default each recipe's target.
        density: Fraction kept where all criteria keep alike many, in (0, 1).
        batches: Training batches that criteria read, >= 1.
        scope: Where scores compete; default each target's own, or the recipe's.

    Raises:
        ValueError: An argument is invalid, or no criterion fits a target.
    """
    EMPConfig(density=density, evidence_steps=batches)
    for target in targets or ():
        EMPConfig(target=target)
        if target in ("features", "attention_edges"):
            raise ValueError(f"target {target!r} is masked in the forward pass; compare weights, heads or neurons")
    settings = {"targets": list(targets) if targets else None, "density": density, "batches": batches, "scope": scope}
    return OnceStudy(command="compare-criteria", settings=settings, measure=measure, page=page, check=check)


def check(recipe: EMPConfig, settings: Mapping[str, Any]) -> None:
    """Raise ValueError where a recipe does not go with the targets or the scope."""
    for target in settings["targets"] or [recipe.target]:
        _config(recipe, target, None, settings)


def measure(dense: DenseModel, settings: Mapping[str, Any], on_case: OnCase) -> list[Row]:
    """Return one row per target and criterion, with its overlaps with the criteria before it."""
    recipe = dense.training.recipe_config
    targets = settings["targets"] or [recipe.target]
    names = [(t, criterion) for t in targets for criterion in known_criteria(dense, t, fitting_criteria(t))]
    rows: list[Row] = []
    kept: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}
    for done, (target, criterion) in enumerate(names):
        on_case(done, len(names))
        config = _config(recipe, target, criterion, settings)
        row, own, matched = _pruned(dense, config, settings["density"])
        row["overlaps"] = {
            other: {"own": overlap(own, kept[target, other][0]), "matched": overlap(matched, kept[target, other][1])}
            for t, other in kept
            if t == target
        }
        kept[target, criterion] = own, matched
        rows.append(row)
    return rows


def _config(recipe: EMPConfig, target: str, criterion: str | None, settings: Mapping[str, Any]) -> EMPConfig:
    chosen = {"target": target, "criterion": criterion, "evidence_steps": settings["batches"], "beta": 1.0}
    scope = {} if settings["scope"] is None else {"scope": settings["scope"]}
    config = recipe.once(**chosen, **scope)
    return config.once(certify=config.can_certify)


def _pruned(dense: DenseModel, config: EMPConfig, density: float) -> tuple[Row, Tensor, Tensor]:
    """Return the row of a criterion, and its masks at N_eff and at the common density."""
    metric = dense.recipe.study.metric
    pruner = dense.pruner(config)
    events = pruner.refresh()
    certificates = [layer.certificate for event in events for layer in event.layers if layer.certificate]
    row = {**outcome(events, config), **tested(dense, metric, dense.test(pruner))}
    row["certified"] = [c.relative[0] for c in certificates]
    row["measured"] = [c.relative[1] for c in certificates]
    row["loss_change_bound"] = certified_loss_change(events)
    row["warnings"] = uniform_scores(events, f"{dense.name} {config.target}")
    own = _flat(pruner.masks)
    alike = dense.pruner(config.once(density=density, certify=False))
    alike.refresh()
    after = dense.test(alike)
    return {**row, "matched_after": after[metric], "matched_loss": after.get("test/loss")}, own, _flat(alike.masks)


def _flat(masks: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([mask.reshape(-1).cpu() for mask in masks.values()])


def overlap(one: Tensor, other: Tensor) -> dict[str, float]:
    """Return how alike two masks are: Jaccard's index of what they keep, and that of independent masks as dense.

    Args:
        one: Shape (n,), bool, True = kept.
        other: The same.

    Examples:
        >>> overlap(torch.tensor([True, True, False, False]), torch.tensor([True, False, True, False]))
        {'jaccard': 0.3333333333333333, 'chance': 0.3333333333333333}
    """
    both, either = int((one & other).sum()), int((one | other).sum())
    p, q = float(one.double().mean()), float(other.double().mean())
    expected = p + q - p * q
    return {"jaccard": both / either if either else 1.0, "chance": p * q / expected if expected else 1.0}


def page(results: Results) -> Page:
    """Return the findings."""
    found, density = cases(results), results["settings"]["density"]
    seeds = sorted({row["seed"] for row in results["rows"]})
    return Page(
        title="Criteria compared on finished models",
        summary=f"Models {', '.join(dict.fromkeys(case.model for case in found))}; seeds {', '.join(map(str, seeds))}; "
        f"each criterion at its own N_eff (beta = 1) and at density {density:g}; no training after pruning.",
        headline=_headline(found),
        findings=[*(_finding(case, density) for case in found), *_does_n_eff_rank(found, density)],
        warnings=[warning for case in found for warning in _warnings(case, density)],
        sections=[
            Section(
                heading="N_eff, density and metric by criterion, mean over seeds",
                text="Change: accuracy in points, other metrics in percent of the dense value, [95 % interval]. "
                "Output error: median over layers of what is certified, and measured, relative to the output. "
                "Loss bound: certified first-order change.",
                grid=_table(found, density),
            ),
            Section(
                heading=f"Overlap of the masks at density {density:g}",
                text="Jaccard's index of the kept components; in brackets that of independent masks.",
                grid=_overlaps(found),
            ),
            Section(
                heading="Criteria side by side",
                text="For each model: N_eff / N; the change of the metric at N_eff (filled) and at the common density "
                "(open), a point for each seed, on one axis for all models, even up to 1 and logarithmic beyond; Jaccard's "
                "index of the masks at the common density.",
                draw=partial(plots.plot_criteria, found, density),
                seen=partial(criteria_seen, found, density),
                file="compare_criteria.png",
            ),
        ],
    )


def _informed(case: Case) -> list[str]:
    return [criterion for criterion in case.rows if criterion != "random"]


def _headline(found: Sequence[Case]) -> str:
    ratios = []
    for case in found:
        fractions = [case.mean(criterion, "n_eff_fraction") for criterion in _informed(case)]
        if len(fractions) > 1 and min(fractions) > 0:
            ratios.append(max(fractions) / min(fractions))
    if not ratios:
        return "No model was scored by two criteria."
    return f"Criteria differ in N_eff by a factor of {min(ratios):.2f} to {max(ratios):.2f} on one model."


def _does_n_eff_rank(found: Sequence[Case], density: float) -> list[str]:
    """Say whether criteria with a smaller N_eff are the better ones: the paper takes N_eff for a sign of that."""
    ranks = []
    for case in found:
        pairs = [
            (case.mean(criterion, "n_eff_fraction"), fmean(map(case.harm.of, case.changes(criterion, "matched_after"))))
            for criterion in _informed(case)
        ]
        if len(pairs) > 2 and all(len({pair[i] for pair in pairs}) > 1 for i in (0, 1)):
            ranks.append(float(stats.spearmanr([a for a, _ in pairs], [b for _, b in pairs]).statistic))
    if not ranks:
        return []
    mean, low, high = (number(value, 2, sign=True) for value in (fmean(ranks), min(ranks), max(ranks)))
    return [
        f"Is a smaller N_eff the sign of a better criterion? Rank correlation of N_eff / N with the harm at density "
        f"{density:g} within a case (random left out): mean {mean}, from {low} to "
        f"{high} over {len(ranks)} cases; +1 would say yes."
    ]


def _finding(case: Case, density: float) -> str:
    def harm(criterion: str) -> float:
        return fmean(map(case.harm.of, case.changes(criterion, "matched_after")))

    informed = _informed(case)
    n_eff = ", ".join(f"{criterion} {case.mean(criterion, 'n_eff_fraction'):.3f}" for criterion in informed)
    best = min(case.rows, key=harm)
    return (
        f"{case.model}, {case.target}: N_eff / N is {n_eff}; at density {density:g} {best} loses least "
        f"({number(harm(best), 2, sign=True)} {case.harm.unit})."
    )


def _warnings(case: Case, density: float) -> list[str]:
    fractions = {criterion: case.mean(criterion, "n_eff_fraction") for criterion in _informed(case)}
    disagree = [
        # The usual remedy is to make this very page.
        f"{warning.partition(': ')[0]}: see below what each costs where all keep as many, change at {density:g}"
        for warning in criteria_disagree(f"{case.model} {case.target}", fractions)
    ]
    return [*disagree, *(warning for rows in case.rows.values() for warning in rows[0]["warnings"])]


def _table(found: Sequence[Case], density: float) -> Grid:
    rows = []
    for case in found:
        for criterion, measured in case.rows.items():
            rows.append([
                case.model,
                case.target,
                criterion,
                f"{measured[0]['n']:,}",
                number(case.mean(criterion, "n_eff_fraction"), 3),
                number(case.mean(criterion, "density"), 3),
                number(case.mean(criterion, "preserved_mass"), 3),
                interval(mean_interval(case.changes(criterion))),
                interval(mean_interval(case.changes(criterion, "matched_after"))),
                _errors(measured),
                _loss_bound(measured),
            ])  # fmt: skip
    headers = ["model", "target", "criterion", "N", "N_eff / N", "density", "mass kept", "change"]
    headers += [f"change at {density:g}", "output error <=, measured", "loss bound"]
    return Grid(headers=headers, rows=rows, texts=3)


def _errors(rows: Sequence[Row]) -> str:
    certified = [value for row in rows for value in row["certified"]]
    measured = [value for row in rows for value in row["measured"]]
    if not certified or None in measured or rows[0]["loss_change_bound"] is not None:
        return DASH
    return f"{_median(certified):.1%}, {_median(measured):.1%}"


def _median(values: Sequence[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).median())


def _loss_bound(rows: Sequence[Row]) -> str:
    found = [row["loss_change_bound"] for row in rows]
    return DASH if None in found else f"{fmean(found):.3g}"


def _overlaps(found: Sequence[Case]) -> Grid:
    rows = []
    for case in found:
        for one, other in combinations(case.rows, 2):
            shown = (f"{case.jaccard(one, other):.3f} ({case.jaccard(one, other, value='chance'):.3f})",)
            rows.append([case.model, case.target, one, other, *shown, f"{case.jaccard(one, other, 'own'):.3f}"])
    headers = ["model", "target", "criterion", "and", "at one density", "each at its N_eff"]
    return Grid(headers=headers, rows=rows, texts=4)
