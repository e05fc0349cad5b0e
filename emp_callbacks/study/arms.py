"""The arms of a study: each way of pruning is one row of data."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

__all__ = [
    "ARMS",
    "DEFAULT_ARMS",
    "Arm",
    "Cell",
    "TrainingJob",
    "check_arms",
    "leading_arm",
    "plan_jobs",
]

Timing = Literal["recipe", "late", "gradual", "constant", "rounds"]
ROUNDS = 5
"""Trainings of an arm that rewinds, all of them together as long as one of the others."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way of pruning.

    Args:
        summary: One line for `emp compare --help`, tables and reports.
        settings: EMPConfig fields that replace those of the recipe.
        shares_fit_of: Arm whose training also serves this one, which is pruned once afterwards.
        density: Who decides how much is kept: "none" is pruned; N_eff ("emp"), steered to a point by beta; N_eff with
            the point as the least ("floor"); N_eff alone, at no point ("own"); or it is "given": the point, or without
            points the final density of the study's first training arm.
        timing: When masks are made: as the "recipe" says; once, "late", where the healing begins; "gradual"ly, along a
            cubic ramp; at "constant" density from the first step; or in "rounds", each of which trains anew.
        leads_mode: Whether the mode is that of the study's first training arm.
        leads_shares: Whether layers share the density as that arm's do at the end.
        restarts: Whether the learning rate's schedule begins anew after the last refresh, or in each round.
        rewinds: Whether what is kept goes back to its initial values at each refresh.
        narrower: Whether instead of pruning a narrower network of the same number of weights is trained.
        once: Arm that prunes in the same form once, after training, where that is not the study's reference.
        differs: What it does not share with the others: "init", or the "density" of a point, which widths and floors in
            many rows only come near.
    """

    summary: str
    settings: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    shares_fit_of: str | None = None
    density: Literal["none", "emp", "floor", "own", "given"] = "given"
    timing: Timing = "recipe"
    leads_mode: bool = False
    leads_shares: bool = False
    restarts: bool = False
    rewinds: bool = False
    narrower: bool = False
    once: str | None = None
    differs: tuple[str, ...] = ()

    @property
    def trains_with_emp(self) -> bool:
        """Whether N_eff decides during training."""
        return self.shares_fit_of is None and self.density in ("emp", "floor", "own")

    @property
    def follows_leader(self) -> bool:
        """Whether it needs the study's first training arm, with points or without."""
        return self.leads_mode or self.leads_shares

    def points_of(self, points: Sequence[float]) -> Sequence[float | None]:
        """Return the points of a study at which it is run; None: N_eff's own count, or that of another arm."""
        if not points or self.density in ("none", "own"):
            return (None,)
        return tuple(points) if self.density == "given" else (None, *points)


def _fixed(summary: str, **settings: Any) -> Arm:
    return Arm(summary=summary, settings=MappingProxyType(settings), leads_mode=True)


def _training(summary: str, density: Literal["emp", "floor"], **settings: Any) -> Arm:
    return Arm(summary=summary, settings=MappingProxyType(settings), density=density)


def _once(
    summary: str,
    density: Literal["emp", "own", "given"] = "given",
    differs: tuple[str, ...] = (),
    **settings: Any,
) -> Arm:
    prunes = MappingProxyType(settings)
    return Arm(summary=summary, settings=prunes, density=density, shares_fit_of="dense", differs=differs)


