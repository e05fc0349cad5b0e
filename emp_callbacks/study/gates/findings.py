"""What `emp gates` found: the page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import combinations
from statistics import fmean
from typing import Any

from emp_callbacks.study.gates import plots
from emp_callbacks.study.gates.arms import ARMS, GATED
from emp_callbacks.study.gates.comparisons import (
    Arms,
    Planned,
    adapts_at,
    bends,
    best_learned,
    by_token,
    planned,
    verdict,
)
from emp_callbacks.study.gates.token_counts import VARIANTS
from emp_callbacks.study.once.results import Results
from emp_callbacks.study.report.page import DASH, Grid, Page, Section, interval, number
from emp_callbacks.study.report.statistics import PairedDifference, adjusted, mean_interval, paired_difference

__all__ = ["page"]

_DECIMALS = 4
BUDGETS = ("K1", "K2")


def page(results: Results) -> Page:
    """Return the findings."""
    arms, settings = Arms(results), results["settings"]
    tests, margin = planned(arms, settings["margin"]), settings["margin"]
    return Page(
        title="EMP, learned gates, and a count of heads that follows the token",
        summary=_summary(results, arms),
        headline=_headline(arms, tests, margin),
        findings=_findings(arms, tests),
        warnings=_warnings(arms),
        sections=[
            Section(
                heading="Three planned comparisons at EMP's own count of heads",
                text=f"Test loss, nats per token, paired by seed, 95 % intervals, p adjusted by Holm for the three. "
                f"No benefit: the interval lies within +-{margin:g}, fixed before the runs.",
                grid=_planned(tests),
            ),
            Section(
                heading="Every arm at both budgets",
                text="K1: EMP's own count. K2: a quarter of the heads. All arms train on for the same steps, on the "
                "same batches, but A, which does not. Less B: paired by seed; p adjusted by Holm within a budget.",
                grid=_arms(arms, margin),
            ),
            Section(
                heading="What EMP's scores are worth as what gates begin with",
                text="Permuted: the same probabilities, on other heads. EMP's scores matter only if E is better than "
                "both. p is of each alone.",
                grid=_initialisation(arms, margin),
            ),
            Section(
                heading="Loss through the number of heads, arm F",
                text="Bend: what the next lower count costs per N/8 heads, less what the next higher one saves. K1 is "
                "EMP's own count, which differs between seeds: its row has the means.",
                grid=_curve(arms),
            ),
            Section(
                heading="How many heads a token keeps",
                text="Nothing is trained. In each row as many heads on average. B1 less the others: below 0, B1 is "
                "better. Useful: below both B2 and B3 by more than the margin at two beta.",
                grid=_by_token(arms),
            ),
            Section(
                heading="Gates: where they end, how fast, how alike",
                text="Expected: gates open before they are hardened. Spearman: of P(open) then with EMP's scores. "
                "Jaccard: of the heads kept with two seeds, and of random ones. Steps: until the validation loss of "
                "D's end is reached with hardened gates, mean of the seeds that reach it.",
                grid=_gates(arms),
                printed=False,
            ),
            Section(
                heading="Loss by arm, through the number of heads, and by token",
                text="Points: seeds, those of one seed joined. Bars: means. Bands: 95 % intervals.",
                draw=partial(plots.plot_gates, arms),
                file="gates.png",
            ),
        ],
    )


def _summary(results: Results, arms: Arms) -> str:
    settings = results["settings"]
    spent = sum(m["seconds"] for m in results["models"]) + sum(r.get("seconds", 0.0) for r in results["rows"])
    return (
        f"{', '.join(dict.fromkeys(m['arm'] for m in results['models']))}, seeds {', '.join(map(str, arms.seeds))}; "
        f"{arms.n} heads, of which EMP-Taylor keeps {_range(arms)}; each arm trains on for {settings['steps']} steps "
        f"at up to {settings['lr_share']:.2g} of the learning rate, gates are hardened after "
        f"{settings['gated_steps']}; {spent / 60:.0f} core-minutes in all."
    )


def _range(arms: Arms) -> str:
    counts = [arms.budget("K1", seed) for seed in arms.seeds]
    return str(counts[0]) if len(set(counts)) == 1 else f"{min(counts)} to {max(counts)}"


# ---- in words -------------------------------------------------------------------------------------------------------

_KNEE = {"better": "is at a knee of the curve", "worse": "is where the curve bends the other way",
         "no benefit": "is at no knee of the curve"}  # fmt: skip


def _knee(tests: Sequence[Planned]) -> str:
    return _KNEE.get(tests[2].verdict, f"at a knee: {tests[2].verdict}")


def _headline(arms: Arms, tests: Sequence[Planned], margin: float) -> str:
    useful = adapts_at(arms, margin)
    begins = "is" if _is_initialisation(arms, tests[0]) else "is not shown to be"
    return (
        f"At EMP's own count ({_range(arms)} of {arms.n} heads) learned gates beside EMP's heads: {tests[1].verdict}; "
        f"EMP {begins} an initialisation of gates; its count {_knee(tests)}; a count that follows the token "
        f"{'adapts usefully' if len(useful) > 1 else 'is not shown to adapt usefully'}."
    )


def _is_initialisation(arms: Arms, first: Planned) -> bool:
    control = _between(arms, "E", "E'", "K1")
    return first.verdict == verdict(control, first.margin) == "better"


def _findings(arms: Arms, tests: Sequence[Planned]) -> list[str]:
    told = [
        f"{test.name}, {test.says}: {_shown(test.difference)} nats, {_p(test.difference)}: "
        f"{_knee(tests) if test.name == 'P3' else test.verdict}."
        for test in tests
    ]
    control = _between(arms, "E", "E'", "K1")
    told.append(f"E - E' (the same probabilities on other heads): {_shown(control)} nats.")
    sharpest = _sharpest(arms)
    if sharpest:
        told.append(f"the curve of arm F bends most at {sharpest}.")
    for beta in sorted({row["beta"] for row in arms.by_token}):
        b1 = by_token(arms, beta, "B1")
        against = ", ".join(
            f"{other} {_shown(paired_difference(b1, by_token(arms, beta, other)))}" for other in ("B2", "B3")
        )
        told.append(
            f"beta = {beta:g}: {fmean(by_token(arms, beta, 'B1', 'heads').values()):.2f} heads per token and layer; "
            f"B1 less {against} nats."
        )
    return told


def _sharpest(arms: Arms) -> str | None:
    mean = _mean_bends(arms)
    return max(mean, key=lambda name: mean[name]) if mean else None


def _mean_bends(arms: Arms) -> dict[str, float]:
    """Return the mean bend at each count of the curve, by the count's name."""
    found: dict[str, list[float]] = {}
    for seed in arms.seeds:
        for keep, bend in bends(arms.curve(seed), arms.n).items():
            found.setdefault(_name(arms, seed, keep), []).append(bend)
    return {name: fmean(values) for name, values in found.items()}


