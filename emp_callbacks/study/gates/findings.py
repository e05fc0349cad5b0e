"""What `emp gates` found: the page."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from statistics import fmean

from emp_callbacks.study.gates import plots
from emp_callbacks.study.gates.comparisons import (
    Arms,
    Planned,
    adapts_at,
    between,
    by_token,
    mean_bends,
    planned,
    verdict,
)
from emp_callbacks.study.gates.tables import (
    arms_grid,
    by_token_grid,
    curve_grid,
    gates_grid,
    initialisation_grid,
    knee,
    p_of,
    planned_grid,
    shown,
)
from emp_callbacks.study.once.results import Results
from emp_callbacks.study.report.page import Page, Section
from emp_callbacks.study.report.statistics import paired_difference

__all__ = ["page"]


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
                grid=planned_grid(tests),
            ),
            Section(
                heading="Every arm at both budgets",
                text="K1: EMP's own count. K2: a quarter of the heads. All arms train on for the same steps, on the "
                "same batches, but A, which does not. Less B: paired by seed; p adjusted by Holm within a budget. s: "
                "seconds.",
                grid=arms_grid(arms, margin),
            ),
            Section(
                heading="What EMP's scores are worth as what gates begin with",
                text="Permuted: the same probabilities, on other heads. EMP's scores matter only if E is better than "
                "both. p is of each alone.",
                grid=initialisation_grid(arms, margin),
            ),
            Section(
                heading="Loss through the number of heads, arm F",
                text="Bend: what N/8 heads fewer cost, less what as many more save, by the next counts so far "
                "away. K1 is EMP's own count, which differs between seeds: its row has the means.",
                grid=curve_grid(arms),
            ),
            Section(
                heading="How many heads a token keeps",
                text="Nothing is trained. In each row as many heads on average. B1 less the others: below 0, B1 is "
                "better. Useful: below both B2 and B3 by more than the margin at two beta.",
                grid=by_token_grid(arms),
            ),
            Section(
                heading="Gates: where they end, how fast, how alike",
                text="Expected: gates open before they are hardened. Spearman: of P(open) then with EMP's scores. "
                "Jaccard: of the heads kept with two seeds, and of random ones. Steps: until the validation loss of "
                "D's end is reached with hardened gates, mean of the seeds that reach it.",
                grid=gates_grid(arms),
                printed=False,
            ),
            Section(
                heading="Loss by arm, through the number of heads, and by token",
                text="Points: seeds, those of one seed joined. Bars: means. Bands: 95 % intervals.",
                draw=partial(plots.plot_gates, arms),
                seen=partial(plots.gates_seen, arms),
                file="gates.png",
            ),
        ],
    )


def _summary(results: Results, arms: Arms) -> str:
    settings = results["settings"]
    trained = [model["seconds"] for model in results["models"]]
    spent = sum(trained) + sum(r.get("seconds", 0.0) for r in results["rows"])
    return (
        f"{', '.join(dict.fromkeys(m['arm'] for m in results['models']))}, seeds {', '.join(map(str, arms.seeds))}; "
        f"{arms.n} heads, of which EMP-Taylor keeps {_range(arms)}; each arm trains on for {settings['steps']} steps "
        f"at up to {settings['lr_share']:.2g} of the learning rate, gates are hardened after "
        f"{settings['gated_steps']}. A model was trained in {fmean(trained):.0f} s; all took {spent / 60:.0f} "
        "core-minutes."
    )


def _range(arms: Arms) -> str:
    counts = [arms.budget("K1", seed) for seed in arms.seeds]
    return str(counts[0]) if len(set(counts)) == 1 else f"{min(counts)} to {max(counts)}"


# ---- in words -------------------------------------------------------------------------------------------------------


def _headline(arms: Arms, tests: Sequence[Planned], margin: float) -> str:
    useful = adapts_at(arms, margin)
    begins = "is" if _is_initialisation(arms, tests[0]) else "is not shown to be"
    return (
        f"At EMP's own count ({_range(arms)} of {arms.n} heads) learned gates beside EMP's heads: {tests[1].verdict}; "
        f"EMP {begins} an initialisation of gates; its count {knee(tests)}; a count that follows the token "
        f"{'adapts usefully' if len(useful) > 1 else 'is not shown to adapt usefully'}."
    )


def _is_initialisation(arms: Arms, first: Planned) -> bool:
    control = between(arms, "E", "E'", "K1")
    return first.verdict == verdict(control, first.margin) == "better"


def _findings(arms: Arms, tests: Sequence[Planned]) -> list[str]:
    told = [
        f"{test.name}, {test.says}: {shown(test.difference)} nats, {p_of(test.difference)}: "
        f"{knee(tests) if test.name == 'P3' else test.verdict}."
        for test in tests
    ]
    control = between(arms, "E", "E'", "K1")
    told.append(f"E - E' (the same probabilities on other heads): {shown(control)} nats.")
    sharpest = _sharpest(arms)
    if sharpest:
        told.append(f"the curve of arm F bends most at {sharpest}.")
    for beta in sorted({row["beta"] for row in arms.by_token}):
        b1 = by_token(arms, beta, "B1")
        against = ", ".join(
            f"{other} {shown(paired_difference(b1, by_token(arms, beta, other)))}" for other in ("B2", "B3")
        )
        told.append(
            f"beta = {beta:g}: {fmean(by_token(arms, beta, 'B1', 'heads').values()):.2f} heads per token and layer; "
            f"B1 less {against} nats."
        )
    return told


def _sharpest(arms: Arms) -> str | None:
    mean = mean_bends(arms)
    return max(mean, key=lambda name: mean[name]) if mean else None


def _warnings(arms: Arms) -> list[str]:
    told = []
    if len(arms.seeds) < 4:
        told.append(f"seeds, only {len(arms.seeds)}: intervals are wide, and hardly anything is decided; run 8")
    return told