_ERK: dict[str, Any] = {"scope": "tensor", "shares": "erk"}
ARMS: dict[str, Arm] = {
    "dense": Arm(
        summary="no pruning; EMP only measures", settings=MappingProxyType({"observe_only": True}), density="none"
    ),
    "one_shot": _once("the dense run, pruned once by EMP after training, no fine-tuning", "emp"),
    "one_shot_tensor": _once("the dense run, pruned once, each layer to the same density", scope="tensor"),
    "one_shot_row": _once(
        "the dense run, pruned once, each output unit to the same density", differs=("density",), scope="row"
    ),
    "one_shot_erk": _once("the dense run, pruned once, layers by Erdos-Renyi-Kernel (small layers keep more)", **_ERK),
    "one_shot_dynamic": _once(
        "features, heads: the dense run; afterwards each sample or token keeps its own N_eff", "own", dynamic=True
    ),
    "one_shot_finetune": Arm(
        summary="dense until the healing begins, then pruned once and trained on, as many steps in all",
        settings=MappingProxyType({"mode": "freeze"}),
        timing="late",
    ),
    "one_shot_finetune_lr": Arm(
        summary="the same, and the learning rate begins anew with the fine-tuning (Renda et al. 2020)",
        settings=MappingProxyType({"mode": "freeze"}),
        timing="late",
        restarts=True,
    ),
    "training_feedback": _training(
        "EMP during training; dense weights keep learning behind the mask", "emp", mode="feedback"
    ),
    "training_project": _training(
        "EMP during training; pruned weights are zeroed but may grow back", "emp", mode="project"
    ),
    "training_freeze": _training("EMP during training; pruned weights stay zero for good", "floor", mode="freeze"),
    "training_dynamic": Arm(
        summary="features, heads: during training each sample or token keeps its own N_eff",
        settings=MappingProxyType({"mode": "feedback", "dynamic": True}),
        density="own",
        once="one_shot_dynamic",
    ),
    "training_dynamic_ste": Arm(
        summary="the same, and the gradient passes straight through the mask (Q-Sparse, Wang et al. 2024)",
        settings=MappingProxyType({"mode": "feedback", "dynamic": True, "gradient": "straight_through"}),
        density="own",
        once="one_shot_dynamic",
    ),
    "emp_dropout": Arm(
        summary="features: each sample keeps its own N_eff features while it trains, all of them in the test",
        settings=MappingProxyType({"mode": "feedback", "dynamic": True, "apply": "training"}),
        density="own",
    ),
    "emp_dropout_gumbel": Arm(
        summary="the same, and they are drawn in proportion to their scores",
        settings=MappingProxyType({"mode": "feedback", "dynamic": True, "apply": "training", "choose": "gumbel"}),
        density="own",
    ),
    "sap": Arm(
        summary=f"{ROUNDS} rounds: train, keep N_eff of the survivors, rewind to the first weights (Diao et al. 2023)",
        settings=MappingProxyType({"mode": "freeze"}),
        density="own",
        timing="rounds",
        restarts=True,
        rewinds=True,
    ),
    "gmp": Arm(
        summary="gradual magnitude pruning: a cubic ramp to the density, then a fixed mask (Zhu and Gupta 2017)",
        settings=MappingProxyType({"mode": "freeze", "criterion": "magnitude"}),
        timing="gradual",
    ),
    "rigl": Arm(
        summary="constant density from the first step; drops by magnitude, grows by gradient (RigL, Evci et al. 2020)",
        settings=MappingProxyType(
            {"mode": "rewire", "criterion": "magnitude", "grow": "gradient", "evidence_steps": 1, **_ERK}
        ),
        timing="constant",
    ),
    "set": Arm(
        summary="constant density from the first step; drops by magnitude, grows at random (SET, Mocanu et al. 2018)",
        settings=MappingProxyType({"mode": "rewire", "criterion": "magnitude", "grow": "random", **_ERK}),
        timing="constant",
    ),
    "fixed_magnitude": _fixed("highest magnitudes during training at a density set in advance", criterion="magnitude"),
    "fixed_uniform": _fixed("the same, each layer at that density", criterion="magnitude", scope="tensor"),
    "fixed_erk": _fixed("the same, layers by Erdos-Renyi-Kernel", criterion="magnitude", **_ERK),
    "fixed_emp_shares": Arm(
        summary="the same, each layer at the density that the first training arm gave it",
        settings=MappingProxyType({"criterion": "magnitude", "scope": "tensor"}),
        leads_mode=True,
        leads_shares=True,
    ),
    "random": _fixed(
        "a fixed random mask during training at a density set in advance", criterion="random", dynamic=False
    ),
    "random_emp_shares": Arm(
        summary="random within each layer, at the density that the first training arm gave it (its mask, shuffled)",
        settings=MappingProxyType({"criterion": "random", "scope": "tensor"}),
        leads_mode=True,
        leads_shares=True,
    ),
    "small_dense": Arm(
        summary="a narrower network with as many weights, trained as long, not pruned",
        settings=MappingProxyType({"observe_only": True}),
        narrower=True,
        differs=("init", "density"),
    ),
}
DEFAULT_ARMS = (
    "dense",
    "one_shot",
    "one_shot_dynamic",
    "training_feedback",
    "training_project",
    "training_freeze",
    "training_dynamic",
    "fixed_magnitude",
    "random",
)
"""Of these a study that names no arms takes those that go with its recipe."""


