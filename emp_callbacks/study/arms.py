"""The arms of a study: each way of pruning is one row of data."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from emp_callbacks.config import EMPConfig

__all__ = ["ARMS", "Arm", "TrainingJob", "arm_config", "check_arms", "fitting_arms", "leading_arm", "plan_jobs"]


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way of pruning.

    Args:
        summary: One line for `emp compare --help` and tables.
        settings: EMPConfig fields that replace those of the recipe.
        shares_fit_of: Arm whose training also serves this one, which is pruned once afterwards.
        follows_training_arm: Whether mode, schedule and, per seed, the final density come from the
            study's first training arm.
        trains_with_emp: Whether EMP decides the density during training.
        once: Arm that prunes in the same form once, after training, where that is not the study's reference.
    """

    summary: str
    settings: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    shares_fit_of: str | None = None
    follows_training_arm: bool = False
    trains_with_emp: bool = False
    once: str | None = None


def _training(mode: str, summary: str) -> Arm:
    return Arm(summary=summary, settings=MappingProxyType({"mode": mode}), trains_with_emp=True)


ARMS: dict[str, Arm] = {
    "dense": Arm(
        summary="no pruning; EMP only measures",
        settings=MappingProxyType({"observe_only": True}),
    ),
    "one_shot": Arm(
        summary="the dense run, pruned once by EMP after training, no fine-tuning",
        shares_fit_of="dense",
    ),
    "one_shot_dynamic": Arm(
        summary="features: the dense run; afterwards each sample keeps its own N_eff features",
        settings=MappingProxyType({"dynamic": True}),
        shares_fit_of="dense",
    ),
    "training_feedback": _training("feedback", "EMP during training; dense weights keep learning behind the mask"),
    "training_project": _training("project", "EMP during training; pruned weights are zeroed but may grow back"),
    "training_freeze": _training("freeze", "EMP during training; pruned weights stay zero for good"),
    "training_dynamic": Arm(
        summary="features: during training each sample keeps its own N_eff features",
        settings=MappingProxyType({"mode": "feedback", "dynamic": True}),
        trains_with_emp=True,
        once="one_shot_dynamic",
    ),
    "fixed_magnitude": Arm(
        summary="magnitude pruning during training at the first training arm's final density",
        settings=MappingProxyType({"criterion": "magnitude"}),
        follows_training_arm=True,
    ),
    "random": Arm(
        summary="random pruning during training at the first training arm's final density",
        settings=MappingProxyType({"criterion": "random", "dynamic": False}),
        follows_training_arm=True,
    ),
}


@dataclass(frozen=True)
class TrainingJob:
    """One training and the arms that it serves, for one seed."""

    seed: int
    arms: tuple[str, ...]

    @property
    def fit_arm(self) -> str:
        """The arm whose settings the training itself uses."""
        return ARMS[self.arms[0]].shares_fit_of or self.arms[0]


def leading_arm(names: Sequence[str]) -> str | None:
    """Return the first training arm of a study, which the fixed-density arms follow; None without one."""
    return next((name for name in names if ARMS[name].trains_with_emp), None)


def check_arms(names: Sequence[str]) -> None:
    """Check the arms of a study before anything runs.

    Raises:
        ValueError: If the list is empty, an arm is unknown or repeated, or a fixed-density arm has
            no training arm to take its density from.
    """
    if not names:
        raise ValueError(f"study.arms is empty; choose from {', '.join(ARMS)}")
    for name in names:
        if name not in ARMS:
            near = difflib.get_close_matches(name, ARMS, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(ARMS)}"
            raise ValueError(f"unknown arm {name!r} in study.arms; {hint}")
    if len(set(names)) != len(names):
        raise ValueError(f"study.arms names an arm twice: {', '.join(names)}; name each arm once")
    followers = [name for name in names if ARMS[name].follows_training_arm]
    if followers and leading_arm(names) is None:
        training = [name for name, arm in ARMS.items() if arm.trains_with_emp]
        raise ValueError(
            f"arm {followers[0]!r} takes its density from a training arm, and study.arms has none;"
            f" add one of {', '.join(training)} or remove {followers[0]!r}"
        )


def arm_config(name: str, recipe: EMPConfig, leader: str | None = None, density: float = 1.0) -> EMPConfig:
    """Return the EMP settings of an arm: of its training, or of its pruning after training, which has no schedule.

    Args:
        name: The arm.
        recipe: Settings of the recipe's EMPCallback.
        leader: The study's first training arm.
        density: That arm's final density, for an arm that follows it.

    Raises:
        ValueError: The arm does not go with the recipe's settings, such as its target.
    """
    arm = ARMS[name]
    settings: dict[str, Any] = {"observe_only": False}
    if arm.follows_training_arm and leader:
        settings |= {**ARMS[leader].settings, "density": density, "beta": 1.0, "min_density": 0.0}
        if recipe.target != "weights":
            # Layers have few units: a floor in each of them would keep fewer than the leader does.
            settings["scope"] = "global"
    try:
        if arm.shares_fit_of:
            return recipe.once(**arm.settings)
        return replace(recipe, **{**settings, **arm.settings})
    except ValueError as error:
        raise ValueError(
            f"arm {name!r} does not go with the recipe's EMPCallback (target={recipe.target!r}): {error}. Remove it "
            "from study.arms, or change the recipe"
        ) from error


def fitting_arms(names: Sequence[str], recipe: EMPConfig) -> list[str]:
    """Return the arms of a study: of all arms, which is the default, those that go with the recipe.

    Raises:
        ValueError: One that was chosen does not.
    """
    fitting = []
    for name in names:
        try:
            arm_config(name, recipe, leading_arm(names))
        except ValueError:
            if set(names) != set(ARMS):
                raise
        else:
            fitting.append(name)
    return fitting


def plan_jobs(names: Sequence[str], seeds: Iterable[int]) -> list[TrainingJob]:
    """Return the trainings of a study, each before those that need its result.

    Example:
        >>> plan_jobs(["random", "one_shot", "training_feedback", "dense"], [0])[0].arms
        ('dense', 'one_shot')
    """
    ordered = sorted(names, key=lambda name: (ARMS[name].follows_training_arm, list(ARMS).index(name)))
    groups: dict[str, list[str]] = {}
    for name in ordered:
        groups.setdefault(ARMS[name].shares_fit_of or name, []).append(name)
    return [TrainingJob(seed, tuple(arms)) for seed in seeds for arms in groups.values()]
