"""What the studies on trained models found: rows, harm, curves over beta, cases of criteria."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean
from typing import Any

from emp_callbacks.config import EMPConfig
from emp_callbacks.trajectory import PruneEvent

__all__ = ["Case", "Curve", "Harm", "Results", "Row", "cases", "curves", "harms_of", "outcome"]

Results = Mapping[str, Any]
Row = dict[str, Any]


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


@dataclass(frozen=True, kw_only=True)
class Harm:
    """What pruning does to a study's metric: points of an accuracy, percent of any other metric.

    Attributes:
        metric: Name of the test metric.
        higher_is_better: Its direction.
    """

    metric: str
    higher_is_better: bool

    @property
    def unit(self) -> str:
        """Of the change."""
        return "points" if "accuracy" in self.metric else "%"

    def change(self, before: float, after: float) -> float:
        """Return the change of the metric in `unit`, with the metric's own sign."""
        return 100 * (after - before if self.unit == "points" else after / before - 1)

    def of(self, change: float) -> float:
        """Return a change as harm: positive where the metric gets worse."""
        return -change if self.higher_is_better else change


def harms_of(results: Mapping[str, Any]) -> dict[str, Harm]:
    """Return model -> how its metric is read."""
    return {m["arm"]: Harm(metric=m["metric"], higher_is_better=m["higher_is_better"]) for m in results["models"]}


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

    @property
    def criterion(self) -> str:
        """By which was scored."""
        return str(next(iter(self.rows.values()))[0]["criterion"])

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


class Case:
    """One model and target over all criteria and seeds.

    Args:
        model: Name.
        target: What is pruned.
        harm: How the metric is read.
        rows: criterion -> rows of the seeds.
    """

    def __init__(self, model: str, target: str, harm: Harm, rows: Mapping[str, Sequence[Row]]) -> None:
        self.model, self.target, self.harm, self.rows = model, target, harm, rows

    def mean(self, criterion: str, key: str) -> float:
        """Return the mean of a column over seeds."""
        return fmean(row[key] for row in self.rows[criterion])

    def changes(self, criterion: str, after: str = "after") -> list[float]:
        """Return the change of the metric for every seed."""
        return [self.harm.change(row["before"], row[after]) for row in self.rows[criterion]]

    def jaccard(self, one: str, other: str, which: str = "matched", value: str = "jaccard") -> float:
        """Return the mean overlap of two criteria's masks over seeds; 1 with itself."""
        if one == other:
            return 1.0
        found = [
            row["overlaps"][b][which][value]
            for a, b in ((one, other), (other, one))
            for row in self.rows[a]
            if b in row["overlaps"]
        ]
        return fmean(found)


def cases(results: Results) -> list[Case]:
    """Return a case for each model and target, in the order of the results."""
    harms = harms_of(results)
    grouped: dict[tuple[str, str], dict[str, list[Row]]] = {}
    for row in results["rows"]:
        grouped.setdefault((row["model"], row["target"]), {}).setdefault(row["criterion"], []).append(row)
    return [Case(model, target, harms[model], rows) for (model, target), rows in grouped.items()]