@dataclass(frozen=True)
class Cell:
    """One arm with one seed, at one of the study's points or at none."""

    arm: str
    seed: int
    point: float | None = None

    @property
    def label(self) -> str:
        """The arm and its point."""
        return self.arm if self.point is None else f"{self.arm}@{self.point:g}"

    @property
    def name(self) -> str:
        """As `emp compare --only` takes it."""
        return f"{self.label}:{self.seed}"

    @property
    def file(self) -> str:
        """Name of its file and folder."""
        return f"{self.label}-seed{self.seed}"


@dataclass(frozen=True)
class TrainingJob:
    """One training and the cells that it serves."""

    fit: Cell
    cells: tuple[Cell, ...]


def leading_arm(names: Sequence[str]) -> str | None:
    """Return the first training arm of a study, which other arms follow; None without one."""
    return next((name for name in names if ARMS[name].trains_with_emp), None)


def check_arms(names: Sequence[str], points: Sequence[float] = ()) -> None:
    """Check the arms of a study before anything runs.

    Raises:
        ValueError: If the list is empty, an arm is unknown or repeated, or an arm has nothing to take its density from.
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
    if points and "dense" not in names:
        raise ValueError("study.points are steered by the dense run, and pruned once from it: add dense to study.arms")
    if leading_arm(names) is not None:
        return
    followers = [n for n in names if ARMS[n].follows_leader or (ARMS[n].density == "given" and not points)]
    if followers:
        training = [name for name, arm in ARMS.items() if arm.trains_with_emp]
        raise ValueError(
            f"arm {followers[0]!r} takes its density from a training arm, and study.arms has none;"
            f" add one of {', '.join(training)} or remove {followers[0]!r}"
        )


def plan_jobs(names: Sequence[str], seeds: Iterable[int], points: Sequence[float] = ()) -> list[TrainingJob]:
    """Return the trainings of a study, each before those that need its result.

    Examples:
        >>> plan_jobs(["random", "one_shot", "training_feedback", "dense"], [0])[0].cells
        (Cell(arm='dense', seed=0, point=None), Cell(arm='one_shot', seed=0, point=None))
    """

    def rank(name: str) -> tuple[bool, bool, int]:
        return ARMS[name].follows_leader, not ARMS[name].trains_with_emp, list(ARMS).index(name)

    first = [name for name in names if ARMS[name].density == "none" or ARMS[name].shares_fit_of]
    ordered = sorted(first, key=list(ARMS).index) + sorted((n for n in names if n not in first), key=rank)
    jobs: dict[Cell, list[Cell]] = {}
    for seed in seeds:
        for name in ordered:
            for point in ARMS[name].points_of(points):
                served = ARMS[name].shares_fit_of
                fit = Cell(served, seed) if served else Cell(name, seed, point)
                jobs.setdefault(fit, []).append(Cell(name, seed, point))
    return [TrainingJob(fit, tuple(cells)) for fit, cells in jobs.items()]


def needed_cells(cell: Cell, names: Sequence[str], points: Sequence[float] = ()) -> list[Cell]:
    """Return the cells of a study whose results decide how much this one keeps."""
    arm, found, leader = ARMS[cell.arm], [], leading_arm(names)
    if arm.narrower or (cell.point is not None and arm.density == "emp" and not arm.shares_fit_of):
        found.append(Cell("dense", cell.seed))
    if leader and (arm.leads_shares or (arm.density == "given" and cell.point is None)):
        found.append(Cell(leader, cell.seed, cell.point if cell.point in ARMS[leader].points_of(points) else None))
    return found


def fits_in_order(names: Sequence[str], seeds: Iterable[int], points: Sequence[float] = ()) -> list[Cell]:
    """Return the cells that are trained, of all seeds first what needs no other: a job array waits for that once."""
    needed = {job.fit: needed_cells(job.fit, names, points) for job in plan_jobs(names, seeds, points)}

    def depth(cell: Cell) -> int:
        return 1 + max((depth(other) for other in needed[cell]), default=-1)

    return sorted(needed, key=depth)
