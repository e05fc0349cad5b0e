"""One training of a study: fit, test, and the proof of what it was trained on."""

from __future__ import annotations

import dataclasses
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.utilities.exceptions import SIGTERMException
from pytorch_lightning.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils._pytree import tree_leaves

from emp_callbacks.config import EMPConfig
from emp_callbacks.cost.training_loss import show_batches
from emp_callbacks.criteria import make_criterion
from emp_callbacks.integrations.lightning import EMPCallback
from emp_callbacks.integrations.record import TRAJECTORY_FILE
from emp_callbacks.pruning.pruner import EMPPruner
from emp_callbacks.study.flops import layer_flops, masked_flops
from emp_callbacks.study.measure import layer_densities, measure
from emp_callbacks.study.quiet import quiet
from emp_callbacks.study.recipe.check import nearest
from emp_callbacks.study.recipe.recipe import Recipe
from emp_callbacks.study.rewinding import Rewinding
from emp_callbacks.study.rolling_checkpoint import RollingCheckpoint
from emp_callbacks.study.training_cost import network_cost
from emp_callbacks.study.training_record import OnStep, TrainingRecord, digest_of

Adapt = Callable[[EMPConfig], EMPConfig]
StepContext = Callable[[], AbstractContextManager[Any]]
# These end a run early or choose weights by a metric: arms would no longer be trained alike.
_UNFAIR = (pl.callbacks.EarlyStopping, pl.callbacks.Timer)
# What the study replaces by its own: bars and tables, and checkpoints (final weights are tested).
_REPLACED = (pl.callbacks.ProgressBar, pl.callbacks.ModelSummary, pl.callbacks.Checkpoint, EMPCallback)


