"""`--smoke`: a recipe with what its `smoke:` section lays over it, on stand-in data, and a loss that has to fall.

The section holds options as the command line has them, such as `trainer.max_steps: 40`. A value such as
`stand-in:images` is the folder of that data.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_only

from emp_callbacks.integrations.lightning import EMPCallback
from emp_callbacks.study.recipe.check import RecipeError
from emp_callbacks.study.recipe.reading import read_recipe
from emp_callbacks.study.recipe.stand_ins import stand_in

__all__ = ["FLAG", "FallingLoss", "smoke_options"]

FLAG = "--smoke"
_STAND_IN = "stand-in:"


def smoke_options(files: Sequence[str]) -> list[str]:
    """Return the options of the last recipe file that has a `smoke:` section.

    Raises:
        RecipeError: None of them has one, or it is no mapping.
    """
    sections = [found for file in files if (found := read_recipe(file).get("smoke")) is not None]
    if not sections:
        raise RecipeError(
            f"{' and '.join(map(str, files)) or 'the command'} has no smoke: section for {FLAG}; add one, with options "
            "such as trainer.max_steps: 20"
        )
    if not isinstance(sections[-1], Mapping):
        raise RecipeError(f"'smoke' in recipe must be a mapping of options to values, got {sections[-1]!r:.60}")
    return [f"--{option}={_text(value)}" for option, value in sections[-1].items()]


def _text(value: Any) -> str:
    if not isinstance(value, str):
        return json.dumps(value)
    return str(stand_in(value.removeprefix(_STAND_IN))) if value.startswith(_STAND_IN) else value


class FallingLoss(pl.Callback):
    """Ends a smoke run with one line on what it did.

    Raises:
        RuntimeError: The mean loss of the last quarter of the steps, over all ranks, is not below that of the first; or
            EMP has never made a mask.
    """

    def __init__(self) -> None:
        self._losses: list[float] = []
        self._began = time.perf_counter()

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,  # noqa: ARG002
        pl_module: pl.LightningModule,  # noqa: ARG002
        outputs: Any,
        batch: Any,  # noqa: ARG002
        batch_idx: int,  # noqa: ARG002
    ) -> None:
        self._losses.append(float(outputs["loss"]))

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
        quarter = max(1, len(self._losses) // 4)
        parts = (self._losses[:quarter], self._losses[-quarter:])
        means = torch.tensor([sum(part) / len(part) for part in parts], device=trainer.strategy.root_device)
        first, last = trainer.strategy.reduce(means, reduce_op="mean").tolist()
        told = f"loss {first:.3f} -> {last:.3f} in {len(self._losses)} batches on {trainer.world_size} processes"
        if not last < first:
            raise RuntimeError(f"smoke: the {told}: it did not fall")
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, EMPCallback) and not callback.trajectory:
                raise RuntimeError(f"smoke: {len(self._losses)} batches, and no refresh of {callback.config.target}")
        rank_zero_only(print)(f"smoke: {told}, {time.perf_counter() - self._began:.0f} s", flush=True)
