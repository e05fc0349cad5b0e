"""Checks of the settings that say how many components stay, of an EMPConfig: each names the value and the remedy."""

from __future__ import annotations

from typing import Any

from emp_callbacks.core.group_pattern import GroupPattern
from emp_callbacks.criteria import make_criterion
from emp_callbacks.setting_checks import check_choice, check_fraction, check_shares, ends


def check_counts(config: Any) -> None:
    """Raise ValueError where the settings of an EMPConfig do not say how many stay."""
    check_fraction("min_density", config.min_density, lowest_allowed=True)
    if config.pattern is not None:
        _check_pattern(config)
    _check_shares(config)
    if isinstance(config.density, str):
        _check_found(config)
    elif config.density is not None:
        _check_density(config)


def _check_shares(config: Any) -> None:
    if config.shares != "uniform":
        check_shares(config.shares)
        if config.density is None or config.scope == "global":
            raise ValueError(
                f"shares={config.shares!r} shares a density among layers that do not compete: give density, and "
                "scope='tensor' or 'row'"
            )
    if config.shares == "erk" and config.target != "weights":
        raise ValueError(
            f"shares='erk' follows from the shapes of weights, and target={config.target!r} has one dimension, of "
            "which it would say 'uniform': use that, or a mapping"
        )


def _check_density(config: Any) -> None:
    for density in ends(config.density):
        check_fraction("density", density, lowest_allowed=False)
    if config.beta != 1.0:
        raise ValueError(
            f"density={config.density} fixes the keep count, so beta={config.beta} would do nothing; drop one"
        )
    if config.min_density > min(ends(config.density)):
        raise ValueError(f"min_density={config.min_density} is above density={config.density}; drop min_density")


def _check_found(config: Any) -> None:
    if config.density != "found":
        raise ValueError(f"density must be a fraction in (0, 1], a Ramp or 'found', got {config.density!r}")
    why = "density='found' keeps for good the weights that are not 0, so it needs"
    _check_plain(config, why, mode="freeze", criterion_name="magnitude", shares="uniform")


def _check_pattern(config: Any) -> None:
    GroupPattern.parse(config.pattern)
    why = f"pattern={config.pattern!r} says how many of each group stay, which needs"
    _check_plain(config, why, scope="tensor", density=None, shares="uniform")


def _check_plain(config: Any, why: str, **values: Any) -> None:
    """Raise ValueError unless a config for weights has these values, and none that would do nothing."""
    needed = {"target": "weights", "beta": 1.0, "min_density": 0.0, **values}
    for name, value in needed.items():
        now = getattr(config, name)
        if now != value:
            raise ValueError(f"{why} {name.removesuffix('_name')}={value!r}, got {now!r}")


def check_rewiring(config: Any) -> None:
    """Raise ValueError where those of mode "rewire" mean nothing."""
    check_choice("grow", config.grow, ("gradient", "random"))
    for fraction in ends(config.drop_fraction):
        check_fraction("drop_fraction", fraction, lowest_allowed=True)
        if fraction == 1.0:
            raise ValueError("drop_fraction=1 would replace every weight; choose a fraction below 1")
    if config.mode != "rewire":
        if (config.grow, config.drop_fraction) != ("gradient", 0.3):
            raise ValueError(f"grow and drop_fraction are of mode='rewire', and mode={config.mode!r}; drop them")
        return
    if config.target != "weights" or (config.density or config.pattern) is None or config.scope == "row":
        raise ValueError(
            "mode='rewire' needs target='weights', a density or pattern, and scope='global' or 'tensor', got "
            f"target={config.target!r}, density={config.density!r}, scope={config.scope!r}"
        )
    if make_criterion(config.criterion, config.target).needs is not None:
        raise ValueError(
            f"mode='rewire' drops by what the weights themselves say, and {config.criterion_name!r} needs evidence; "
            "use 'magnitude'"
        )