class Training:
    """A fit of the recipe as one arm wants it; `record` then tests the weights as they are.

    Args:
        recipe: Gives fresh model, data and trainer.
        seed: Seeds initial weights, batch order and dropout.
        adapt: Turns the EMP settings of the recipe into those of the arm.
        folder: Where Lightning's logs and the trajectory go; None: nowhere, for a model that was trained earlier.
        on_step: Called after each optimizer step with (steps done, steps in all if known).
        rewinds: Whether what is kept goes back to its initial values at each refresh.
        checkpoint: File that the training keeps up to date and goes on from where it is there; None: none.

    Attributes:
        recipe_config: EMP settings of the recipe.
        config: EMP settings of this training.
    """

    def __init__(
        self,
        recipe: Recipe,
        seed: int,
        adapt: Adapt,
        folder: Path | None,
        on_step: OnStep,
        *,
        rewinds: bool = False,
        checkpoint: Path | None = None,
    ) -> None:
        self._adapt, self._seed, self._rewinds = adapt, seed, rewinds
        self._folder, self._checkpoint = folder, checkpoint
        self._rolling = [RollingCheckpoint(checkpoint, recipe.study.checkpoint_every)] if checkpoint else []
        self.evidence = TrainingRecord(on_step)
        pl.seed_everything(seed, workers=True, verbose=False)
        with quiet():
            recipe.build(
                self._callbacks,
                logger=CSVLogger(str(folder), name="", version=_free_version(folder)) if folder else False,
                **({"default_root_dir": str(folder)} if folder else {}),
                enable_progress_bar=False,
                enable_model_summary=False,
                enable_checkpointing=bool(self._rolling),
            )
        self.model, self.data, self.trainer = recipe.model, recipe.datamodule, recipe.trainer
        self.data.trainer = self.trainer  # says how many ranks share the batches, also where nothing is fitted
        _check_fair(self.trainer.callbacks)  # type: ignore[attr-defined]
        self.seconds = self._seconds_after = 0.0

    def fit(self) -> None:
        """Train, or go on from the checkpoint that is there.

        Raises:
            KeyboardInterrupt: The user stopped it, or a signal.
            RuntimeError: The ranks ended with different weights.
        """
        path = self._checkpoint
        begun = self.trainer.strategy.broadcast(path if path is not None and path.is_file() else None, src=0)
        self.evidence.begin()
        with quiet(), _interrupts_raised(self.trainer):
            self.trainer.fit(self.model, datamodule=self.data, ckpt_path=begun)
        self.seconds = self.evidence.seconds
        if self.trainer.world_size > 1:
            self._unite()

    def _unite(self) -> None:
        """Take rank 0's statistics of batches, which differ after a last step, and check that all else is alike."""
        strategy = self.trainer.strategy
        for buffer in self.model.buffers():
            buffer.copy_(strategy.broadcast(buffer.cpu(), src=0))
        own = digest_of(self.model)
        if strategy.reduce_boolean_decision(own != strategy.broadcast(own, src=0), all=False):
            raise RuntimeError(
                f"the {self.trainer.world_size} ranks ended with different weights, so their masks differ, too: the "
                "model or a callback of the recipe changes weights on one rank alone"
            )

    def take_up(self, weights: Mapping[str, Tensor]) -> None:
        """Stand where a fit that ended with these weights left off."""
        self.model.load_state_dict(weights)
        if self.trainer.local_rank == 0:
            self.data.prepare_data()
        self.trainer.strategy.barrier()
        self.data.setup("fit")

    def prune_once(self, config: EMPConfig, folder: Path | None) -> EMPPruner:
        """Apply EMP once to the trained model, without fine-tuning; features are masked inside `record`.

        What the criterion reads of data comes from the first `evidence_steps` training batches, in evaluation mode.

        Args:
            config: Settings without a schedule.
            folder: Where the trajectory goes; None: into memory only.

        Raises:
            ValueError: Evidence is needed, and the training step does not give a loss or moves the weights itself.
        """
        started = time.perf_counter()
        pruner = self.informed_pruner(config, folder and folder / TRAJECTORY_FILE)
        pruner.refresh()
        pruner.finalize()
        self._seconds_after = time.perf_counter() - started
        return pruner

    def informed_pruner(self, config: EMPConfig, trajectory_path: Path | None = None) -> EMPPruner:
        """Return a pruner of the trained model that has seen what its criterion reads of data, before its refresh.

        Raises:
            ValueError: As `prune_once`.
        """
        pruner = EMPPruner(self.model, config=config, trajectory_path=trajectory_path)
        pruner.start_at(self.evidence.steps, self.trainer.current_epoch)
        needs = make_criterion(config.criterion, config.target).needs
        if needs is None and not config.masks_in_forward:
            return pruner
        with self.batches(config.evidence_steps) as (batches, step_context):
            show_batches(pruner, self.model, batches, gradients=needs == "gradients", step_context=step_context)
        return pruner

    @contextmanager
    def batches(self, count: int) -> Iterator[tuple[Iterator[Any], StepContext]]:
        """Lend the first training batches, on the model's device, and the context of a training step.

        The model is in evaluation mode, logs nothing, and its weights and statistics stay as they are.

        Raises:
            ValueError: The training step moves the weights itself.
        """
        _check_automatic(self.model)
        strategy, precision = self.trainer.strategy, self.trainer.precision_plugin
        self.model.to(strategy.root_device).eval()
        with quiet(), isolate_rng(), _unlogged(self.model):
            pl.seed_everything(self._seed, workers=True, verbose=False)
            found = islice(self.data.train_dataloader(), count)
            on_device = (strategy.batch_to_device(precision.convert_input(batch)) for batch in found)
            yield on_device, precision.train_step_context

    def test(self, pruner: EMPPruner | None = None) -> dict[str, float]:
        """Return the test metrics of the model as it is; with a pruner, features are masked as it decided."""
        # Each rank tests on all: shares of one size would count some examples twice.
        self.trainer._accelerator_connector.use_distributed_sampler = False
        with quiet(), _interrupts_raised(self.trainer), pruner.masked_forward() if pruner else nullcontext():
            (metrics,) = self.trainer.test(self.model, datamodule=self.data, verbose=False)
        return {name: float(value) for name, value in metrics.items()}

    def record(self, pruner: EMPPruner | None = None) -> dict[str, Any]:
        """Test the current weights and return the run's record, with everything measured on them.

        Args:
            pruner: Of `prune_once`; None for what training itself made.
        """
        metrics = self.test(pruner)
        source = pruner or self.emp.pruner
        assert source is not None
        return {
            "metrics": metrics,
            **measure(self.model, source.config, source.last_events),
            "steps": self.evidence.steps,
            "refreshes": len({event.step for event in source.trajectory}),
            "seconds": self.seconds + (self._seconds_after if pruner else 0.0),
            "curve": self.evidence.curve,
            "data": getattr(self.data, "content_digest", None),
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "layers": layer_densities(self.model, source.config),
            "explored": self.evidence.explored,
            "flops": self._cost(source),
            "trajectory": source.trajectory.records(),
            "init_digest": self.evidence.init_digest,
            "batches_digest": self.evidence.batches_digest,
        }

    @cached_property
    def _layer_flops(self) -> tuple[Mapping[str, int], int] | None:
        """FLOPs of each layer of the dense network for one example, and the examples in a batch.

        None where a training step is more than one forward pass of the module.
        """
        if not self.model.automatic_optimization:
            return None
        with self.batches(1) as (batches, step_context), step_context():
            batch = next(iter(batches))
            examples = _examples_in(batch)
            try:
                return layer_flops(self.model, lambda: self.model.training_step(batch, 0), examples), examples
            except (ValueError, RuntimeError):  # an inner network is run by itself, or the step needs gradients
                return None

    def _cost(self, pruner: EMPPruner) -> dict[str, float] | None:
        """Return the FLOPs of the network and of its training; None where they are not known."""
        if pruner.config.target != "weights" or self._layer_flops is None:
            return None
        layers, examples = self._layer_flops
        mode = "observe" if pruner.config.observe_only else pruner.config.mode
        rows = pruner.trajectory.records() if pruner.config.schedule.unit is not None else ()
        try:
            batch = examples * self.trainer.accumulate_grad_batches * self.trainer.world_size
            cost = network_cost(layers, rows, mode, self.evidence.steps, batch)
            return {**cost, "inference": masked_flops(layers, layer_densities(self.model, pruner.config))}
        except ValueError:  # a layer of several weights, of which nobody knows their parts of its FLOPs
            return None

    def _callbacks(self, own: list[pl.Callback]) -> list[pl.Callback]:
        self.recipe_config = _config_of(own)
        self.config = self._adapt(self.recipe_config)
        settings = {field.name: getattr(self.config, field.name) for field in dataclasses.fields(EMPConfig)}
        # In one place, however often the training is taken up.
        path = self._folder and self._folder / TRAJECTORY_FILE
        self.emp = EMPCallback(summary=False, trajectory_path=path, **settings)
        kept = [callback for callback in own if not isinstance(callback, _REPLACED)]
        self.evidence.watch(self.emp)
        return [self.evidence, *kept, self.emp, *([Rewinding(self.emp)] if self._rewinds else []), *self._rolling]


