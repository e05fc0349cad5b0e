"""How a study's figures and verdicts are written."""

from __future__ import annotations

import math
from dataclasses import dataclass

from emp_callbacks.study.report.arm_results import Results
from emp_callbacks.study.report.page import DASH, number
from emp_callbacks.study.report.statistics import Interval, PairedDifference

SPACE = "\u00a0"
NO_SPREAD = "so no interval and no p: the metric moves in steps (an accuracy by one test example)"


@dataclass(frozen=True, slots=True)
class MetricFormat:
    """How values of the study's metric are written: accuracies in percent, everything else as it is."""

    percent: bool
    decimals: int

    @classmethod
    def of(cls, results: Results) -> MetricFormat:
        """Choose the format that suits all runs of `results`."""
        metric = results["study"]["metric"]
        values = [run["metrics"][metric] for run in results["runs"] if metric in run["metrics"]]
        largest = max((abs(value) for value in values if math.isfinite(value)), default=1.0)
        if "accuracy" in metric and all(0 <= value <= 1 for value in values):
            return cls(percent=True, decimals=2)
        return cls(percent=False, decimals=1 if largest >= 1000 else 2 if largest >= 10 else 4)

    def number(self, value: float | None, sign: bool = False) -> str:
        """Return the bare number, without unit; a dash for None."""
        scaled = None if value is None else value * (100 if self.percent else 1)
        return number(scaled, self.decimals, sign)

    def value(self, value: float) -> str:
        """Return a value with its unit."""
        return self.number(value) + (f"{SPACE}%" if self.percent else "")

    def difference(self, value: float) -> str:
        """Return a signed difference with its unit; differences of percentages are points."""
        return self.number(value, sign=True) + (f"{SPACE}points" if self.percent else "")

    def with_sd(self, interval: Interval) -> str:
        """Return mean \u00b1 standard deviation, without unit; the mean alone without one."""
        sd = "" if interval.sd is None else f"{SPACE}\u00b1{SPACE}{self.number(interval.sd)}"
        return self.number(interval.mean) + sd

    def margin(self, value: float) -> str:
        """Return "±value" of an equivalence margin with the unit of differences."""
        return f"\u00b1{self.number(value)}" + (f"{SPACE}points" if self.percent else "")

    def interval(self, interval: Interval | PairedDifference, sign: bool = False) -> str:
        """Return the interval in brackets, or that there is none."""
        if interval.low is None:
            return "(one seed, no interval)" if interval.n == 1 else "(no interval)"
        return f"[{self.number(interval.low, sign)}, {self.number(interval.high, sign)}]"


def verdict_text(difference: PairedDifference, verdict: str | None) -> str:
    """Return the verdict with its reason, where there is no clear one."""
    if verdict in ("better", "worse"):
        return str(verdict)
    if not math.isfinite(difference.mean):
        return "a run has no finite metric"
    if difference.n == 1:
        return "one seed in common, no test possible"
    if difference.p_value is None and difference.mean == 0:
        return f"the same result in all {difference.n} seeds"
    if difference.p_value is None:
        return f"the same difference in all {difference.n} seeds, {NO_SPREAD}"
    return f"no difference that these {difference.n} seeds can show"


def reference_arm(results: Results) -> str:
    """Return the arm with which the others are compared."""
    return str(results["study"].get("reference", "one_shot"))


def p_text(p: float | None) -> str:
    """Return a p-value with three decimals; a dash for None."""
    if p is None:
        return DASH
    return "<0.001" if p < 0.001 else f"{p:.3f}"
