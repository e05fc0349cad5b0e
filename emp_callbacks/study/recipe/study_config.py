"""The `study:` section of a recipe. Nothing heavy is imported: a cluster's script asks for the cells alone."""

from __future__ import annotations

from dataclasses import dataclass, field

from emp_callbacks.setting_checks import check_fraction
from emp_callbacks.study.arms import DEFAULT_ARMS, check_arms
from emp_callbacks.study.recipe.seeds import check_seeds

__all__ = ["StudyConfig"]


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """What `emp compare` runs; `emp fit`, `validate` and `test` ignore it.

    Args:
        seeds: One training per arm and seed.
        arms: Ways of pruning to compare; see `emp compare --help`.
        points: Densities, in (0, 1], at which the arms are compared, such as [0.6, 0.4, 0.2, 0.1, 0.05]; beside N_eff's
            own count. Without points an arm whose density is given follows the first training arm.
        healing: Part of the training, in [0, 1), after the last refresh: what was pruned last is trained around.
        margin: Differences within +-margin, in units of the metric, count as equivalent where the interval shows it.
        checkpoint_every: Minutes, >= 0, between two checkpoints of a training; cut off, it goes on from the last.
        metric: Logged test metric that the comparison is about.
        higher_is_better: Whether a higher metric is better; set false for losses and perplexities.
        out: Folder of the results; the default is runs/ plus the recipe's name.

    Raises:
        ValueError: If seeds or arms are empty, repeated, out of range or unknown.
    """

    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    arms: list[str] = field(default_factory=lambda: list(DEFAULT_ARMS))
    points: list[float] = field(default_factory=list)
    healing: float = 0.25
    margin: float | None = None
    checkpoint_every: float = 10.0
    metric: str = "test/accuracy"
    higher_is_better: bool = True
    out: str | None = None

    def __post_init__(self) -> None:
        check_seeds("study.seeds", self.seeds)
        for point in self.points:
            check_fraction("study.points", point, lowest_allowed=False)
        if len(set(self.points)) != len(self.points):
            raise ValueError(f"study.points names a density twice: {self.points}; name each once")
        check_fraction("study.healing", self.healing, lowest_allowed=True)
        if self.healing == 1.0:
            raise ValueError("study.healing=1 leaves no time for pruning; choose less, such as 0.25")
        if self.margin is not None and not self.margin > 0:
            raise ValueError(f"study.margin must be > 0 in units of the metric, got {self.margin!r}")
        if not self.checkpoint_every >= 0:
            raise ValueError(f"study.checkpoint_every must be >= 0 minutes, got {self.checkpoint_every!r}")
        check_arms(self.arms, self.points)
