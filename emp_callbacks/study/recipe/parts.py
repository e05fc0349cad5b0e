"""Model and data of a recipe without its Trainer, for work on finished models."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emp_callbacks.config import EMPConfig

__all__ = ["ANYWHERE", "RecipeParts", "open_recipe"]

# A recipe for a cluster is opened on a laptop, too: nothing is trained here.
ANYWHERE = {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "strategy": "auto", "precision": None, "plugins": None}


@dataclass(frozen=True, kw_only=True)
class RecipeParts:
    """What a recipe builds: LightningModule, data module that is set up, and the settings of its EMPCallbacks."""

    module: Any
    data: Any
    configs: tuple[EMPConfig, ...]

    @property
    def config(self) -> EMPConfig:
        """The settings of the one EMPCallback; the defaults if the recipe has none."""
        if len(self.configs) > 1:
            raise ValueError(
                f"the recipe has {len(self.configs)} EMPCallbacks, and emp prune prunes once: name a recipe with one"
            )
        return self.configs[0] if self.configs else EMPConfig()


def open_recipe(path: str | Path) -> RecipeParts:
    """Build the model and the data of a recipe; nothing is trained.

    Raises:
        FileNotFoundError: There is no such recipe.
        RecipeError: A key or a value in it is not known.
    """
    import pytorch_lightning as pl

    from emp_callbacks.integrations.lightning import EMPCallback
    from emp_callbacks.study.recipe.recipe import Recipe

    recipe = Recipe(path)
    seed = recipe.config.seed_everything
    pl.seed_everything(seed if isinstance(seed, int) else 0, workers=True, verbose=False)
    with _without_notices():
        callbacks = recipe.build_bare(logger=False, enable_checkpointing=False, **ANYWHERE)
    recipe.datamodule.prepare_data()
    recipe.datamodule.setup("fit")
    configs = tuple(callback.config for callback in callbacks if isinstance(callback, EMPCallback))
    return RecipeParts(module=recipe.model, data=recipe.datamodule, configs=configs)


@contextmanager
def _without_notices() -> Iterator[None]:
    """Hide what a Trainer says about devices: none is used."""
    before = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="GPU available but not used")
            yield
    finally:
        logging.disable(before)