def recipe_config(recipe: Recipe) -> EMPConfig:
    """Return the EMP settings of a recipe; nothing is trained.

    Raises:
        ValueError: The recipe has several EMPCallbacks.
    """
    with isolate_rng(), quiet():
        return _config_of(recipe.build_bare(logger=False, enable_checkpointing=False))


def check_metric(metric: str, logged: Mapping[str, float], name: str) -> None:
    """Raise ValueError unless a test logged the metric that a study is about."""
    if metric not in logged:
        raise ValueError(
            f"study.metric {metric!r} is not logged by the test of {name}; logged: {', '.join(logged) or 'nothing'}"
            f"{nearest(metric, logged)}"
        )


def _examples_in(batch: Any) -> int:
    """Return the number of examples in a batch: the length of its first tensor."""
    found = [item for item in tree_leaves(batch) if isinstance(item, Tensor) and item.dim()]
    return len(found[0]) if found else 1


def _config_of(callbacks: Sequence[pl.Callback]) -> EMPConfig:
    found = [callback.config for callback in callbacks if isinstance(callback, EMPCallback)]
    if len(found) > 1:
        raise ValueError(f"trainer.callbacks holds {len(found)} EMPCallbacks; a study needs one at most")
    # A recipe without EMP still says what to compare: one refresh per epoch.
    return found[0] if found else EMPConfig(every_n_epochs=1)


def _check_automatic(model: pl.LightningModule) -> None:
    if not model.automatic_optimization:
        raise ValueError(
            f"pruning after training gathers evidence through {type(model).__name__}.training_step, which optimises by "
            "itself and would move the weights; leave out the one_shot arms"
        )


@contextmanager
def _unlogged(model: pl.LightningModule) -> Iterator[None]:
    """Let training_step log into the void: outside a Trainer's loop `self.log` raises."""
    if "log" in vars(model):  # within another block
        yield
        return
    model.log = lambda *_, **__: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        del model.log


def _check_fair(callbacks: Sequence[pl.Callback]) -> None:
    """Raise ValueError where a callback of the recipe, or a Trainer's own for `max_time`, ends a training early."""
    for callback in callbacks:
        if isinstance(callback, _UNFAIR):
            raise ValueError(
                f"the trainer holds {type(callback).__name__}, which ends some arms earlier than others; remove it (or "
                "trainer.max_time) from the recipe and fix trainer.max_epochs or trainer.max_steps"
            )


def _free_version(folder: Path) -> str:
    """Return the part of a run's folder for the logs: those of an interrupted training stay."""
    return f"resumed-{1 + len(list(folder.glob('resumed-*')))}" if folder.is_dir() and any(folder.iterdir()) else ""


@contextmanager
def _interrupts_raised(trainer: pl.Trainer) -> Iterator[None]:
    """Turn Lightning's exits after Ctrl-C and SIGTERM into KeyboardInterrupt, with the signal handler restored."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
        if trainer.received_sigterm:  # in a test, which Lightning carries on with
            raise SIGTERMException
    except SystemExit as stop:
        # Lightning ignores further signals and exits with code 1: the study has to end on its own terms.
        if trainer.interrupted or isinstance(stop, SIGTERMException):
            raise KeyboardInterrupt from stop
        raise
    finally:
        if signal.getsignal(signal.SIGINT) is not handler and handler is not None:
            signal.signal(signal.SIGINT, handler)
