"""What a pruner scores, by which criterion and rule, and the refresh itself with its rows and warnings."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import final

import torch
from torch import Tensor

from emp_callbacks.backends import Backend
from emp_callbacks.checkpoint.state import masked_weights
from emp_callbacks.config import EMPConfig
from emp_callbacks.criteria import make_criterion
from emp_callbacks.layer import FeatureLayer, Layer
from emp_callbacks.layer.mask_mode import MaskMode
from emp_callbacks.pruning.assembly import DynamicSite, find_dynamic_sites, find_layers, find_left_out
from emp_callbacks.pruning.decision import KeepRule
from emp_callbacks.pruning.evidence import Evidence
from emp_callbacks.pruning.refresh import refresh_dynamic, refresh_masks
from emp_callbacks.pruning.signatures import emptied_layers, uniform_scores, warn_the_user
from emp_callbacks.targets.forward_site import ForwardSite
from emp_callbacks.trajectory import PruneEvent


@final
class Refresher:
    """Layers or dynamic sites, their evidence, and the rule that decides how many stay.

    Args:
        config: The settings.
        mode: What masks mean.
        backend: The parallel strategy.

    Attributes:
        criterion: How components are scored.
        layers: What has a mask of its own; empty where every sample or query row makes one for itself.
        left_out: The parameters that no mask reaches, and why.
        weights: The masked parameters of the layers, in order; empty where modules' outputs are masked.
        dynamic: Where samples or query rows make their own; empty otherwise.
        evidence: What the criterion needs besides the weights.

    Raises:
        ValueError: The settings select nothing, or what the criterion cannot score.
    """

    def __init__(self, config: EMPConfig, mode: MaskMode, backend: Backend) -> None:
        self._config, self._mode, self._backend = config, mode, backend
        self.criterion = make_criterion(config.criterion, config.target)
        self.layers: list[Layer] = []
        self.dynamic: list[DynamicSite] = []
        self._rule = _rule_at(0, config)
        if config.is_dynamic:
            self.dynamic = find_dynamic_sites(config, self.criterion, backend, self._count)
        else:
            self.layers = find_layers(config, self.criterion, backend)
        self.weights = masked_weights(self.layers)
        self.left_out = find_left_out(config, backend, self.weights)
        sites = [*(site for layer in self.layers for site in layer.sites), *self.dynamic]
        self.evidence = Evidence(self.layers, sites, self.criterion, backend)
        self._warned: set[str] = set()

    @torch.no_grad()
    def run(self, step: int, epoch: int, position: int, dense_owners: AbstractContextManager[None]) -> list[PruneEvent]:
        """Recompute every mask and return the rows. Collective.

        Args:
            step: Applied optimizer steps, for the rows.
            epoch: Epoch of the step, for the rows.
            position: Where the run stands in the schedule's unit; decides beta.
            dense_owners: Inside it, what the optimizer updates holds the dense values.

        Raises:
            FloatingPointError: A score is NaN or Inf; no mask was changed.
            RuntimeError: Evidence is missing, or ranks disagree; no mask was changed.
        """
        started, config = time.perf_counter(), self._config
        self._rule = _rule_at(position, config)
        common = {
            "step": step,
            "epoch": epoch,
            "mode": self._mode.name,
            "criterion": config.criterion_name,
            "scope": "sample" if self.dynamic else config.scope,
            "beta": self._rule.beta if config.density is None else None,
        }
        if self.dynamic:
            events = refresh_dynamic(self.dynamic, self._backend, not config.observe_only, common)
        else:
            self.criterion.batches = tuple(self.evidence.batches)
            layers, rule, certified = self.layers, self._rule, config.certify
            with dense_owners:
                events = refresh_masks(
                    layers, self.criterion, rule, self._mode, self._backend, common, certified=certified
                )
            self._backend.refresh_copies()
        seconds = time.perf_counter() - started
        return [replace(event, seconds=seconds) for event in events]

    @torch.no_grad()
    def scores(self, dense_owners: AbstractContextManager[None]) -> dict[str, Tensor]:
        """Return what a refresh would score now; see `EMPPruner.scores`. Collective."""
        if self.dynamic:
            raise ValueError(
                "every sample or query row has scores of its own here; they exist in the forward pass only"
            )
        self.criterion.batches = tuple(self.evidence.batches)
        with dense_owners:
            return {layer.name: self.criterion.score(layer).detach().abs() for layer in self.layers}

    def collect(self, owners: Collection[int]) -> None:
        """Take the gradients that are there now as the evidence of one batch; see `EMPPruner.collect`."""
        if self.criterion.needs != "gradients":
            raise ValueError(
                f"criterion {self._config.criterion_name!r} reads no gradients, so there is nothing to collect: drop "
                "collect(), or use 'taylor' or 'saliency'"
            )
        self.evidence.collect(owners)

    @property
    def groups(self) -> int:
        """Rows of one refresh."""
        return 1 if self.dynamic or self._config.scope == "global" else len(self.layers)

    def density(self, trajectory: Sequence[PruneEvent]) -> float:
        """Return the kept share of all scored components; see `EMPPruner.density`. Collective."""
        if self.dynamic:
            return trajectory[-1].density if trajectory else 1.0
        if all(layer.mask is None for layer in self.layers):
            return 1.0
        kept = sum(int(layer.mask_or_ones.reshape(-1)[layer.span.counted].sum()) for layer in self.layers)
        total = int(self._backend.all_sum(torch.tensor([kept]))[0])
        return total / sum(layer.span.size for layer in self.layers)

    def masking_sites(self) -> list[ForwardSite]:
        """Return the sites that mask what passes them now."""
        features = [
            layer.site for layer in self.layers if isinstance(layer, FeatureLayer) and layer.site.mask is not None
        ]
        return [*features, *(site for site in self.dynamic if site.active)]

    def take_up(self, position: int, pruned: bool) -> None:
        """Go on where a checkpoint left off: at a position of the schedule, after a refresh or before the first."""
        for site in self.dynamic:
            site.active = pruned and not self._config.observe_only
        self._rule = _rule_at(position, self._config)

    def warn_once(self, events: Sequence[PruneEvent]) -> None:
        """Say, once and on one rank, where N_eff is no good budget (a fixed density needs none) or a layer is empty."""
        if self._backend.rank:
            return
        alike = uniform_scores(events) if self._config.density is None else []
        for kind, found in (("alike", alike), ("emptied", emptied_layers(events))):
            if found and kind not in self._warned:
                self._warned.add(kind)
                warn_the_user(found[0])

    def _count(self, n_eff: Tensor, size: int, nonzero: Tensor) -> Tensor:
        # Looked up at every call: a dynamic site must see the beta of the last refresh.
        return self._rule.counts(n_eff, size, nonzero)


def _rule_at(position: int, config: EMPConfig) -> KeepRule:
    rule = KeepRule(beta=config.beta_at(position), density=config.density, min_density=config.min_density)
    # Of weights there are so many that neither guard matters.
    few = config.target != "weights"
    return replace(rule, min_units=config.min_units, tolerance=config.tolerance) if few else rule
