"""What a recipe will do, before it does it: sizes, memory, steps, refreshes, what they send, where files go.

Nothing is trained or written, and no GPU is asked for, whatever the recipe asks for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.utilities.seed import isolate_rng

from emp_callbacks.backends import detect_backend
from emp_callbacks.blame import raised_by_us
from emp_callbacks.config import EMPConfig
from emp_callbacks.integrations.lightning import EMPCallback
from emp_callbacks.integrations.record import own_name
from emp_callbacks.layer import Layer, WeightLayer
from emp_callbacks.layer.mask_mode import MASK_MODES
from emp_callbacks.pruning.refresher import Refresher
from emp_callbacks.pruning.traffic import Spread, Traffic, refresh_traffic
from emp_callbacks.study.quiet import quiet
from emp_callbacks.study.recipe.checkpoints import settle_checkpoints
from emp_callbacks.study.recipe.data_size import DataSize, data_size
from emp_callbacks.study.recipe.length import Length, training_length
from emp_callbacks.study.recipe.memory import Masked, Sizes, memory_of
from emp_callbacks.study.recipe.on_meta import AskedTrainer, build_on_meta, optimizers_of, sizes_of, without_weights
from emp_callbacks.study.recipe.places import Folder, folder_of
from emp_callbacks.study.recipe.reading import read_recipe
from emp_callbacks.study.recipe.recipe import Recipe
from emp_callbacks.study.recipe.sharding import Strategy, strategy_of

__all__ = ["PATIENCE", "Foresight", "Pruning", "foresee"]

PATIENCE = 30.0  # seconds that the data may take to be set up


@dataclass(frozen=True, kw_only=True)
class Pruning:
    """What one EMPCallback of a recipe will do.

    Attributes:
        name: Of its numbers in loggers; "" where it is alone.
        config: Its settings.
        layers: What has a mask of its own, or where masks are made in the forward pass.
        groups: In which components compete with each other; None: the first batch tells.
        components: What is scored; None: the first batch tells.
        masked: What it masks.
        refreshes: Optimizer steps that end in one, ascending; None: not known.
        traffic: Of one refresh; of "rewire" of all but the first.
    """

    name: str
    config: EMPConfig
    layers: int
    groups: int | None
    components: int | None
    masked: Masked
    refreshes: tuple[int, ...] | None
    traffic: Traffic


@dataclass(frozen=True, kw_only=True)
class Foresight:
    """What a recipe will do.

    Attributes:
        model: Class of the LightningModule.
        built: How it was built.
        sizes: What model and optimizers hold.
        strategy: How the training is spread.
        memory: Bytes of each rank, see `memory_of`.
        data: What it trains on.
        accumulated: Batches of an optimizer step.
        length: How long it trains.
        prunings: Of each EMPCallback.
        folders: What it writes.
        warnings: What may be meant, in one line each.
        problems: What will fail or do nothing, in one line each.
    """

    model: str
    built: str
    sizes: Sizes
    strategy: Strategy
    memory: dict[str, float | None]
    data: DataSize
    accumulated: int
    length: Length
    prunings: list[Pruning] = field(default_factory=list)
    folders: list[Folder] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def examples(self) -> int | None:
        """Examples of one optimizer step, of all ranks; None: not known."""
        return None if self.data.batch is None else self.data.batch * self.strategy.batches * self.accumulated


def foresee(recipe: Recipe, patience: float = PATIENCE) -> Foresight:
    """Return what a recipe will do.

    Args:
        recipe: The parsed recipe; changed.
        patience: Seconds that its data may take to be set up.

    Raises:
        RecipeError: An entry of it cannot be built.
    """
    problems: list[str] = []
    strategy = strategy_of(recipe.config.trainer.as_dict(), problems)
    with isolate_rng(), quiet():
        warnings = [told] if (told := without_weights(recipe)) else []
        built = build_on_meta(recipe)
        module, trainer = recipe.model, recipe.trainer
        module.to(strategy.owner_dtype)
        asked = AskedTrainer(trainer, strategy, recipe.datamodule)
        data = data_size(recipe.datamodule, asked, patience)
        length = training_length(trainer, data.batches)
        asked.estimated_stepping_batches = length.steps or 1
        module.trainer = asked
        optimizers = optimizers_of(module.configure_optimizers())
        callbacks = _callbacks(trainer)
        found = _Prunings(module, optimizers, strategy, length, trainer.accumulate_grad_batches, problems)
        prunings = [one for each in callbacks if (one := found.of(each, own_name(each, callbacks))) is not None]
        sizes = sizes_of(module, optimizers)
    problems += [data.problem] if data.problem else []
    warnings += [data.unsure] if data.unsure else []
    if length.steps is None and length.steps_of_epoch is not None:
        problems.append("nothing ends the training: set trainer.max_epochs or trainer.max_steps")
    folders = _folders(recipe, callbacks)
    _judge(folders, strategy, problems, warnings)
    return Foresight(
        model=type(module).__name__,
        built=built,
        sizes=sizes,
        strategy=strategy,
        memory=memory_of(sizes, [one.masked for one in prunings], strategy),
        data=data,
        accumulated=trainer.accumulate_grad_batches,
        length=length,
        prunings=prunings,
        folders=folders,
        warnings=warnings,
        problems=problems,
    )


def _callbacks(trainer: Any) -> list[EMPCallback]:
    return [one for one in trainer.callbacks if isinstance(one, EMPCallback)]


@dataclass(frozen=True)
class _Prunings:
    """What EMPCallbacks make of a model that is spread as the recipe says."""

    module: Any
    optimizers: list[torch.optim.Optimizer]
    strategy: Strategy
    length: Length
    accumulated: int
    problems: list[str]

    def of(self, callback: EMPCallback, name: str) -> Pruning | None:
        """Return what one will do; None where it cannot begin, which is a problem."""
        config, called = callback.config, f"EMPCallback {name}".strip()
        try:
            found = Refresher(config, MASK_MODES[config.mode](), detect_backend(self.module, self.optimizers))
        except (ValueError, TypeError, NotImplementedError) as error:
            if not raised_by_us(error):
                raise
            self.problems.append(f"{called}: {' '.join(str(error).split())}")
            return None
        refreshes = self._refreshes(config, found)
        if refreshes == ():
            self.problems.append(f"{called}: {self._never(config)}")
        layers = found.layers
        known = bool(layers) and all(layer.is_known for layer in layers)
        by_row = config.scope == "row"
        return Pruning(
            name=name,
            config=config,
            layers=len(layers) or len(found.dynamic),
            groups=(sum(layer.span.rows for layer in layers) if by_row else found.groups) if known else None,
            components=sum(layer.span.size for layer in layers) if known else None,
            masked=Masked(config=config, weights=_masked(layers), products=_products(config, layers)),
            refreshes=refreshes,
            traffic=refresh_traffic(config, layers, self._spread, first=False),
        )

    @property
    def _spread(self) -> Spread:
        strategy = self.strategy
        return Spread(
            ranks=strategy.batches if strategy.kind == "FSDP2" else strategy.ranks,
            held=strategy.held,
            dtype=strategy.owner_dtype,
            by_kernels=strategy.accelerator and not strategy.offloads,
        )

    def _refreshes(self, config: EMPConfig, found: Refresher) -> tuple[int, ...] | None:
        """Return the optimizer steps that end in a refresh; None where nobody knows."""
        schedule, length = config.schedule, self.length
        end, unit = (length.steps, 1) if config.every_n_steps else (length.epochs, length.steps_of_epoch or 0)
        if end is None or length.steps is None:
            return None
        steps: list[int] = []
        due = schedule.next_after(0)
        while due is not None and due <= end:
            steps.append(min(due * unit, length.steps))
            due = schedule.next_after(due)
        # What grew back in `project` is taken out at the end, by a refresh where no evidence is needed.
        closes = config.mode == "project" and not config.observe_only and found.criterion.needs is None
        return (*steps, length.steps) if closes and steps and steps[-1] < length.steps else tuple(steps)

    def _never(self, config: EMPConfig) -> str:
        length, schedule = self.length, config.schedule
        steps = f"{length.steps:,} optimizer steps"
        if self.accumulated > 1:
            steps += f" (of {self.accumulated} batches: accumulate_grad_batches)"
        epochs = "" if length.epochs is None else f" in {length.epochs:,} epochs"
        return (
            f"{schedule.told} asks for no refresh: the first is due after {schedule.unit} {schedule.first:,}, and the "
            f"training has {steps}{epochs}"
        )


def _masked(layers: Sequence[Layer]) -> int:
    return sum({id(weight.segment.owner): weight.segment.size for layer in layers for weight in layer.weights}.values())


def _products(config: EMPConfig, layers: Sequence[Layer]) -> int:
    found = [layer.input_products() for layer in layers if isinstance(layer, WeightLayer) and config.certify]
    return sum(value.numel() for parts in found for value in parts.values())


# ---- files ----------------------------------------------------------------------------------------------------------


def _folders(recipe: Recipe, callbacks: Sequence[EMPCallback]) -> list[Folder]:
    trainer = recipe.trainer
    logs = str(trainer.log_dir or trainer.default_root_dir)
    settle_checkpoints(trainer.checkpoint_callbacks, recipe.config.trainer.default_root_dir)
    places = [("logs", logs)]
    for one in trainer.checkpoint_callbacks:
        places.append(("checkpoints", str(getattr(one, "dirpath", None) or Path(logs, "checkpoints"))))
    for callback in callbacks:
        path = callback.trajectory_path
        places.append(("trajectory", logs if path is None else str(path).rpartition("/")[0] or "."))
    if "study" in read_recipe(recipe.path):
        places.append(("study", recipe.study.out or str(Path("runs", recipe.path.stem))))
    return [folder_of(*place) for place in dict.fromkeys(places)]


def _judge(folders: Sequence[Folder], strategy: Strategy, problems: list[str], warnings: list[str]) -> None:
    for folder in folders:
        if folder.writable is False:
            problems.append(f"{folder.what}: {folder.path} cannot be written")
        if strategy.nodes > 1 and folder.is_of_one_machine:
            warnings.append(
                f"{folder.what}: {folder.path} lies on {folder.file_system}, which is one machine's own: each node "
                "would write a folder of its own, and find nothing of the others when it resumes"
            )
