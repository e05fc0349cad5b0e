"""THE step: score -> moments -> keep count -> selection -> mask -> apply -> PruneEvent. Owns all state."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from emp_callbacks.accounting import check_ranks_agree, count_masks, prune_event
from emp_callbacks.audit import Audit, audit_masks
from emp_callbacks.backends import detect_backend
from emp_callbacks.config import EMPConfig, check_names
from emp_callbacks.criteria import CRITERIA
from emp_callbacks.decision import KeepRule, ScoredWeight, decide
from emp_callbacks.mask_file import load_masks, save_masks
from emp_callbacks.mask_mode import MASK_MODES, MaskedWeight, MaskMode, Observe
from emp_callbacks.pruner_state import describe, install_state, pack_state
from emp_callbacks.targets import prunable_weights
from emp_callbacks.trajectory import LayerStats, PruneEvent, Trajectory


class EMPPruner:
    """Effective Model Pruning around any training loop.

    Call `step()` after each optimizer step, `finalize()` at the end. The optimizer is watched through torch's own
    step hooks, so accumulated micro-batches and steps that a GradScaler skipped are not counted.

    Args:
        model: The module to prune: plain, compiled, wrapped in DistributedDataParallel or FullyShardedDataParallel,
            sharded by `fully_shard`; or a DeepSpeed engine.
        optimizer: The optimizer (or optimizers) that update it; None to prune a finished model by hand, and for a
            DeepSpeed engine, which brings its own.
        config: All settings; default `EMPConfig()`: no schedule, `refresh()` by hand.
        trajectory_path: JSON-lines file for the trajectory; written by rank 0. Default: memory only.
        **settings: Fields of EMPConfig by name, put over `config`.

    Attributes:
        config: The settings.
        trajectory: One PruneEvent per refresh and group.
        steps: Applied optimizer steps so far.
        epochs: Finished epochs so far.

    Raises:
        ValueError: A setting is invalid or selects no weights.
        TypeError: An argument has the wrong type, or a setting an unknown name.
        NotImplementedError: The model is sharded in a way that is not supported.

    Example:
        >>> model = nn.Linear(4, 2)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> pruner = EMPPruner(model, optimizer, every_n_steps=1)
        >>> model(torch.ones(1, 4)).sum().backward()
        >>> optimizer.step()
        >>> [event.keep for event in pruner.step()] == [int(pruner.masks["weight"].sum())]
        True
        >>> pruner.finalize()
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
        config: EMPConfig | None = None,
        *,
        trajectory_path: str | os.PathLike[str] | None = None,
        **settings: Any,
    ) -> None:
        check_names(settings)
        self.config = replace(config or EMPConfig(), **settings)
        self._schedule = self.config.schedule
        self._backend = detect_backend(model, optimizer)
        self._criterion = CRITERIA[self.config.criterion]()
        targets = prunable_weights(
            self._backend.module, self.config.include, self.config.exclude, self._backend.full_shape
        )
        self._weights = [MaskedWeight(segment) for segment in self._backend.segments(targets)]
        self._parameters = [target.parameter for target in targets]
        self._by_owner = _by_owner(self._weights)
        self._mode: MaskMode = Observe() if self.config.observe_only else MASK_MODES[self.config.mode]()
        self.trajectory = Trajectory(trajectory_path if self._backend.rank == 0 else None)
        self.steps = self.epochs = 0
        self._last_position = 0
        self._steps_at_refresh = 0
        self._gradient_hooks: list[RemovableHandle] = []
        self._attach()

    # ---- the loop -------------------------------------------------------------------------------------------------

    def step(self, *, end_of_epoch: bool = False) -> list[PruneEvent]:
        """Count one optimizer step and refresh the masks if the schedule says so. Collective when it refreshes.

        Args:
            end_of_epoch: Whether this was the last step of an epoch; needed for `every_n_epochs`.

        Returns:
            The rows of the refresh; empty if none was due, or if no step was applied since the last call (a
            micro-batch, or a step skipped by loss-scale overflow: a refresh due there is late, not lost).

        Raises:
            FloatingPointError: A score is NaN or Inf; no mask was changed.
        """
        applied = self._backend.take_applied()
        self.steps += applied
        self.epochs += end_of_epoch
        if not applied or not self._schedule.is_due(self._last_position, self._now):
            return []
        return self._refresh(self.epochs - end_of_epoch)

    def refresh(self) -> list[PruneEvent]:
        """Recompute the masks now and return the rows. Collective.

        Raises:
            FloatingPointError: A score is NaN or Inf; no mask was changed.
        """
        return self._refresh(self.epochs)

    def end_epoch(self) -> list[PruneEvent]:
        """Count a finished epoch where the loop learns of it only after its last `step()`; refresh if one is due."""
        self.epochs += 1
        if self._schedule.unit != "epoch" or not self._schedule.is_due(self._last_position, self._now):
            return []
        return self._refresh(self.epochs - 1)

    def mask_gradients(self) -> None:
        """Take the pruned entries out of the gradients now, in `freeze`: before a clip that reads their norm.

        Needed only under FSDP1; elsewhere they are masked as they arrive, or by DeepSpeed's step before it clips.
        """
        for weight in self._weights:
            self._mode.mask_gradient(weight)

    def finalize(self) -> None:
        """Take every hook off; the model stays masked, and what was recorded stays here. Twice is once.

        In `project`, weights that grew back since the last refresh are projected by a closing refresh. Collective.
        """
        if self.needs_closing_refresh:
            self.refresh()
        if self._attached and self._schedule.unit is not None and not self.trajectory and self.steps:
            warnings.warn(
                f"the schedule {self._schedule} asked for no refresh in {self.steps} steps and {self.epochs} "
                "finished epochs: nothing was pruned (in a plain loop, epochs end with step(end_of_epoch=True))",
                stacklevel=2,
            )
        self.detach()

    @property
    def sharded(self) -> bool:
        """Whether this rank holds only parts of the parameters; `state_dict()` then is this rank's part, too."""
        return not all(weight.segment.replicated for weight in self._weights)

    @property
    def needs_closing_refresh(self) -> bool:
        """Whether weights have moved away from the mask since the last refresh (only in `project`)."""
        return self._mode.name == "project" and bool(self.trajectory) and self.steps > self._steps_at_refresh

    # ---- what a user reads ----------------------------------------------------------------------------------------

    @property
    def masks(self) -> dict[str, Tensor]:
        """Parameter name -> bool mask of its shape, True = kept; all kept before the first refresh.

        Where the parameter is sharded: of this rank's part, flat.

        With `observe_only` these are the masks that EMP would apply.
        """
        return {w.name: w.mask_or_ones.clone() for w in self._weights}

    @property
    def density(self) -> float:
        """Kept share of all scored weights, in [0, 1]. Collective."""
        kept = sum(int(w.mask_or_ones.reshape(-1)[w.segment.counted].sum()) for w in self._weights)
        total = int(self._backend.all_sum(torch.tensor([kept]))[0])
        return total / sum(w.segment.size for w in self._weights)

    @property
    def layers(self) -> list[LayerStats]:
        """Every scored parameter as the last refresh left it; empty before the first."""
        return [layer for event in self.last_events for layer in event.layers]

    @property
    def last_events(self) -> list[PruneEvent]:
        """The rows of the last refresh, one per group."""
        if not self.trajectory:
            return []
        groups = 1 if self.config.scope == "global" else len(self._weights)
        return self.trajectory[-groups:]

    def audit(self) -> Audit:
        """Count, over all ranks, the entries of every copy of the weights that contradict the masks. Collective."""
        return audit_masks(self._weights, self._mode, self._backend)

    @contextmanager
    def dense_weights(self) -> Iterator[None]:
        """Inside the block the model computes with its dense weights; `feedback` hides the pruned ones after it.

        Collective where the parameters are sharded.
        """
        try:
            with self._dense_owners():
                self._backend.refresh_copies()
                yield
        finally:
            self._backend.refresh_copies()

    @contextmanager
    @torch.no_grad()
    def _dense_owners(self) -> Iterator[None]:
        for weight in self._weights:
            self._mode.reveal(weight)
        try:
            yield
        finally:
            self._settle()

    # ---- checkpoints ----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return masks (packed bits), the dense values behind them, schedule position and trajectory.

        Tensors, numbers, strings, lists and dicts only: it loads with `torch.load(..., weights_only=True)`.
        The weights themselves are in the model's own state_dict, masked.
        """
        self._settle_if_attached()
        return pack_state(self.config, self._mode, self._weights, self.trajectory, self._position())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`'s state, bit for bit, together with the model's and optimizer's own states.

        Raises:
            ValueError: The state is of another mode, scope or model; nothing was changed.
        """
        position = install_state(state, self.config, self._mode, self._weights, self.trajectory)
        self._backend.refresh_copies()
        self.steps, self.epochs, self._last_position, self._steps_at_refresh = position

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write what `state_dict()` returns into a folder from which any number of ranks can continue. Collective.

        Each rank writes the part that it counts, packed bits and, in `feedback`, the dense values behind them; a kill
        at any moment leaves the folder's old checkpoint or the new one.

        Args:
            folder: Shared by all ranks; made if missing, other files in it are left alone.

        Raises:
            OSError: A rank could not write; the folder's old checkpoint is still whole.
        """
        self._settle_if_attached()
        state = describe(self.config, self._mode, self._weights, self.trajectory, self._position())
        save_masks(folder, state, self._weights, self._backend)

    def load(self, folder: str | os.PathLike[str]) -> None:
        """Continue from a folder that `save()` wrote, on any number of ranks and under any strategy. Collective.

        The model's weights and the optimizer's state come from their own checkpoint, loaded before this one.

        Raises:
            FileNotFoundError: The folder holds no finished save, or one of its files is missing.
            ValueError: A file is damaged, or of another mode, scope or model. All ranks raise; nothing was changed.
        """
        position = load_masks(folder, self.config, self._mode, self._weights, self.trajectory, self._backend)
        self.steps, self.epochs, self._last_position, self._steps_at_refresh = position

    def start_at(self, steps: int, epochs: int) -> None:
        """Take over the position of a training run that was begun without EMP."""
        self.steps, self.epochs = steps, epochs
        self._last_position = self._now

    def _settle(self) -> None:
        """Bring every weight to what forward sees, also after an optimizer step that raised half-way."""
        for weight in self._weights:
            self._mode.after_update(weight)

    def _settle_if_attached(self) -> None:
        # After finalize() the model is the user's alone: reading the state must not touch it.
        if self._attached:
            self._settle()

    @property
    def _now(self) -> int:
        """The position in the schedule's own unit."""
        return self.epochs if self._schedule.unit == "epoch" else self.steps

    def _position(self) -> tuple[int, int, int, int]:
        return self.steps, self.epochs, self._last_position, self._steps_at_refresh

    # ---- hooks ----------------------------------------------------------------------------------------------------

    def detach(self) -> None:
        """Take every hook off the optimizer and the parameters; the state stays."""
        self._settle()
        self._backend.detach()
        while self._gradient_hooks:
            self._gradient_hooks.pop().remove()
        self._attached = False

    def _attach(self) -> None:
        self._attached = True
        self._backend.attach(self)
        if self._mode.masks_gradient:
            for weight, parameter in zip(self._weights, self._parameters, strict=True):
                if weight.segment.owner is parameter and parameter.requires_grad:
                    # As the gradient arrives: before clipping reads its norm and before DDP sums it.
                    hook = parameter.register_post_accumulate_grad_hook(self._mask_gradient)
                    self._gradient_hooks.append(hook)

    def before_update(self, owners: Sequence[Tensor]) -> None:
        """Called by the backend when gradients are ready and the update comes next."""
        for owner in owners:
            for weight in self._by_owner.get(id(owner), ()):
                self._mode.before_update(weight)

    def after_update(self, owners: Sequence[Tensor]) -> None:
        """Called by the backend when the update is done, before anything reads the weights."""
        for owner in owners:
            for weight in self._by_owner.get(id(owner), ()):
                self._mode.after_update(weight)

    def _mask_gradient(self, parameter: nn.Parameter) -> None:
        for weight in self._by_owner[id(parameter)]:
            self._mode.mask_gradient(weight)

    # ---- the refresh ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _refresh(self, epoch: int) -> list[PruneEvent]:
        started = time.perf_counter()
        beta = self.config.beta_at(self._now)
        rule = KeepRule(beta=beta, density=self.config.density, min_density=self.config.min_density)
        with self._dense_owners():
            scored = [ScoredWeight(w.segment, self._criterion.score(w.segment)) for w in self._weights]
            decisions = decide(scored, self.config.scope, rule, self._backend, self.steps)
            masks = [
                self._mode.merge(self._weights[i].mask, decision.mask(i))
                for decision in decisions
                for i in decision.members
            ]
            check_ranks_agree(decisions, masks, self._weights, self._backend, self.steps)
            counts = count_masks(self._weights, scored, masks, self._backend)
            for weight, mask in zip(self._weights, masks, strict=True):
                self._mode.install(weight, mask, self._backend.optimizer_states(weight.segment))
        self._backend.refresh_copies()
        seconds = time.perf_counter() - started
        common = {
            "step": self.steps,
            "epoch": epoch,
            "mode": self._mode.name,
            "criterion": self.config.criterion,
            "scope": self.config.scope,
            "beta": beta if self.config.density is None else None,
            "seconds": seconds,
        }
        events = [prune_event(decision, scored, counts, common) for decision in decisions]
        self.trajectory.extend(events)
        self._last_position, self._steps_at_refresh = self._now, self.steps
        return events


def _by_owner(weights: Sequence[MaskedWeight]) -> dict[int, list[MaskedWeight]]:
    by_owner: dict[int, list[MaskedWeight]] = {}
    for weight in weights:
        by_owner.setdefault(id(weight.segment.owner), []).append(weight)
    return by_owner
