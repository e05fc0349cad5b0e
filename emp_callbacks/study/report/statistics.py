"""Statistics of a study: intervals over seeds, differences paired by seed, equivalence.

Intervals are per comparison (95 %, Student t) and end where the metric's range does: an accuracy over 1 cannot be,
and what is cut off had no value in it. The verdicts better / worse rest on Holm-adjusted p-values of all comparisons
of a table, so an interval may exclude 0 where the verdict is "no difference shown".
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import numpy as np
from scipy import stats

SIGNIFICANCE = 0.05
# Some float32 roundings, 6e-8 each, of the values that are subtracted: they must not pass for a variance.
ROUNDING = 1e-6
Pair = tuple[str, str | None]  # an arm and the one that it is compared with
Verdict = Literal["better", "worse", "equivalent", "no difference shown", "undecided"]
Range = tuple[float, float]  # lowest and highest value
UNBOUNDED: Range = (-math.inf, math.inf)
_RANGES: Mapping[str, Range] = {"accuracy": (0.0, 1.0), "perplexity": (1.0, math.inf), "loss": (0.0, math.inf)}


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over `n` seeds.

    `low` and `high` are None without an interval (n < 2, or a value not finite), and so is `sd`, the standard
    deviation over seeds with n - 1 degrees of freedom, in the unit of the mean.
    """

    mean: float
    low: float | None
    high: float | None
    n: int
    sd: float | None = None


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """Mean of value - reference over `n` seeds; `p_value` is None where the t-test is undefined.

    `p_holm` is `p_value` adjusted for all comparisons of a table, `sd` the standard deviation of the differences
    (n - 1 degrees of freedom), None where there is no test.
    """

    mean: float
    low: float | None
    high: float | None
    n: int
    p_value: float | None
    p_holm: float | None = None
    sd: float | None = None

    @property
    def has_no_spread(self) -> bool:
        """Whether several seeds differ alike, so that nothing can be tested."""
        return self.n > 1 and self.p_value is None and math.isfinite(self.mean)


@dataclass(frozen=True, slots=True)
class Equivalence:
    """Whether a mean difference is shown to be smaller than `margin`, in the unit of the metric.

    `p_value` is that of the two one-sided tests, `p_holm` the same adjusted for all of a table.
    """

    margin: float
    p_value: float
    p_holm: float | None = None

    @property
    def shown(self) -> bool:
        """Whether p < 0.05, adjusted where it is."""
        return (self.p_value if self.p_holm is None else self.p_holm) < SIGNIFICANCE


def metric_range(metric: str, values: Iterable[float]) -> Range:
    """Return the lowest and the highest value of a metric, which its name tells.

    An accuracy lies in [0, 1], a perplexity is at least 1, a loss at least 0. Any other metric is unbounded, and so is
    one of these names with a finite value outside (an accuracy in percent, a log-likelihood as loss).

    Args:
        metric: Name, such as "test/accuracy".
        values: All that were measured.

    Examples:
        >>> metric_range("test/accuracy", [0.5]), metric_range("test/accuracy", [50.0])
        ((0.0, 1.0), (-inf, inf))
    """
    low, high = next((limits for word, limits in _RANGES.items() if word in metric), UNBOUNDED)
    return (low, high) if all(low <= value <= high for value in values if math.isfinite(value)) else UNBOUNDED


