"""Models that a recipe trains without pruning, one per seed, kept on disk for every study that prunes them once."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emp_callbacks.checkpoint.reading import read_checkpoint
from emp_callbacks.checkpoint.whole_output import appearing
from emp_callbacks.config import EMPConfig
from emp_callbacks.pruning.pruner import EMPPruner
from emp_callbacks.study.arm_settings import arm_config
from emp_callbacks.study.comparison import what_trains
from emp_callbacks.study.folder_lock import FolderLock
from emp_callbacks.study.ranks import check_alone
from emp_callbacks.study.recipe.recipe import Recipe
from emp_callbacks.study.run_store import digest
from emp_callbacks.study.training import Training

__all__ = ["DenseModel", "dense_model", "known_criteria", "tested"]

OnStep = Callable[[int, int | None], None]


class DenseModel:
    """A densely trained model with its data, its test metrics and its weights, to be pruned as often as needed.

    Args:
        recipe: What trained it.
        seed: Of its training.
        training: Holds module, data and trainer.
        saved: Its "weights", "metrics", and "seconds" of training.
        reused: Whether an earlier call trained it.
    """

    def __init__(self, recipe: Recipe, seed: int, training: Training, saved: Mapping[str, Any], reused: bool) -> None:
        self.name, self.recipe, self.seed, self.training, self.reused = recipe.path.stem, recipe, seed, training, reused
        self.weights: Mapping[str, Tensor] = saved["weights"]
        self.metrics: dict[str, float] = dict(saved["metrics"])
        self.seconds = float(saved["seconds"])

    def pruner(self, config: EMPConfig) -> EMPPruner:
        """Return a pruner of the dense weights, which has seen what its criterion reads of data; not yet refreshed."""
        self.training.model.load_state_dict(self.weights)
        return self.training.informed_pruner(config)

    def test(self, pruner: EMPPruner) -> dict[str, float]:
        """Return the test metrics behind the masks of a pruner that was refreshed; its hooks are taken off."""
        pruner.finalize()
        return self.training.test(pruner)


def tested(dense: DenseModel, metric: str, after: Mapping[str, float]) -> dict[str, float | None]:
    """Return the test metric and loss before and after pruning."""
    return {
        "before": dense.metrics[metric],
        "after": after[metric],
        "loss_before": dense.metrics.get("test/loss"),
        "loss_after": after.get("test/loss"),
    }


def known_criteria(dense: DenseModel, target: str, names: Iterable[str]) -> list[str]:
    """Return those of some criteria that can score this model: not every network has batch norms, or Linear layers."""
    known = []
    for name in names:
        try:
            dense.pruner(dense.training.recipe_config.once(target=target, criterion=name, evidence_steps=1)).finalize()
        except ValueError as error:
            if name not in str(error):
                raise
            continue
        known.append(name)
    return known


def dense_model(recipe: Recipe, seed: int, folder: Path, on_step: OnStep) -> DenseModel:
    """Train a recipe densely with one seed, or read what an earlier call with the same settings has kept.

    Args:
        recipe: The parsed recipe.
        seed: Of the training.
        folder: Where trained models are kept: NAME-DIGEST-seedN.pt, the digest that of everything that trains.
        on_step: Called after each optimizer step with (steps done, steps in all if known).

    Raises:
        OSError: The folder cannot be written.
        BusyError: Another command trains this model.
        ValueError: A file in it is damaged.
    """
    name = f"{recipe.path.stem}-{_digest(recipe)[:10]}-seed{seed}"
    logs, path = folder / name, folder / f"{name}.pt"
    if path.is_file():
        saved = _read(path)
        training = Training(recipe, seed, _as_dense, None, on_step)
        training.take_up(saved["weights"])
        return DenseModel(recipe, seed, training, saved, reused=True)
    folder.mkdir(parents=True, exist_ok=True)
    lock = FolderLock(
        folder,
        [name],
        f"another emp command trains {name} in {folder}: {{owner}}; let it finish, or name other --models",
    )
    try:
        if logs.exists():
            shutil.rmtree(logs)  # of a training that was interrupted
        logs.mkdir()
        training = Training(recipe, seed, _as_dense, logs, on_step)
        check_alone(training.trainer, "a study on finished models trains each")
        training.fit()
        weights = {key: value.detach().clone() for key, value in training.model.state_dict().items()}
        saved = {"weights": weights, "metrics": training.test(), "seconds": training.seconds}
        with appearing(path, folder=False) as partial:
            torch.save(saved, partial)
    finally:
        lock.release()
    return DenseModel(recipe, seed, training, saved, reused=False)


def _as_dense(config: EMPConfig) -> EMPConfig:
    return arm_config("dense", config)


def _digest(recipe: Recipe) -> str:
    """Return a hash of what trains the dense model: all of the recipe but what it prunes."""
    trained = what_trains(recipe.resolved())
    named = trained["trainer"].get("callbacks") or []
    all_ = named if isinstance(named, list) else [named]
    callbacks = [c for c in all_ if not str(c["class_path"]).endswith("EMPCallback")]
    return digest({**trained, "trainer": {**trained["trainer"], "callbacks": callbacks}})


def _read(path: Path) -> dict[str, Any]:
    try:
        saved = read_checkpoint(path)
    except ValueError as error:
        raise ValueError(f"{error}, or remove it, and the model is trained again") from error
    if not isinstance(saved, dict) or not {"weights", "metrics", "seconds"} <= saved.keys():
        raise ValueError(f"{path} holds no model that emp trained; remove it, and the model is trained again")
    return saved
