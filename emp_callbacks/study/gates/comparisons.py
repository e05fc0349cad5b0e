"""The tests of `emp gates`: three planned ones, paired over seeds, and what stands beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from emp_callbacks.study.gates.arms import CURVE_ARM, LEARNED, curve_counts
from emp_callbacks.study.once.results import Results, Row
from emp_callbacks.study.report.statistics import (
    SIGNIFICANCE,
    PairedDifference,
    adjusted,
    paired_difference,
)

__all__ = [
    "Arms",
    "Planned",
    "adapts_at",
    "bends",
    "best_learned",
    "between",
    "by_token",
    "mean_bends",
    "name_of",
    "planned",
    "verdict",
]

Values = dict[int, float]
"""Seed -> value."""


class Arms:
    """The rows of a study, by what they are about."""

    def __init__(self, results: Results) -> None:
        rows: Sequence[Row] = results["rows"]
        self.models = {row["seed"]: row for row in rows if row["kind"] == "model"}
        self.by_token = [row for row in rows if row["kind"] == "by_token"]
        self.seeds = list(self.models)
        self._arms: dict[tuple[str, int, int], list[Row]] = {}
        for row in rows:
            if row["kind"] == "arm":
                self._arms.setdefault((row["arm"], row["keep"], row["seed"]), []).append(row)
        self.n: int = next(iter(self.models.values()))["n"]

    def budget(self, name: str, seed: int) -> int:
        """Return the heads of a budget: "K1", EMP's own count of that seed, or "K2", a quarter."""
        return int(self.models[seed]["keep"]) if name == "K1" else max(1, self.n // 4)

    def rows(self, arm: str, budget: str) -> dict[int, list[Row]]:
        """Return seed -> rows of an arm at a budget, one for each draw; arm Z has all heads at any."""
        keep = {seed: self.n if arm == "Z" else self.budget(budget, seed) for seed in self.seeds}
        return {seed: found for seed in self.seeds if (found := self._arms.get((arm, keep[seed], seed)))}

    def values(self, arm: str, budget: str, key: str = "test_loss") -> Values:
        """Return seed -> value of an arm at a budget, the mean over draws."""
        return {seed: fmean(row[key] for row in rows) for seed, rows in self.rows(arm, budget).items()}

    def curve(self, seed: int) -> dict[int, float]:
        """Return heads kept -> test loss of the arm that is measured at many counts; with all heads that of arm Z."""
        counts = sorted({*curve_counts(self.n), self.budget("K1", seed)})
        points = [(CURVE_ARM, keep) for keep in counts] + [("Z", self.n)]
        return {
            keep: self._arms[arm, keep, seed][0]["test_loss"] for arm, keep in points if (arm, keep, seed) in self._arms
        }


def best_learned(arms: Arms, budget: str) -> str | None:
    """Return the arm with gates whose mean loss on the validation text is lowest: the test text has no say."""
    means = {arm: fmean(values.values()) for arm in LEARNED if (values := arms.values(arm, budget, "val_loss"))}
    return min(means, key=lambda arm: means[arm]) if means else None


def bends(curve: Mapping[int, float], n: int) -> dict[int, float]:
    """Return by how much a curve is steeper below each inner count of heads than above it, per n / 8 heads, in nats.

    That is the loss that a lower count costs per head, less what a higher one saves per head. Both are the next ones
    that are at least n / 8 heads away, or the last one where none is: over one head a slope would be noise.

    Examples:
        >>> bends({4: 3.0, 8: 2.0, 16: 1.0}, 32)
        {8: 0.5}
    """
    counts = sorted(curve)
    found = {}
    for at in counts[1:-1]:
        low = max((one for one in counts if one <= at - n / 8), default=counts[0])
        high = min((one for one in counts if one >= at + n / 8), default=counts[-1])
        lost, saved = (curve[low] - curve[at]) / (at - low), (curve[at] - curve[high]) / (high - at)
        found[at] = (lost - saved) * n / 8
    return found


@dataclass(frozen=True, kw_only=True)
class Planned:
    """One planned comparison.

    Attributes:
        name: Such as "P1".
        says: What is compared.
        difference: Paired over seeds, nats; None without runs.
        margin: Nats that do not matter.
    """

    name: str
    says: str
    difference: PairedDifference | None
    margin: float

    @property
    def verdict(self) -> str:
        """What it shows."""
        return verdict(self.difference, self.margin)


def planned(arms: Arms, margin: float, budget: str = "K1") -> list[Planned]:
    """Return P1 (E - D), P2 (best learned - B) and P3 (the bend of the curve at EMP's count), Holm over the three."""
    best = best_learned(arms, budget)
    bend = {seed: bends(arms.curve(seed), arms.n).get(arms.budget("K1", seed)) for seed in arms.seeds}
    known = {seed: value for seed, value in bend.items() if value is not None}
    tests = [
        paired_difference(arms.values("E", budget), arms.values("D", budget)),
        paired_difference(arms.values(best, budget), arms.values("B", budget)) if best else None,
        # The knee bends the curve up: less is better, as for a loss.
        paired_difference(dict.fromkeys(known, 0.0), known),
    ]
    says = [
        "E - D: gates from EMP's scores less gates that begin open",
        f"{best or 'best'} - B: the best gates (on validation text) less EMP's heads, trained on alike",
        "saved by N/8 heads above K1 less lost by as many below it (arm F)",
    ]
    names = ("P1", "P2", "P3")
    return [
        Planned(name=name, says=text, difference=test, margin=margin)
        for name, text, test in zip(names, says, adjusted(tests), strict=True)
    ]


def verdict(difference: PairedDifference | None, margin: float) -> str:
    """Return "better" or "worse" where p (Holm's, if adjusted) < .05, "no benefit" where the 95 % interval lies within
    the margin, and "not decided" otherwise.
    """  # noqa: D205
    if difference is None:
        return "not measured"
    p = difference.p_value if difference.p_holm is None else difference.p_holm
    if p is not None and p < SIGNIFICANCE:
        return "better" if difference.mean < 0 else "worse"
    if difference.low is None or difference.high is None:
        return "not decided"
    within = -margin < difference.low and difference.high < margin
    return "no benefit" if within else "not decided"


def adapts_at(arms: Arms, margin: float) -> list[float]:
    """Return the betas at which each token's own count beats both a fixed one and a shuffled one by the margin."""
    return [
        beta
        for beta in sorted({row["beta"] for row in arms.by_token})
        if all(_beats(arms, beta, other, margin) for other in ("B2", "B3"))
    ]


def by_token(arms: Arms, beta: float, variant: str, key: str = "test_loss") -> Values:
    """Return seed -> value of one way of counting heads by token."""
    return {r["seed"]: r[key] for r in arms.by_token if (r["beta"], r["variant"]) == (beta, variant)}


def _beats(arms: Arms, beta: float, other: str, margin: float) -> bool:
    found = paired_difference(by_token(arms, beta, "B1"), by_token(arms, beta, other))
    return found is not None and found.high is not None and found.high < -margin


def between(arms: Arms, one: str, other: str, budget: str) -> PairedDifference | None:
    """Return one arm's test loss less another's at a budget, paired over seeds."""
    return paired_difference(arms.values(one, budget), arms.values(other, budget))


def mean_bends(arms: Arms) -> dict[str, float]:
    """Return the mean bend at each count of the curve, by the count's name."""
    found: dict[str, list[float]] = {}
    for seed in arms.seeds:
        for keep, bend in bends(arms.curve(seed), arms.n).items():
            found.setdefault(name_of(arms, seed, keep), []).append(bend)
    return {name: fmean(values) for name, values in found.items()}


def name_of(arms: Arms, seed: int, keep: int) -> str:
    """Return how a count of heads is called: a seed's own one goes by K1."""
    return "K1" if keep == arms.budget("K1", seed) else f"{keep} heads"
