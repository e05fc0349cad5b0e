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

from emp_callbacks.backends import detect_backend
from emp_callbacks.checkpoint.mask_file import load_evidence, load_masks, save_masks
from emp_callbacks.checkpoint.mask_part import evidence_part
from emp_callbacks.checkpoint.state import describe, install_state, masked_weights, pack_state
from emp_callbacks.config import EMPConfig, check_names
from emp_callbacks.criteria import make_criterion
from emp_callbacks.layer import Layer
from emp_callbacks.layer.mask_mode import MASK_MODES, MaskedWeight, MaskMode, Observe
from emp_callbacks.pruning.assembly import DynamicSite, find_dynamic_sites, find_layers
from emp_callbacks.pruning.audit import Audit, audit_masks
from emp_callbacks.pruning.decision import KeepRule
from emp_callbacks.pruning.evidence import Evidence
from emp_callbacks.pruning.refresh import refresh_dynamic, refresh_masks
from emp_callbacks.pruning.signatures import emptied_layers, uniform_scores
from emp_callbacks.schedule import Clock
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
        clock: Steps and epochs so far, and where the schedule stands.

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
        self.config = EMPConfig(**settings) if config is None else replace(config, **settings)
        self._schedule = self.config.schedule
        self._backend = detect_backend(model, optimizer)
        self._criterion = make_criterion(self.config.criterion, self.config.target)
        self._mode: MaskMode = Observe() if self.config.observe_only else MASK_MODES[self.config.mode]()
        self._layers: list[Layer] = []
        self._dynamic: list[DynamicSite] = []
        self._rule = self._rule_at(0)
        if self.config.is_dynamic:
            self._dynamic = find_dynamic_sites(self.config, self._criterion, self._backend, self._count)
        else:
            self._layers = find_layers(self.config, self._criterion, self._backend)
        self._weights = masked_weights(self._layers)
        self._by_owner = _by_owner(self._weights)
        self.trajectory = Trajectory(trajectory_path if self._backend.rank == 0 else None)
        sites = [*(site for layer in self._layers for site in layer.sites), *self._dynamic]
        self._evidence = Evidence(self._layers, sites, self._criterion, self._backend)
        self.clock = Clock()
        self._gradient_hooks: list[RemovableHandle] = []
        self._warned: set[str] = set()
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
        self.clock.steps += applied
        if end_of_epoch:
            self.clock.end_epoch()
        due = applied and self._schedule.is_due(self.clock.last_position, self._now)
        events = self._refresh(self.epochs - end_of_epoch) if due else []
        self._observe_if_near()
        return events

    def refresh(self) -> list[PruneEvent]:
        """Recompute the masks now and return the rows. Collective.

        Raises:
            FloatingPointError: A score is NaN or Inf; no mask was changed.
            RuntimeError: The criterion needs evidence (gradients, inputs, activations) and none was gathered.
        """
        events = self._refresh(self.epochs)
        self._observe_if_near()
        return events

    def end_epoch(self) -> list[PruneEvent]:
        """Count a finished epoch where the loop learns of it only after its last `step()`; refresh if one is due."""
        self.clock.end_epoch()
        due = self._schedule.unit == "epoch" and self._schedule.is_due(self.clock.last_position, self._now)
        events = self._refresh(self.epochs - 1) if due else []
        self._observe_if_near()
        return events

    def collect(self) -> None:
        """Take the gradients that are there now as the evidence of one batch, where no optimizer step follows.

        For a finished model: `loss.backward(); pruner.collect(); model.zero_grad()` for some batches, then `refresh()`.
        Inputs and activations are gathered in forward by themselves.

        Raises:
            ValueError: The criterion reads no gradients.
        """
        if self._criterion.needs != "gradients":
            raise ValueError(
                f"criterion {self.config.criterion_name!r} reads no gradients, so there is nothing to collect: drop "
                "collect(), or use 'taylor' or 'saliency'"
            )
        self._evidence.collect(self._by_owner)

    def mask_gradients(self) -> None:
        """Take the pruned entries out of the gradients now, in `freeze`: before a clip that reads their norm.

        Needed only under FSDP1; elsewhere they are masked as they arrive, or by DeepSpeed's step before it clips.
        """
        for weight in self._weights:
            self._mode.mask_gradient(weight)

    def finalize(self) -> None:
        """Take every hook off; what was recorded stays here. Twice is once.

        Masked weights stay masked. Features and attention edges are masked by hooks, so from now on only inside
        `masked_forward()`. In `project`, weights that grew back since the last refresh are projected by a closing
        refresh. Collective.
        """
        if self.needs_closing_refresh:
            self.close()
        if self._attached and self._schedule.unit is not None and not self.trajectory and self.steps:
            warnings.warn(
                f"the schedule {self._schedule} asked for no refresh in {self.steps} steps and {self.epochs} "
                "finished epochs: nothing was pruned (in a plain loop, epochs end with step(end_of_epoch=True))",
                stacklevel=2,
            )
        self.detach()

    @torch.no_grad()
    def close(self) -> list[PruneEvent]:
        """Project what grew back since the last refresh; return the rows of a refresh, if it took one. Collective.

        A criterion that needs evidence has none outside its window: the last mask is put in place again.
        """
        if self._criterion.needs is None:
            return self.refresh()
        for weight in self._weights:
            self._mode.install(weight, weight.mask_or_ones, self._backend.optimizer_states(weight.segment))
        self._backend.refresh_copies()
        self.clock.steps_at_refresh = self.steps
        return []

    @contextmanager
    def masked_forward(self) -> Iterator[None]:
        """Inside the block, features and attention edges are masked also after `finalize()`."""
        self._evidence.attach()
        try:
            yield
        finally:
            if not self._attached:
                self._evidence.detach()

    @property
    def sharded(self) -> bool:
        """Whether this rank holds only parts of the parameters; `state_dict()` then is this rank's part, too."""
        return not all(weight.segment.replicated for weight in self._weights)

    @property
    def needs_closing_refresh(self) -> bool:
        """Whether weights have moved away from the mask since the last refresh (only in `project`)."""
        grown = self.steps > self.clock.steps_at_refresh
        return self._mode.name == "project" and bool(self.trajectory) and grown

    @property
    def steps(self) -> int:
        """Applied optimizer steps so far."""
        return self.clock.steps

    @property
    def epochs(self) -> int:
        """Finished epochs so far."""
        return self.clock.epochs

    # ---- what a user reads ----------------------------------------------------------------------------------------

    @property
    def masks(self) -> dict[str, Tensor]:
        """Layer name -> bool mask of its components, True = kept; all kept before the first refresh.

        Weights: parameter name -> its shape, or this rank's part, flat, where it is sharded. Heads, neurons, nodes and
        features: module name -> shape (units,). Features are absent until their module was called, and where every
        sample has its own mask. With `observe_only` these are the masks that EMP would apply.
        """
        return {layer.name: layer.mask_or_ones.clone() for layer in self._layers if layer.is_known}

    @torch.no_grad()
    def scores(self) -> dict[str, Tensor]:
        """Return layer name -> |score| of its components now, layout of `masks`. Collective; changes nothing.

        A criterion that reads gradients, inputs or activations speaks of what was gathered since the last refresh.

        Raises:
            ValueError: Every sample or query row scores for itself.
            RuntimeError: Nothing was gathered.
        """
        if self._dynamic:
            raise ValueError(
                "every sample or query row has scores of its own here; they exist in the forward pass only"
            )
        self._criterion.batches = tuple(self._evidence.batches)
        with self._dense_owners():
            return {layer.name: self._criterion.score(layer).detach().abs() for layer in self._layers}

    @property
    def weight_masks(self) -> dict[str, Tensor]:
        """Parameter name -> bool mask of what is zeroed in it (False), like `masks` for weights; {} for features."""
        return {weight.name: weight.mask_or_ones.clone() for weight in self._weights}

    @property
    def density(self) -> float:
        """Kept share of all scored components, in [0, 1]. Collective. Where each sample has its own: the last mean."""
        if self._dynamic:
            return self.trajectory[-1].density if self.trajectory else 1.0
        if all(layer.mask is None for layer in self._layers):
            return 1.0
        kept = sum(int(layer.mask_or_ones.reshape(-1)[layer.span.counted].sum()) for layer in self._layers)
        total = int(self._backend.all_sum(torch.tensor([kept]))[0])
        return total / sum(layer.span.size for layer in self._layers)

    @property
    def layers(self) -> list[LayerStats]:
        """Every layer as the last refresh left it; empty before the first."""
        return [layer for event in self.last_events for layer in event.layers]

    @property
    def last_events(self) -> list[PruneEvent]:
        """The rows of the last refresh, one per group."""
        if not self.trajectory:
            return []
        groups = 1 if self.config.scope == "global" or self._dynamic else len(self._layers)
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
        The weights themselves are in the model's own state_dict, masked. Between two refreshes it also holds the
        evidence gathered by this rank: where one rank saves for all, call `share_evidence()` on all ranks first.
        """
        self._settle_if_attached()
        state = pack_state(self.config, self._mode, self._layers, self.trajectory, self.clock)
        return {**state, "evidence": {"batches": [*self._evidence.batches], "tensors": self._evidence.tensors()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`'s state, bit for bit, together with the model's and optimizer's own states.

        Raises:
            ValueError: The state is of another mode, scope or model; nothing was changed.
        """
        self.clock = install_state(state, self.config, self._mode, self._layers, self.trajectory)
        self._backend.refresh_copies()
        self._evidence.restore(**state["evidence"])
        self._take_up()

    def share_evidence(self) -> None:
        """Move the evidence that each rank has gathered to rank 0, whose state then stands for all. Collective."""
        self._evidence.share()

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
        self.share_evidence()
        state = describe(self.config, self._mode, self._layers, self.trajectory, self.clock)
        evidence = evidence_part(self._evidence.tensors(), self._layers)
        save_masks(folder, {**state, "batches": self._evidence.batches}, self._weights, self._backend, evidence)

    def load(self, folder: str | os.PathLike[str]) -> None:
        """Continue from a folder that `save()` wrote, on any number of ranks and under any strategy. Collective.

        The model's weights and the optimizer's state come from their own checkpoint, loaded before this one.

        Raises:
            FileNotFoundError: The folder holds no finished save, or one of its files is missing.
            ValueError: A file is damaged, or of another mode, scope or model. All ranks raise; nothing was changed.
        """
        self.clock = load_masks(folder, self.config, self._mode, self._layers, self.trajectory, self._backend)
        self._evidence.restore(*load_evidence(folder, self._layers))
        self._take_up()

    def start_at(self, steps: int, epochs: int, epoch_length: int | None = None) -> None:
        """Take over the position of a training run that was begun without EMP.

        Args:
            steps: Optimizer steps so far.
            epochs: Finished epochs so far.
            epoch_length: Optimizer steps of an epoch, if known.
        """
        self.clock = Clock(steps=steps, epochs=epochs, steps_at_epoch=steps, epoch_length=epoch_length)
        self.clock.last_position = self._now
        self._observe_if_near()

    def _take_up(self) -> None:
        """Go on from a clock and a trajectory that a checkpoint brought back."""
        for site in self._dynamic:
            site.active = bool(self.trajectory) and not self.config.observe_only
        self._rule = self._rule_at(self.clock.last_position)
        self._observe_if_near()

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

    # ---- hooks ----------------------------------------------------------------------------------------------------

    def detach(self) -> None:
        """Take every hook off the optimizer, the parameters and the modules; the state stays."""
        self._settle()
        self._backend.detach()
        while self._gradient_hooks:
            self._gradient_hooks.pop().remove()
        self._evidence.detach()
        self._attached = False

    def _attach(self) -> None:
        self._attached = True
        self._backend.attach(self)
        parameters = {id(parameter) for parameter in self._backend.module.parameters()}
        if self._mode.masks_gradient:
            for weight in self._weights:
                owner = weight.segment.owner
                if id(owner) in parameters and owner.requires_grad:
                    # As the gradient arrives: before clipping reads its norm and before DDP sums it.
                    self._gradient_hooks.append(owner.register_post_accumulate_grad_hook(self._mask_gradient))
        self._evidence.attach()
        self._observe_if_near()

    def _observe_if_near(self) -> None:
        """Gather evidence from now on if a refresh is near, else gather none."""
        near = self._attached and self.clock.is_near_refresh(self._schedule, self.config.evidence_steps)
        self._evidence.observe(near, in_eval=self._schedule.unit is None)

    def gradients_ready(self, owners: Sequence[Tensor], scale: Tensor | None) -> None:
        """Called by the backend once per step that will be applied, when the owners hold their final gradients."""
        self._evidence.gradients_ready({id(owner) for owner in owners}, self.steps, scale)

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
        self._rule = self._rule_at(self._now)
        common = {
            "step": self.steps,
            "epoch": epoch,
            "mode": self._mode.name,
            "criterion": self.config.criterion_name,
            "scope": "sample" if self._dynamic else self.config.scope,
            "beta": self._rule.beta if self.config.density is None else None,
        }
        if self._dynamic:
            events = refresh_dynamic(self._dynamic, self._backend, not self.config.observe_only, common)
        else:
            self._criterion.batches = tuple(self._evidence.batches)
            with self._dense_owners():
                certified = self.config.certify
                events = refresh_masks(
                    self._layers, self._criterion, self._rule, self._mode, self._backend, common, certified=certified
                )
            self._backend.refresh_copies()
        seconds = time.perf_counter() - started
        events = [replace(event, seconds=seconds) for event in events]
        self.trajectory.extend(events)
        self.clock.last_position, self.clock.steps_at_refresh = self._now, self.steps
        self._evidence.release()
        self._warn_once(events)  # last: where warnings are errors, the refresh is done all the same
        return events

    def _warn_once(self, events: Sequence[PruneEvent]) -> None:
        """Say, once and on one rank, where N_eff is no good budget (a fixed density needs none) or a layer is empty."""
        if self._backend.rank:
            return
        alike = uniform_scores(events) if self.config.density is None else []
        for kind, found in (("alike", alike), ("emptied", emptied_layers(events))):
            if found and kind not in self._warned:
                self._warned.add(kind)
                warnings.warn(found[0], stacklevel=4)

    def _rule_at(self, position: int) -> KeepRule:
        config = self.config
        rule = KeepRule(beta=config.beta_at(position), density=config.density, min_density=config.min_density)
        # Of weights there are so many that neither guard matters.
        few = config.target != "weights"
        return replace(rule, min_units=config.min_units, tolerance=config.tolerance) if few else rule

    def _count(self, n_eff: Tensor, size: int, nonzero: Tensor) -> Tensor:
        # Looked up at every call: a dynamic site must see the beta of the last refresh.
        return self._rule.counts(n_eff, size, nonzero)


def _by_owner(weights: Sequence[MaskedWeight]) -> dict[int, list[MaskedWeight]]:
    by_owner: dict[int, list[MaskedWeight]] = {}
    for weight in weights:
        by_owner.setdefault(id(weight.segment.owner), []).append(weight)
    return by_owner
