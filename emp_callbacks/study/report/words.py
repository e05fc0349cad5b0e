"""What the words on the pages of reports mean. A page explains those that it uses, each in one sentence."""

from __future__ import annotations

import re
from collections.abc import Mapping

__all__ = ["WORDS", "words_in"]

WORDS: Mapping[str, tuple[str, str]] = {
    "EMP": (
        r"EMP",
        "Effective Model Pruning: the N_eff components with the highest scores are kept, the others are masked, that "
        "is set to 0.",
    ),
    "score": (r"scores?|scored", "how important a component is by the criterion; the higher, the sooner it is kept."),
    "N": (
        r"N(?! of)",
        "number of components, such as weights or attention heads, among which it is decided what is kept.",
    ),
    "N_eff": (
        r"N_eff",
        "the effective number: the square of the sum of all scores over the sum of their squares. It is N where all "
        "scores are equal, and 1 where a single one is not 0.",
    ),
    "beta": (r"beta", "factor on N_eff: beta times N_eff components are kept, and EMP itself has beta = 1."),
    "target": (r"target", "what is scored and pruned as one: single weights, or neurons, heads, features."),
    "criterion": (r"criteri(?:on|a)", "the rule that gives scores; magnitude takes absolute values of weights."),
    "scope": (r"scope", "the set within which scores compete: one row, one tensor, or the whole model (global)."),
    "density": (r"densit(?:y|ies)", "kept components over all, a fraction: 0.1 keeps a tenth."),
    "sparsity": (r"sparsity", "pruned components over all, a fraction: 1 less the density."),
    "preserved mass": (
        r"preserved mass|preserved score mass|mass kept",
        "sum of the scores that are kept over the sum of all scores, a fraction.",
    ),
    "mass bound": (
        r"mass bound|[Tt]ight bound|theorem 4\.2|\btight\b",
        "what theory says the preserved mass is at least: the paper's theorem for beta = 1, and the tight bound, which "
        "follows from N_eff for every beta.",
    ),
    "refresh": (r"refresh(?:es)?", "one recomputation of the masks."),
    "step": (r"optimizer steps?|\bstep\b|\bsteps\b", "one update of the weights by the optimizer."),
    "churn": (r"churn", "share of the mask's entries that a refresh changed."),
    "regrown": (r"regrown", "components that were pruned before a refresh and are kept after it."),
    "mode": (
        r"\bmode\b|training_(?:feedback|project|freeze)|EMP (?:feedback|freeze)",
        "what happens to pruned weights between refreshes. feedback: they are masked, and go on learning behind the "
        "mask. project: they are zeroed, and may grow back. freeze: they stay zero for good. observe: nothing is "
        "pruned, N_eff is only measured.",
    ),
    "arm": (r"\barms?\b", "one way of pruning in a study; this page says what each does."),
    "seed": (r"seeds?", "number from which initial weights and the order of the data are drawn; one run each."),
    "one-shot": (r"one[-_]shot", "a model that was trained dense, pruned once after its training."),
    "dense": (r"\bdense\b", "not pruned at all."),
    "reference": (r"reference", "the arm with which the others are compared."),
    "SD": (r"\bSD\b", "standard deviation over the seeds."),
    "95 % interval": (
        r"95\s%",
        "confidence interval of a mean over seeds, by Student's t: of a hundred such intervals, 95 hold the true mean.",
    ),
    "paired": (r"[Pp]aired", "differences are taken within each seed, whose runs share initial weights and batches."),
    "points": (r"\bpoints\b", "differences of percentages: from 97 % to 96 % is \u22121 point."),
    "p": (
        r"\bp\b",
        "how probable a difference at least as large would be by chance, if the two did not differ (paired t-test).",
    ),
    "Holm": (
        r"Holm",
        "p is adjusted for the number of comparisons of a table, by Holm's method, so that one in twenty "
        "tables without any true difference shows one.",
    ),
    "equivalence": (
        r"[Ee]quivalent|equivalence",
        "shown where two one-sided t-tests place the difference within a margin that was fixed before the runs.",
    ),
    "undecided": (r"undecided", "no test was possible: one seed, or equal differences in all seeds."),
    "FLOPs": (r"FLOPs", "multiplications and additions, here as multiples of those of the dense model."),
    "fairness": (r"Fairness", "conditions without which arms must not be compared."),
    "convergence": (r"Convergence", "how soon in training the validation metric is good."),
    "val \u2212 train loss": (
        r"val\s\u2212\strain loss",
        "validation loss at the last point less the mean training loss since the point before: the gap between data "
        "seen and unseen in training.",
    ),
    "init": (r"\binit\b", "fingerprint of the initial weights: equal where runs began with the same ones."),
    "batches": (
        r"\bbatches\b",
        "training examples in the order in which a run saw them; in the table of runs, their "
        "fingerprint, which is equal where they were the same.",
    ),
    "fingerprint": (r"\bfingerprint\b", "short code of the settings and of the code that a run was made with."),
    "perplexity": (r"perplexity", "e to the power of the loss per token; lower is better, 1 is perfect."),
    "harm": (
        r"\b[Hh]arm(?:ed)?\b|[Uu]nharmed",
        "what the metric loses by pruning; the opposite sign where lower is better.",
    ),
    "cliff": (r"cliff", "a beta from which on nothing is lost, while the next lower one does harm."),
    "Jaccard": (r"Jaccard", "what two masks both keep, over what at least one of them keeps: 1 if they are equal."),
    "Spearman": (
        r"Spearman|[Rr]ank correlation",
        "correlation of ranks, from \u22121 to 1; 0 if one says nothing of the other.",
    ),
    "certificate": (
        r"certificates?|certified|output error",
        "upper bound, computed with the pruning, of the error that it can cause on the examples seen.",
    ),
    "rho": (r"\brho\b", "the density, in formulas."),
    "d": (
        r"\bd\^2|\balong d\b|\|\|d\|\||g d\b",
        "the pruned weights as one vector: what pruning takes away; d^2 is its squared length.",
    ),
    "H, Tr(H)": (
        r"Tr\(H\)|\bH\b|trace",
        "matrix of the second derivatives of the loss, and its trace, the sum of its "
        "curvatures; estimated with an interval.",
    ),
    "distance form": (
        r"distance form|\bdistance\b",
        "the lemma on which the paper builds its bound, solved for the loss: (1 \u2212 rho) / (2 N rho) Tr(H) d^2.",
    ),
    "slack": (r"[Ss]lack", "how far a bound lies above what was measured: bound over measured."),
    "alignment": (r"alignment", "curvature of the loss along the pruned weights, over the mean curvature."),
    "kurtosis, Gini, variation": (
        r"kurtosis|Gini|coefficient of variation",
        "how unequal scores are: weight of extremes (0: as a normal distribution), from 0 (all equal) to 1 (one has "
        "all), and standard deviation over mean.",
    ),
    "gate": (
        r"\bgates?\b|hard concrete|[Ss]traight-through",
        "a factor between 0 and 1 on a head that is learned; a "
        "hard one is 0 or 1. Hard concrete gates are drawn at random in training; straight-through top-K gates keep "
        "the K highest and learn as if all were open.",
    ),
    "nats": (r"\bnats\b", "unit of the loss per token, with natural logarithms."),
    "K1, K2": (r"\bK[12]\b", "how many heads are kept: EMP's own count, and a quarter of all."),
    "knee, bend": (
        r"\bknee\b|\b[Bb]ends?\b",
        "where the loss begins to rise faster with each head that is taken away.",
    ),
    "token": (r"\btokens?\b", "piece of text that a language model reads at once, here a word's part or a letter."),
}
"""Word -> the pattern by which it is found, and what it means."""


def words_in(text: str) -> list[tuple[str, str]]:
    """Return the words that a page uses, with their meanings, in the order of `WORDS`.

    Args:
        text: What is to be read on the page, without tags.

    Examples:
        >>> [word for word, _ in words_in("density 0.5, churn 0.1")]
        ['density', 'churn']
    """
    return [
        (word, meaning) for word, (pattern, meaning) in WORDS.items() if re.search(rf"(?<!\w)(?:{pattern})(?!\w)", text)
    ]
