"""The tables of `emp gates`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from statistics import fmean
from typing import Any

from emp_callbacks.study.gates.arms import ARMS, GATED
from emp_callbacks.study.gates.comparisons import (
    Arms,
    Planned,
    best_learned,
    between,
    by_token,
    mean_bends,
    name_of,
    verdict,
)
from emp_callbacks.study.gates.token_counts import VARIANTS
from emp_callbacks.study.report.metric_format import p_text
from emp_callbacks.study.report.page import DASH, Grid, interval, number
from emp_callbacks.study.report.statistics import PairedDifference, adjusted, mean_interval, paired_difference

__all__ = [
    "arms_grid",
    "by_token_grid",
    "curve_grid",
    "gates_grid",
    "initialisation_grid",
    "knee",
    "p_of",
    "planned_grid",
    "shown",
]

_DECIMALS = 4
BUDGETS = ("K1", "K2")

_KNEE = {"better": "is at a knee of the curve", "worse": "is where the curve bends the other way",
         "no benefit": "is at no knee of the curve"}  # fmt: skip


def knee(tests: Sequence[Planned]) -> str:
    """Return what the third comparison shows of EMP's own count, as text."""
    return _KNEE.get(tests[2].verdict, f"at a knee: {tests[2].verdict}")


def shown(found: PairedDifference | None) -> str:
    """Return a difference in nats with its interval, as text."""
    if found is None:
        return DASH
    ends = (
        "" if found.low is None else f" [{number(found.low, _DECIMALS, True)}, {number(found.high, _DECIMALS, True)}]"
    )
    return f"{number(found.mean, _DECIMALS, True)}{ends}"


def p_of(found: PairedDifference | None) -> str:
    """Return the p of a difference, as text; Holm's where it is adjusted."""
    if found is None or found.p_value is None:
        return "no test"
    name, p = ("p", found.p_value) if found.p_holm is None else ("Holm p", found.p_holm)
    return f"{name} {'' if p < 0.001 else '= '}{p_text(p)}".replace("<", "< ")


def planned_grid(tests: Sequence[Planned]) -> Grid:
    """Return the table of the planned comparisons."""
    rows = [
        [t.name, t.says, shown(t.difference), p_of(t.difference), knee(tests) if t.name == "P3" else t.verdict]
        for t in tests
    ]
    return Grid(headers=["test", "difference", "nats [95 %]", "p", "verdict"], rows=rows, texts=2)


def arms_grid(arms: Arms, margin: float) -> Grid:
    """Return the table of every arm at both budgets."""
    rows = []
    for budget in BUDGETS:
        others = [arm for arm in ARMS if arm != "B" and arms.values(arm, budget)]
        tests = dict(zip(others, adjusted([between(arms, arm, "B", budget) for arm in others]), strict=True))
        best = best_learned(arms, budget)
        for arm, says in ARMS.items():
            values = arms.values(arm, budget)
            if not values:
                continue
            mean = fmean(values.values())
            rows.append([
                budget,
                arm,
                says + (" (best on validation text)" if arm == best else ""),
                number(mean, _DECIMALS),
                number(math.exp(mean), 3),
                number(fmean(arms.values(arm, budget, "val_loss").values()), _DECIMALS),
                shown(tests.get(arm)),
                p_of(tests[arm]) if arm in tests else DASH,
                verdict(tests[arm], margin) if arm in tests else DASH,
                number(fmean(arms.values(arm, budget, "seconds").values()), 0),
            ])  # fmt: skip
    headers = [
        "heads",
        "arm",
        "what it is",
        "test loss",
        "perplexity",
        "val loss",
        "less B [95 %]",
        "p",
        "verdict",
        "s",
    ]
    return Grid(headers=headers, rows=rows, texts=3)


def initialisation_grid(arms: Arms, margin: float) -> Grid:
    """Return the table of what EMP's scores do as what gates begin with."""
    pairs = [("E", "D"), ("E", "E'"), ("G", "F")]
    rows = []
    for budget in BUDGETS:
        for one, other in pairs:
            found = between(arms, one, other, budget)
            rows.append([budget, f"{one} - {other}", shown(found), p_of(found), verdict(found, margin)])
    return Grid(headers=["heads", "difference", "nats [95 %]", "p", "verdict"], rows=rows, texts=2)


