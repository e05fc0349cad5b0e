"""Statistics of a study: intervals over seeds, differences paired by seed, fairness checks.

Intervals are per comparison (95 %, Student t). The verdicts better / worse rest on Holm-adjusted p-values of
all comparisons with the reference, so an interval may exclude 0 where the verdict is "no difference shown".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from scipy import stats

SIGNIFICANCE = 0.05
# Some float32 roundings, 6e-8 each, of the values that are subtracted: they must not pass for a variance.
ROUNDING = 1e-6
Pair = tuple[str, str | None]  # an arm and the one that it is compared with
Verdict = Literal["better", "worse", "no difference shown", "undecided"]


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over `n` seeds; `low` and `high` are None without an interval (n < 2, or a value not finite)."""

    mean: float
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """Mean of value - reference over `n` seeds; `p_value` is None where the t-test is undefined.

    `p_holm` is `p_value` adjusted for all comparisons of the study.
    """

    mean: float
    low: float | None
    high: float | None
    n: int
    p_value: float | None
    p_holm: float | None = None

    @property
    def has_no_spread(self) -> bool:
        """Whether several seeds differ alike, so that nothing can be tested."""
        return self.n > 1 and self.p_value is None and math.isfinite(self.mean)


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Return the mean of `values` with its two-sided Student t interval.

    One value has a mean but no interval: `low` and `high` are None. Equal values give an interval of width 0.

    Raises:
        ValueError: If `values` is empty or `confidence` is not in (0, 1).

    Example:
        >>> mean_interval([0.5])
        Interval(mean=0.5, low=None, high=None, n=1)
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie in (0, 1), got {confidence}; use 0.95 for a 95 % interval")
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0:
        raise ValueError("mean_interval needs at least one value, got none")
    mean = float(array.mean()) if np.isfinite(array).all() else math.nan
    if array.size == 1 or not math.isfinite(mean):
        return Interval(mean, None, None, int(array.size))
    spread = float(array.std(ddof=1)) / math.sqrt(array.size)
    half = float(stats.t.ppf(0.5 + confidence / 2, array.size - 1)) * spread
    return Interval(mean, mean - half, mean + half, int(array.size))


def paired_difference(
    values: Mapping[int, float], reference: Mapping[int, float], confidence: float = 0.95
) -> PairedDifference | None:
    """Return the mean of `values` - `reference` over the seeds that both hold, or None if they share no seed.

    Both map seed -> metric. The p-value is that of the two-sided paired t-test. Interval and p-value are None for one
    pair, where a value is not finite, and where all differences are equal up to the rounding of float32, in which
    metrics are logged: a metric that moves in steps (an accuracy, by one test example) often differs by the same step
    in every seed, which shows no variance and is no proof that there is none.

    Example:
        >>> paired_difference({0: 0.75}, {0: 0.5, 1: 0.5})
        PairedDifference(mean=0.25, low=None, high=None, n=1, p_value=None, p_holm=None)
    """
    seeds = sorted(set(values) & set(reference))
    if not seeds:
        return None
    pairs = np.array([(values[seed], reference[seed]) for seed in seeds], dtype=np.float64)
    if not np.isfinite(pairs).all():
        return PairedDifference(math.nan, None, None, len(seeds), None)
    differences = pairs[:, 0] - pairs[:, 1]
    if len(seeds) == 1 or float(np.ptp(differences)) <= ROUNDING * float(np.abs(pairs).max()):
        return PairedDifference(float(np.median(differences)), None, None, len(seeds), None)
    interval = mean_interval(differences.tolist(), confidence)
    p_value = float(stats.ttest_1samp(differences, 0.0).pvalue)
    return PairedDifference(interval.mean, interval.low, interval.high, interval.n, p_value)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Return Holm's step-down adjusted p-values in the given order; None (no test) stays None, uncounted.

    Source: Holm, "A simple sequentially rejective multiple test procedure", Scand. J. Statist. 6 (1979).

    Example:
        >>> holm([0.25, None, 0.125])
        [0.25, None, 0.25]
    """
    order = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, index) in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p))
        adjusted[index] = largest
    return adjusted


def all_differences(
    values: Mapping[str, Mapping[int, float]], pairs: Sequence[Pair]
) -> dict[Pair, PairedDifference | None]:
    """Return the difference of each pair of arms, the first minus the second, with p adjusted for all of them.

    Args:
        values: Arm -> seed -> value.
        pairs: The second need not have values.
    """
    found = [paired_difference(values[arm], values.get(other or "", {})) for arm, other in pairs]
    adjusted = holm([difference.p_value if difference else None for difference in found])
    return {
        pair: replace(difference, p_holm=p) if difference else None
        for pair, difference, p in zip(pairs, found, adjusted, strict=True)
    }


def verdict(difference: PairedDifference, higher_is_better: bool) -> Verdict:
    """Say what `difference` shows at Holm-adjusted p < 0.05; "undecided" where no test was possible."""
    p = difference.p_holm if difference.p_holm is not None else difference.p_value
    if p is None:
        return "undecided"
    if p >= SIGNIFICANCE:
        return "no difference shown"
    return "better" if (difference.mean > 0) == higher_is_better else "worse"
