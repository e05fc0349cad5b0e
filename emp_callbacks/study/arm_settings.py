"""The EMP settings of an arm: those of the recipe, with its own way of pruning, its density and its schedule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from emp_callbacks.config import EMPConfig
from emp_callbacks.gate_checks import GATES_ALONE
from emp_callbacks.schedule import Ramp
from emp_callbacks.study.arms import ARMS, DEFAULT_ARMS, ROUNDS, Arm
from emp_callbacks.study.horizon import Horizon

__all__ = ["Budget", "arm_config", "fitting_arms", "restarts_of"]

# Of the training: where gradual pruning begins and reaches its density, as in Zhu and Gupta's and JaxPruner's runs.
_RAMP = (0.1, 0.6)
_DROP = 0.3  # of the kept, at the first rewiring; it falls to 0 along a cosine, as RigL's does


@dataclass(frozen=True)
class Budget:
    """What decides how much an arm keeps, where that is not N_eff alone.

    Attributes:
        point: Density that the study asks for; None: the arm's own.
        density: Of an arm whose density is given: the point, or the final density of the study's first training arm.
        n_eff_share: N_eff / N of the dense network after its training, same seed.
        shares: Final density of each layer of the study's first training arm, by name.
    """

    point: float | None = None
    density: float = 1.0
    n_eff_share: float = 1.0
    shares: Mapping[str, float] | None = None


def arm_config(
    name: str,
    recipe: EMPConfig,
    leader: str | None = None,
    budget: Budget | None = None,
    horizon: Horizon | None = None,
) -> EMPConfig:
    """Return the EMP settings of an arm: of its training, or of its pruning after training, which has no schedule.

    Args:
        name: The arm.
        recipe: Settings of the recipe's EMPCallback.
        leader: The study's first training arm.
        budget: What decides how much is kept; by default N_eff.
        horizon: How long is trained; None: no healing, and the recipe's schedule for every arm.

    Raises:
        ValueError: The arm does not go with the recipe's settings, such as its target.
    """
    arm, budget = ARMS[name], budget or Budget()
    if name == "dense":
        recipe = replace(recipe, **GATES_ALONE)
    try:
        if arm.shares_fit_of:
            return recipe.once(**_kept(arm, recipe, budget), **arm.settings)
        settings: dict[str, Any] = {"observe_only": False}
        if arm.leads_mode and leader:
            settings |= ARMS[leader].settings
            if recipe.target != "weights":
                # Layers have few units: a floor in each of them would keep fewer than the leader does.
                settings["scope"] = "global"
        settings |= _kept(arm, recipe, budget)
        settings |= _when(arm, recipe, budget, horizon) if horizon else {}
        return replace(recipe, **{**settings, **arm.settings})
    except ValueError as error:
        raise ValueError(
            f"arm {name!r} does not go with the recipe's EMPCallback (target={recipe.target!r}): {error}. Remove it "
            "from study.arms, or change the recipe"
        ) from error


def _kept(arm: Arm, recipe: EMPConfig, budget: Budget) -> dict[str, Any]:
    """Return the settings that decide how much is kept."""
    if arm.density == "given":
        given: dict[str, Any] = {"density": budget.density, "beta": 1.0, "min_density": 0.0}
        return given | ({"shares": dict(budget.shares)} if arm.leads_shares and budget.shares else {})
    by_n_eff: dict[str, Any] = {"density": None, "shares": "uniform"}  # whatever density the recipe asks for
    if arm.density == "none":
        return {}
    if budget.point is None or arm.density == "own":
        return by_n_eff
    if arm.shares_fit_of:
        return {"density": budget.point}
    if arm.density == "floor":
        return {**by_n_eff, "min_density": budget.point}
    return {**by_n_eff, "beta": recipe.beta_at(0) * budget.point / budget.n_eff_share}


def _when(arm: Arm, recipe: EMPConfig, budget: Budget, horizon: Horizon) -> dict[str, Any]:
    """Return the schedule."""
    if arm.density == "none" or arm.narrower:
        return {}
    every, until = horizon.steps_of(recipe), horizon.pruned_until
    in_steps: dict[str, Any] = {"every_n_epochs": None, "every_n_steps": every, "start": None, "stop": until}
    if arm.timing == "late":
        return {**in_steps, "start": until}
    if arm.timing == "gradual":
        begin, end = (round(part * horizon.steps) for part in _RAMP)
        ramp = Ramp(first=1.0, last=budget.density, begin=begin, until=max(begin + 1, end), shape="cubic")
        first = begin + ((end - begin) % every or every)  # so that one refresh is at the ramp's end
        return {**in_steps, "density": ramp, "start": first, "stop": max(first, end)}
    if arm.timing == "constant":
        return {**in_steps, "start": 1, "drop_fraction": Ramp(first=_DROP, last=0.0, until=until, shape="cosine")}
    if arm.timing == "rounds":
        every = _steps_of_round(horizon)
        return {**in_steps, "every_n_steps": every, "stop": every * (ROUNDS - 1)}
    if recipe.stop is not None or recipe.schedule.unit is None:
        return {}
    last = until if recipe.schedule.unit == "step" else int((1 - horizon.healing) * (horizon.epochs or 1))
    return {"stop": max(recipe.schedule.first, last)}


def _steps_of_round(horizon: Horizon) -> int:
    return max(1, horizon.steps // ROUNDS)


def restarts_of(name: str, horizon: Horizon) -> list[float]:
    """Return the fractions of the training at which an arm's learning-rate schedule begins anew."""
    arm = ARMS[name]
    if not arm.restarts:
        return []
    if arm.timing == "rounds":
        return [round(i * _steps_of_round(horizon) / horizon.steps, 6) for i in range(1, ROUNDS)]
    return [round(horizon.pruned_until / horizon.steps, 6)]


def fitting_arms(names: Sequence[str], recipe: EMPConfig) -> list[str]:
    """Return the arms of a study: of the default ones, those that go with the recipe.

    Raises:
        ValueError: One that was chosen does not, or the recipe has learned gates, which none has.
    """
    if recipe.gates is not None:
        raise ValueError(
            f"no arm of emp compare has learned gates, and the recipe has gates={recipe.gates!r}: drop it; emp gates "
            "compares ways of learning them"
        )
    fitting = []
    for name in names:
        try:
            arm_config(name, recipe, "training_feedback")
        except ValueError:
            if tuple(names) != DEFAULT_ARMS:
                raise
        else:
            fitting.append(name)
    return fitting