def mean_interval(values: Sequence[float], confidence: float = 0.95, within: Range = UNBOUNDED) -> Interval:
    """Return the mean of `values` with its two-sided Student t interval, cut at the ends of the range `within`.

    One value has a mean but no interval: `low` and `high` are None. Equal values give an interval of width 0.

    Raises:
        ValueError: If `values` is empty or `confidence` is not in (0, 1).

    Examples:
        >>> mean_interval([0.5])
        Interval(mean=0.5, low=None, high=None, n=1, sd=None)
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie in (0, 1), got {confidence}; use 0.95 for a 95 % interval")
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0:
        raise ValueError("mean_interval needs at least one value, got none")
    mean = float(array.mean()) if np.isfinite(array).all() else math.nan
    if array.size == 1 or not math.isfinite(mean):
        return Interval(mean, None, None, int(array.size))
    sd = float(array.std(ddof=1))
    half = float(stats.t.ppf(0.5 + confidence / 2, array.size - 1)) * sd / math.sqrt(array.size)
    return Interval(mean, max(mean - half, within[0]), min(mean + half, within[1]), int(array.size), sd)


def paired_difference(
    values: Mapping[int, float],
    reference: Mapping[int, float],
    confidence: float = 0.95,
    within: Range = UNBOUNDED,
) -> PairedDifference | None:
    """Return the mean of `values` - `reference` over the seeds that both hold, or None if they share no seed.

    Both map seed -> metric. The p-value is that of the two-sided paired t-test. Interval and p-value are None for one
    pair, where a value is not finite, and where all differences are equal up to the rounding of float32, in which
    metrics are logged: a metric that moves in steps (an accuracy, by one test example) often differs by the same step
    in every seed, which shows no variance and is no proof that there is none. `within` is the range of the metric:
    the interval ends where two values of that range cannot differ more.

    Examples:
        >>> paired_difference({0: 0.75}, {0: 0.5, 1: 0.5}).mean
        0.25
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
    widest = within[1] - within[0]
    interval = mean_interval(differences.tolist(), confidence, (-widest, widest))
    p_value = float(stats.ttest_1samp(differences, 0.0).pvalue)
    return PairedDifference(interval.mean, interval.low, interval.high, interval.n, p_value, sd=interval.sd)


def equivalence(difference: PairedDifference, margin: float) -> Equivalence | None:
    """Test whether the mean difference lies within -margin and +margin; None where nothing can be tested.

    Two one-sided paired t-tests (TOST), against -margin and against +margin, at 0.05 each; p is the larger of the
    two. That no difference was shown does not show that there is none: this does. Without several seeds whose
    differences vary there is no test.

    Source: Schuirmann, "A comparison of the two one-sided tests procedure and the power approach for assessing the
    equivalence of average bioavailability", J. Pharmacokinet. Biopharm. 15 (1987).

    Args:
        difference: Paired by seed.
        margin: Largest difference that does not matter, in the unit of the metric; chosen before the runs.

    Raises:
        ValueError: If `margin` is not a positive number.
    """
    if not (margin > 0 and math.isfinite(margin)):
        raise ValueError(f"the equivalence margin must be a positive number, got {margin}; 0.005 is half a point")
    if difference.p_value is None or difference.sd is None:
        return None
    error = difference.sd / math.sqrt(difference.n)
    # The side that is nearer to its end of the margin has the larger p.
    return Equivalence(margin, float(stats.t.sf((margin - abs(difference.mean)) / error, difference.n - 1)))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Return Holm's step-down adjusted p-values in the given order; None (no test) stays None, uncounted.

    Source: Holm, "A simple sequentially rejective multiple test procedure", Scand. J. Statist. 6 (1979).

    Examples:
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
    values: Mapping[str, Mapping[int, float]], pairs: Sequence[Pair], within: Range = UNBOUNDED
) -> dict[Pair, PairedDifference | None]:
    """Return the difference of each pair of arms, the first minus the second, with p adjusted for all of them.

    Args:
        values: Arm -> seed -> value.
        pairs: The second need not have values.
        within: Range of the values.
    """
    found = [paired_difference(values[arm], values.get(other or "", {}), within=within) for arm, other in pairs]
    return dict(zip(pairs, adjusted(found), strict=True))


_Tested = TypeVar("_Tested", PairedDifference, Equivalence)


def adjusted(tests: Sequence[_Tested | None]) -> list[_Tested | None]:
    """Return the tests of one family with `p_holm`; None (no test) stays None."""
    p_values = holm([test.p_value if test else None for test in tests])
    return [replace(test, p_holm=p) if test else None for test, p in zip(tests, p_values, strict=True)]


def verdict(difference: PairedDifference, higher_is_better: bool, tost: Equivalence | None = None) -> Verdict:
    """Say what `difference` shows at Holm-adjusted p < 0.05; "undecided" where no test was possible.

    A difference that is shown is better or worse, however small; "equivalent" is what is not, and lies within the
    margin of `tost`.
    """
    p = difference.p_holm if difference.p_holm is not None else difference.p_value
    if p is None:
        return "undecided"
    if p >= SIGNIFICANCE:
        return "equivalent" if tost and tost.shown else "no difference shown"
    return "better" if (difference.mean > 0) == higher_is_better else "worse"