def _name(arms: Arms, seed: int, keep: int) -> str:
    return "K1" if keep == arms.budget("K1", seed) else f"{keep} heads"


def _warnings(arms: Arms) -> list[str]:
    told = []
    if len(arms.seeds) < 4:
        told.append(f"only {len(arms.seeds)} seeds: intervals are wide, and hardly anything is decided; run 8")
    return told


# ---- tables ---------------------------------------------------------------------------------------------------------


def _between(arms: Arms, one: str, other: str, budget: str) -> PairedDifference | None:
    return paired_difference(arms.values(one, budget), arms.values(other, budget))


def _shown(found: PairedDifference | None) -> str:
    if found is None:
        return DASH
    ends = (
        "" if found.low is None else f" [{number(found.low, _DECIMALS, True)}, {number(found.high, _DECIMALS, True)}]"
    )
    return f"{number(found.mean, _DECIMALS, True)}{ends}"


def _p(found: PairedDifference | None) -> str:
    if found is None or found.p_value is None:
        return "no test"
    return f"p = {found.p_value:.3f}" if found.p_holm is None else f"Holm p = {found.p_holm:.3f}"


def _planned(tests: Sequence[Planned]) -> Grid:
    rows = [
        [t.name, t.says, _shown(t.difference), _p(t.difference), _knee(tests) if t.name == "P3" else t.verdict]
        for t in tests
    ]
    return Grid(headers=["test", "difference", "nats [95 %]", "p", "verdict"], rows=rows, texts=2)


def _arms(arms: Arms, margin: float) -> Grid:
    rows = []
    for budget in BUDGETS:
        others = [arm for arm in ARMS if arm != "B" and arms.values(arm, budget)]
        tests = dict(zip(others, adjusted([_between(arms, arm, "B", budget) for arm in others]), strict=True))
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
                _shown(tests.get(arm)),
                _p(tests[arm]) if arm in tests else DASH,
                verdict(tests[arm], margin) if arm in tests else DASH,
            ])  # fmt: skip
    headers = ["heads", "arm", "", "test loss", "perplexity", "val loss", "less B [95 %]", "p", "verdict"]
    return Grid(headers=headers, rows=rows, texts=3)


def _initialisation(arms: Arms, margin: float) -> Grid:
    pairs = [("E", "D"), ("E", "E'"), ("G", "F")]
    rows = []
    for budget in BUDGETS:
        for one, other in pairs:
            found = _between(arms, one, other, budget)
            rows.append([budget, f"{one} - {other}", _shown(found), _p(found), verdict(found, margin)])
    return Grid(headers=["heads", "difference", "nats [95 %]", "p", "verdict"], rows=rows, texts=2)


def _curve(arms: Arms) -> Grid:
    points: dict[str, list[tuple[int, float]]] = {}
    for seed in arms.seeds:
        for keep, loss in arms.curve(seed).items():
            points.setdefault(_name(arms, seed, keep), []).append((keep, loss))
    mean = _mean_bends(arms)
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


def _by_token(arms: Arms) -> Grid:
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
                _shown(found),
                _p(found) if found else DASH,
                *(_correlations(arms, beta) if variant == "B1" else (DASH, DASH)),
            ])  # fmt: skip
    headers = [
        "beta",
        "",
        "",
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
    own = [row for row in arms.by_token if (row["beta"], row["variant"]) == (beta, "B1")]
    plain, partial_ = ([row[key] for row in own] for key in ("spearman", "partial_spearman"))
    return interval(mean_interval(plain)), interval(mean_interval(partial_))


def _gates(arms: Arms) -> Grid:
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
