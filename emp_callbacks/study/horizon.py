"""How long the trainings of a study are, known before the first one begins."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

from pytorch_lightning.utilities.seed import isolate_rng
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from emp_callbacks.config import EMPConfig
from emp_callbacks.study.quiet import quiet
from emp_callbacks.study.recipe.recipe import Recipe

__all__ = ["Horizon", "horizon_of"]


@dataclass(frozen=True)
class Horizon:
    """How long a study trains.

    Attributes:
        steps: Optimizer steps of a training.
        epochs: Whole ones of a training, >= 1; None where steps end it and the data have no length.
        healing: Part of the training, in [0, 1), after the last refresh.
    """

    steps: int
    epochs: int | None
    healing: float

    @property
    def pruned_until(self) -> int:
        """Last step that may end in a refresh."""
        return max(1, round((1 - self.healing) * self.steps))

    def steps_of(self, recipe: EMPConfig) -> int:
        """Return the steps between two refreshes of a recipe.

        Raises:
            ValueError: It counts epochs, and nobody knows how many there are.
        """
        if recipe.every_n_steps is not None:
            return recipe.every_n_steps
        if self.epochs is None:
            raise ValueError(
                f"every_n_epochs={recipe.every_n_epochs} counts epochs, and training data without a length do not say "
                "how long one is: give every_n_steps"
            )
        return max(1, (recipe.every_n_epochs or 1) * self.steps // self.epochs)


@cache
def horizon_of(recipe: Recipe, healing: float) -> Horizon:
    """Return how long a recipe trains; its data are set up for that.

    Raises:
        ValueError: Nobody knows: neither max_steps nor max_epochs ends it, or the data have no length.
    """
    with isolate_rng(), quiet():
        recipe.build_bare(logger=False, enable_checkpointing=False)
    trainer, data = recipe.trainer, recipe.datamodule
    epochs, most = -1 if trainer.max_epochs is None else trainer.max_epochs, trainer.max_steps
    only_steps = epochs < 0
    if only_steps and most < 0:
        raise ValueError("a study needs an end: set trainer.max_epochs or trainer.max_steps")
    data.trainer = trainer  # says how many ranks share the batches
    data.prepare_data()
    data.setup("fit")
    try:
        batches = _batches_of_rank(data.train_dataloader(), trainer.world_size)
    except ValueError:
        if only_steps:
            return Horizon(most, None, healing)
        raise
    limit = trainer.limit_train_batches
    batches = int(batches * limit) if isinstance(limit, float) else min(batches, limit)
    of_epoch = math.ceil(batches / trainer.accumulate_grad_batches)
    if only_steps or 0 <= most < of_epoch * epochs:
        return Horizon(most, max(1, most // of_epoch), healing)
    return Horizon(of_epoch * epochs, epochs, healing)


def _batches_of_rank(loader: Any, ranks: int) -> int:
    """Return the batches of an epoch on one rank; Lightning shares them out where the loader itself does not."""
    sampler = getattr(loader, "sampler", None)
    if ranks == 1 or not isinstance(loader, DataLoader) or isinstance(sampler, DistributedSampler):
        return _length(loader)
    if isinstance(loader.dataset, IterableDataset) or loader.batch_size is None:
        return _length(loader)
    examples = math.ceil(_length(sampler) / ranks)
    return examples // loader.batch_size if loader.drop_last else math.ceil(examples / loader.batch_size)


def _length(loader: Any) -> int:
    try:
        return len(loader)
    except TypeError as error:
        raise ValueError(
            f"{type(loader).__name__} of the training data has no length, so nobody knows when three quarters of the "
            "training are over: set trainer.max_steps, and leave out trainer.max_epochs"
        ) from error