def curve_grid(arms: Arms) -> Grid:
    """Return the table of the loss through the number of heads."""
    points: dict[str, list[tuple[int, float]]] = {}
    for seed in arms.seeds:
        for keep, loss in arms.curve(seed).items():
            points.setdefault(name_of(arms, seed, keep), []).append((keep, loss))
    mean = mean_bends(arms)
    ordered = sorted(points.items(), key=lambda item: fmean(keep for keep, _ in item[1]))
    rows = [
        [
            name,
            f"{fmean(keep for keep, _ in found):.1f}",
            _loss([loss for _, loss in found]),
            number(mean.get(name), _DECIMALS, True),
        ]
        for name, found in ordered
    ]
    return Grid(headers=["kept", "heads", "test loss [95 %]", "bend"], rows=rows)


def _loss(values: Sequence[float]) -> str:
    return interval(mean_interval(values), _DECIMALS).replace("+", "")


def by_token_grid(arms: Arms) -> Grid:
    """Return the table of the ways of counting heads by token."""
    rows = []
    for beta in sorted({row["beta"] for row in arms.by_token}):
        own = by_token(arms, beta, "B1")
        for variant, says in VARIANTS.items():
            values = by_token(arms, beta, variant)
            found = None if variant == "B1" else paired_difference(own, values)
            rows.append([
                f"{beta:g}",
                variant,
                says,
                number(fmean(by_token(arms, beta, variant, "heads").values()), 2),
                number(fmean(values.values()), _DECIMALS),
                shown(found),
                p_of(found) if found else DASH,
                *(_correlations(arms, beta) if variant == "B1" else (DASH, DASH)),
            ])  # fmt: skip
    headers = [
        "beta",
        "way",
        "what it is",
        "heads",
        "test loss",
        "B1 less it [95 %]",
        "p",
        "Spearman with loss",
        "for equal positions",
    ]
    return Grid(headers=headers, rows=rows, texts=3)


def _correlations(arms: Arms, beta: float) -> tuple[str, str]:
    """Return Spearman's correlation of a token's count with its loss in the dense model, plain and partial."""
    found = []
    for key in ("spearman", "partial_spearman"):
        known = [value for value in by_token(arms, beta, "B1", key).values() if value is not None]  # None: all alike
        found.append(interval(mean_interval(known)) if known else DASH)
    return found[0], found[1]


def gates_grid(arms: Arms) -> Grid:
    """Return the table of how gates end."""
    rows = []
    for budget in BUDGETS:
        for arm in ARMS:
            found = arms.rows(arm, budget)
            if arm in "ZAR" or not found:
                continue
            gated = arm in GATED
            rows.append([
                budget,
                arm,
                number(fmean(arms.values(arm, budget, "expected").values()), 2) if gated else DASH,
                interval(mean_interval([*arms.values(arm, budget, "spearman").values()])) if gated else DASH,
                _jaccard(arms, arm, budget),
                _steps_to(arms, arm, budget),
            ])  # fmt: skip
    headers = ["heads", "arm", "expected", "Spearman [95 %]", "Jaccard (random)", "steps"]
    return Grid(headers=headers, rows=rows, texts=2)


def _jaccard(arms: Arms, arm: str, budget: str) -> str:
    kept = {seed: set(rows[0]["kept"]) for seed, rows in arms.rows(arm, budget).items()}
    pairs = [(kept[a], kept[b]) for a, b in combinations(kept, 2)]
    if not pairs:
        return DASH
    chance = fmean((both := len(a) * len(b) / arms.n) / (len(a) + len(b) - both) for a, b in pairs)
    return f"{fmean(len(a & b) / len(a | b) for a, b in pairs):.2f} ({chance:.2f})"


def _steps_to(arms: Arms, arm: str, budget: str) -> str:
    """Return the mean number of steps until the loss at D's end is reached, and by how many seeds."""
    ends = {seed: rows[0]["curve"][-1][1] for seed, rows in arms.rows("D", budget).items()}
    found = []
    for seed, end in ends.items():
        reached = [step for step, loss in _hardened(arms.rows(arm, budget)[seed][0], arm) if loss <= end]
        found += reached[:1]
    return f"{fmean(found):.0f} ({len(found)} of {len(ends)})" if found else DASH


def _hardened(row: Mapping[str, Any], arm: str) -> list[tuple[int, float]]:
    """Return the course of the loss of an arm, as far as it has the heads of its end."""
    return [(step, loss) for step, loss in row["curve"] if arm not in GATED or step > row["gated_steps"]]
