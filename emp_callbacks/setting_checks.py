"""Checks of single settings: each raises a ValueError that names the value and the remedy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from emp_callbacks.schedule import Ramp


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless the value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}")


def check_patterns(name: str, patterns: Sequence[str] | None) -> None:
    """Raise ValueError unless these are glob patterns, or None."""
    if isinstance(patterns, str):
        raise ValueError(f"{name} must be a list of glob patterns, got the string {patterns!r}; write [{patterns!r}]")
    if patterns is not None and (not patterns or not all(isinstance(p, str) for p in patterns)):
        raise ValueError(
            f"{name} must be a non-empty list of glob patterns, got {patterns!r}; use None for the default"
        )


_KEPT = "the share that is kept is density, such as density=0.2 for a sparsity of 0.8. "
OTHER_WORDS = {
    "config": "settings are given one by one; EMPCallback.from_config(config) does so. ",
    **dict.fromkeys(("sparsity", "target_sparsity", "amount", "prune_ratio", "pruning_ratio", "ratio"), _KEPT),
}
"""What other tools call a setting -> what to write here."""


def check_fraction(name: str, value: float, *, lowest_allowed: bool) -> None:
    """Raise ValueError unless the value lies in (0, 1], or in [0, 1] where the lowest is allowed."""
    inside = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not inside or not 0.0 <= value <= 1.0 or (value == 0.0 and not lowest_allowed):
        interval = "[0, 1]" if lowest_allowed else "(0, 1]"
        percent = f"; for {value:g} % write {value / 100:g}" if inside and 1 < value <= 100 else ""
        raise ValueError(f"{name} must be a fraction in {interval}, got {value!r}{percent}")


def check_shares(shares: object) -> None:
    """Raise ValueError unless this says how layers share a density, other than "uniform"."""
    if isinstance(shares, Mapping):
        if not shares or not any(shares.values()):
            raise ValueError(f"shares must name a layer of relative density above 0, got {dict(shares)!r}")
        for name, share in shares.items():
            number = isinstance(share, (int, float)) and not isinstance(share, bool)
            if not number or not 0 <= share < math.inf:
                raise ValueError(f"shares[{name!r}] must be a finite number >= 0, got {share!r}")
    elif shares != "erk":
        raise ValueError(f"shares must be 'uniform', 'erk' or a mapping from layer names to numbers; got {shares!r}")


def ends(value: float | Ramp) -> tuple[float, ...]:
    """Return a setting's values at both ends of its Ramp, or the value itself."""
    return (value.first, value.last) if isinstance(value, Ramp) else (value,)
