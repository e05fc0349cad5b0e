"""The studies on trained models, by the command that runs them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from emp_callbacks.study.gates import findings as gates
from emp_callbacks.study.once import beta_sweep, criteria_comparison, violation_findings
from emp_callbacks.study.report.page import Page

__all__ = ["PAGES"]

PAGES: dict[str, Callable[[Mapping[str, Any]], Page]] = {
    "sweep-beta": beta_sweep.page,
    "compare-criteria": criteria_comparison.page,
    "violations": violation_findings.page,
    "gates": gates.page,
}
"""Command -> its findings, from the results that it wrote."""
