"""Checks of the settings of masks that are made in the forward pass, of an EMPConfig."""

from __future__ import annotations

from typing import Any

from emp_callbacks.criteria import make_criterion
from emp_callbacks.criteria.output_norm import OutputNorm, check_unmasked
from emp_callbacks.targets.feature_form import FeatureForm

DYNAMIC_CRITERIA = {"features": "activation", "heads": "output_norm"}
"""Target -> the one criterion by which samples or tokens choose for themselves."""


def check_forward(config: Any) -> None:
    """Raise ValueError where a setting of what is masked in the forward pass means nothing for the target."""
    form, plain = vars(config.feature_form), vars(FeatureForm())
    of_heads = ("dynamic", "per") if config.target == "heads" and config.dynamic else ()
    given = [key for key, value in form.items() if value != plain[key] and key not in of_heads]
    if config.target != "features" and given:
        told = ", ".join(f"{key}={form[key]!r}" for key in given)
        raise ValueError(f"{told} is for features, and target={config.target!r}; use target='features'")
    known = DYNAMIC_CRITERIA.get(config.target)
    if config.is_dynamic and known and config.criterion_name != known:
        raise ValueError(
            f"dynamic {config.target} are scored by {known!r} in the forward pass, not by {config.criterion_name!r}; "
            "drop criterion, or use dynamic=False"
        )
    if isinstance(make_criterion(config.criterion, config.target), OutputNorm):
        check_unmasked(config)
