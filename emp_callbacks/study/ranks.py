"""The processes that train each cell of a study together: who is first, and what all do alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import pytorch_lightning as pl
from pytorch_lightning.strategies import DDPStrategy
from pytorch_lightning.strategies.launchers import _SubprocessScriptLauncher
from pytorch_lightning.utilities import rank_zero_only

from emp_callbacks.study.quiet import quiet

__all__ = ["Ranks", "check_alone", "own_rank"]

Result = TypeVar("Result")


def own_rank() -> int:
    """Return this process's number among those of a job, as torchrun, Slurm or Lightning gave it; alone 0."""
    return int(getattr(rank_zero_only, "rank", 0))


def check_alone(trainer: pl.Trainer, what: str) -> None:
    """Raise ValueError unless a trainer is for one process, as what is said needs it."""
    if trainer.world_size > 1:
        raise ValueError(
            f"{what} in one process, and the recipe asks for {trainer.world_size}: add --trainer.devices 1 "
            "--trainer.num_nodes 1"
        )


class Ranks:
    """Processes that go through the same cells in the same order; rank 0 alone reads and writes the study's folder.

    Args:
        trainer: One of the recipe's.

    Attributes:
        world_size: Number of processes.
        is_first: Whether this is rank 0.

    Raises:
        ValueError: The recipe asks for several processes that are not replicas of one network.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self._strategy: Any = trainer.strategy
        self._joined = False
        self.world_size, self.rank = trainer.world_size, trainer.global_rank
        self.is_first = self.rank == 0
        if self.world_size > 1:
            self._check_replicas()

    def _check_replicas(self) -> None:
        name, launcher = type(self._strategy).__name__, self._strategy.launcher
        if not isinstance(self._strategy, DDPStrategy):
            raise ValueError(
                f"{name} may shard the model over the recipe's {self.world_size} processes, and a study compares whole "
                "networks: add --trainer.strategy ddp"
            )
        if launcher is not None and not isinstance(launcher, _SubprocessScriptLauncher):
            raise ValueError(
                f"{name} starts {self.world_size} processes by fork or spawn, and what they train is lost to the study:"
                " add --trainer.strategy ddp"
            )

    @property
    def started_elsewhere(self) -> bool:
        """Whether torchrun, Slurm or rank 0 started this process, so that others wait for it."""
        environment = getattr(self._strategy, "cluster_environment", None)
        return self.world_size > 1 and environment is not None and environment.creates_processes_externally

    def join(self) -> None:
        """Connect the processes; rank 0 starts the others where nobody else does. Collective."""
        if self.world_size > 1 and not self._joined:
            launcher = self._strategy.launcher
            begin = self._strategy.setup_environment
            with quiet():
                launcher.launch(begin) if launcher is not None else begin()
            self._joined = True

    def check_all(self, fine: bool, problem: str) -> None:
        """Raise ValueError on all ranks where something is not fine on one. Collective, once joined."""
        fine_everywhere = fine
        if self._joined:
            fine_everywhere = self._strategy.reduce_boolean_decision(fine, all=True)
        if not fine_everywhere:
            raise ValueError(problem)

    def from_first(self, work: Callable[[], Result]) -> Result:
        """Return what `work` returns on rank 0, which alone does it. Collective, once joined.

        Raises:
            Exception: What it raises, on rank 0; on the others SystemExit with code 2, as rank 0 says why.
        """
        if not self._joined:
            return work()
        problem: Exception | None = None
        result: Any = None
        if self.is_first:
            try:
                result = work()
            except Exception as error:  # the others would wait for ever
                problem = error
        failed, result = self._strategy.broadcast((problem is not None, result), src=0)
        if problem is not None:
            raise problem
        if failed:
            raise SystemExit(2)
        return result  # type: ignore[no-any-return]
