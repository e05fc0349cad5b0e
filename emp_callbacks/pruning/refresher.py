"""What a pruner scores, by which criterion and rule, and the refresh itself with its rows and warnings."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import final

import torch
from torch import Tensor

from emp_callbacks.backends import Backend
from emp_callbacks.blame import warn_the_user
from emp_callbacks.checkpoint.state import masked_weights
from emp_callbacks.config import EMPConfig
from emp_callbacks.core.group_pattern import GroupPattern
from emp_callbacks.criteria import make_criterion
from emp_callbacks.criteria.random import Random
from emp_callbacks.criteria.saliency import Saliency
from emp_callbacks.layer import FeatureLayer, Layer, MissingEvidence, UnitLayer
from emp_callbacks.layer.mask_mode import MaskMode
from emp_callbacks.pruning.accounting import with_note
from emp_callbacks.pruning.assembly import (
    DynamicSite,
    adapter_names,
    check_not_frozen,
    chosen_parameters,
    find_dynamic_sites,
    find_layers,
    find_left_out,
)
from emp_callbacks.pruning.evidence import Evidence
from emp_callbacks.pruning.gating import Gating
from emp_callbacks.pruning.groups import KeepRule
from emp_callbacks.pruning.layer_shares import check_shares_named, shared_density
from emp_callbacks.pruning.refresh import Selection, refresh_dynamic, refresh_masks, scores_of, selections_of
from emp_callbacks.pruning.regrowth import Regrowth
from emp_callbacks.pruning.signatures import signatures_of
from emp_callbacks.targets import canonical_name, few
from emp_callbacks.targets.forward_site import ForwardSite
from emp_callbacks.trajectory import PruneEvent

_IN_TRAINING = "apply='training': these are the masks of training, evaluation is dense"


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
        gating: Learned gates, where the settings ask for them.

    Raises:
        ValueError: The settings select nothing, or what the criterion cannot score.
    """

    def __init__(self, config: EMPConfig, mode: MaskMode, backend: Backend) -> None:
        self._config, self._mode, self._backend = config, mode, backend
        self.criterion = make_criterion(config.criterion, config.target)
        self.layers: list[Layer] = []
        self.dynamic: list[DynamicSite] = []
        self.growth = _growth(config)
        self.gating = Gating(config, backend)
        self._rule = KeepRule(beta=config.beta_at(0))
        if config.is_dynamic:
            self.dynamic = find_dynamic_sites(config, self.criterion, backend, self._count)
        else:
            self.layers = find_layers(config, self.criterion, backend)
            check_shares_named(config.shares, self.layers)
            check_not_frozen(self.layers, backend, self.criterion, self.growth)
            self.gating.check_layers(self.layers)
        self._rule = self._rule_at(0)
        self.weights = masked_weights(self.layers)
        self._chosen = [id(parameter) for parameter in chosen_parameters(config, backend)]
        self.left_out = find_left_out(config, backend, self.weights)
        sites = [*(site for layer in self.layers for site in layer.sites), *self.dynamic]
        for site in sites:
            site.watch_with(backend.module)
        self.evidence = Evidence(self.layers, sites, self.growth or self.criterion, backend)
        self._kept: dict[str, int] = {}  # layer -> kept components over all ranks; not there: all
        self._warned: set[str] = set()

    def follow(self) -> str:
        """Look up again what is to be pruned, as model and optimizers are now; return what is to be told of changes.

        Layers that stay are the same objects, with their masks; `weights`, `layers` and `left_out` are brought up to
        date.
        """
        config, backend = self._config, self._backend
        if self.gating.gates is not None:  # they are of the heads that there were
            return ""
        try:
            chosen = [id(parameter) for parameter in chosen_parameters(config, backend)]
            if chosen == self._chosen:
                return ""
            if not backend.can_follow:
                self._chosen = chosen
                return (
                    f"the weights that the optimizer updates have changed; sharded ({backend.name}), EMP goes on with "
                    "those that it began with: make the pruner anew, and load() its saved state, to follow"
                )
            layers = self._with_masked(find_layers(config, self.criterion, backend))
        except ValueError as error:
            if not any(weight.segment.owner.requires_grad for weight in self.weights):  # all of them are frozen
                return ""
            return f"what is to be pruned has changed, and EMP does not follow: {error}"
        known = {_identity(layer): layer for layer in self.layers}
        added = [layer.name for layer in layers if _identity(layer) not in known]
        self._chosen = chosen
        self.layers[:] = [known.get(_identity(layer), layer) for layer in layers]
        self.weights[:] = masked_weights(self.layers)
        masked = {weight.name for weight in self.weights}
        self.left_out = [one for one in find_left_out(config, backend, self.weights) if one.name not in masked]
        sites = [site for layer in self.layers for site in layer.sites]
        for site in sites:
            site.watch_with(backend.module)
        self.evidence.replace_sites(sites)
        gone = [name for (name, *_), layer in known.items() if layer not in self.layers]
        kinds = {
            "pruned from here on, too": [name for name in added if name not in gone],
            "replaced, so that its mask begins anew": [name for name in added if name in gone],
            "no more in the model": [name for name in gone if name not in added],
        }
        return "; ".join(f"{kind}: {few(names)}" for kind, names in kinds.items() if names)

    def _with_masked(self, layers: list[Layer]) -> list[Layer]:
        """Return the layers together with those that are masked and still in the model: a frozen one keeps its mask."""
        held = {id(parameter) for parameter in self._backend.module.parameters()}
        found = [_identity(layer) for layer in layers]
        new = {name for name, _ in found}  # such a layer has taken the place of the one that had its name
        before = 0
        for layer in self.layers:
            name, owners = _identity(layer)
            if (name, owners) in found:
                before = 1 + found.index((name, owners))
            elif layer.mask is not None and name not in new and held.issuperset(owners):
                layers.insert(before, layer)
                found.insert(before, (name, owners))
                before += 1
        return layers

    def unreached(self) -> list[str]:
        """Return the names of weights to prune that are others than at the last look: no mask is on them."""
        if not self._backend.can_follow:
            return []
        names = {id(p): canonical_name(name) for name, p in self._backend.module.named_parameters()}
        try:
            chosen = [id(parameter) for parameter in chosen_parameters(self._config, self._backend)]
        except ValueError:  # no optimizer that is known updates what is there now
            chosen = []
        new = {names[one] for one in chosen if one not in self._chosen}
        gone = {weight.name for weight in self.weights if id(weight.segment.owner) not in names}
        # A parametrization (weight_norm) stands in for a weight of the same name.
        stood_in_for = {name.replace("parametrizations.", "").rpartition(".")[0] for name in names.values()}
        return sorted(new | (gone & stood_in_for.union(names.values())))

    @torch.no_grad()
    def run(
        self, step: int, epoch: int, position: int, dense_owners: AbstractContextManager[None], *, last: bool = False
    ) -> list[PruneEvent]:
        """Recompute every mask and return the rows. Collective.

        Args:
            step: Applied optimizer steps, for the rows.
            epoch: Epoch of the step, for the rows.
            position: Where the run stands in the schedule's unit; decides beta.
            dense_owners: Inside it, what the optimizer updates holds the dense values.
            last: Whether gates that have begun become masks.

        Raises:
            FloatingPointError: A score is NaN or Inf; no mask was changed.
            MissingEvidence: There is none for any layer; no mask was changed.
            RuntimeError: Ranks disagree; no mask was changed.
        """
        started, config = time.perf_counter(), self._config
        rule = self._rule_at(position)
        common = {
            "step": step,
            "epoch": epoch,
            "mode": self._mode.name,
            "criterion": config.criterion_name,
            "scope": "sample" if self.dynamic else config.scope,
            "beta": rule.beta if config.density is None and config.pattern is None else None,
        }
        if self.dynamic:
            events = refresh_dynamic(self.dynamic, self._backend, not config.observe_only, common)
        else:
            self.criterion.batches = self.evidence.gathered()
            regrowth = self._regrowth_at(position, step)
            with dense_owners:
                scored = self.layers, self.criterion, rule, self._mode
                if config.gates is not None:
                    events = self.gating.refresh(*scored, common, last=last)
                else:
                    events = refresh_masks(
                        *scored, self._backend, common, certified=config.certify, regrowth=regrowth
                    )  # fmt: skip
            self._backend.refresh_copies()
            if not self.gating.learns:
                self._count_kept(events)
        self._rule = rule
        seconds = time.perf_counter() - started
        events = [replace(event, seconds=seconds) for event in events]
        dense_later = not (config.masks_evaluation or config.observe_only)
        return [with_note(event, _IN_TRAINING) for event in events] if dense_later else events

    @torch.no_grad()
    def scores(self, dense_owners: AbstractContextManager[None]) -> dict[str, Tensor]:
        """Return what a refresh would score now; see `EMPPruner.scores`. Collective."""
        if self.dynamic:
            raise ValueError(
                "every sample or query row has scores of its own here; they exist in the forward pass only"
            )
        self.criterion.batches = self.evidence.gathered()
        with dense_owners:
            criterion = self.gating.criterion or self.criterion
            found = dict(zip(self.layers, scores_of(self.layers, criterion, self._backend), strict=True))
            if all(isinstance(scores, MissingEvidence) for scores in found.values()):
                raise next(error for error in found.values() if isinstance(error, MissingEvidence))
            return {layer.name: s.detach().abs() for layer, s in found.items() if isinstance(s, Tensor)}

    @torch.no_grad()
    def selections(self) -> Callable[[float], Selection]:
        """Return what says, for any beta, what a refresh now would keep: the scores are computed once. Collective.

        The weights are to hold their dense values, now and when it is asked.

        Raises:
            ValueError: Every sample or query row scores for itself.
            MissingEvidence: There is none for any layer.
        """
        if self.dynamic:
            raise ValueError("every sample or query row has masks of its own here; they exist in the forward pass only")
        self.criterion.batches = self.evidence.gathered()
        select = selections_of(self.layers, self.criterion, self._mode, self._backend, self._config.scope or "global")
        return lambda beta: select(replace(self._rule, beta=beta, density=None, pattern=None))

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
        """Return the kept share of all components whose number is known; see `EMPPruner.density`."""
        if self.dynamic:
            return trajectory[-1].density if trajectory else 1.0
        sizes = {layer.name: layer.span.size for layer in self.layers if layer.is_known}
        total = sum(sizes.values())
        return sum(self._kept.get(name, size) for name, size in sizes.items()) / total if total else 1.0

    @property
    def adapters(self) -> set[str]:
        """The names of the masked weights that a merged model has no more."""
        return adapter_names(self.layers)

    def masking_sites(self) -> list[ForwardSite]:
        """Return the sites that mask what passes them now; raise ValueError while gates do."""
        if self.gating.learns:
            raise ValueError("the gates still learn, and there is no mask yet for another model: call close() first")
        features = [
            layer.site for layer in self.layers if isinstance(layer, FeatureLayer) and layer.site.mask is not None
        ]
        return [*features, *(site for site in self.dynamic if site.active)]

    def take_up(self, position: int, pruned: bool) -> None:
        """Go on where a checkpoint left off: at a position of the schedule, after a refresh or before the first.

        Collective.
        """
        for site in self.dynamic:
            site.active = pruned and not self._config.observe_only
        self._rule = self._rule_at(position)
        masked = [layer for layer in self.layers if layer.mask is not None]
        own = [int(layer.mask_or_ones.reshape(-1)[layer.span.counted].sum()) for layer in masked]
        kept = self._backend.all_sum(torch.tensor(own, dtype=torch.int64)).tolist() if own else []
        self._kept = {layer.name: count for layer, count in zip(masked, kept, strict=True)}

    def _count_kept(self, events: Sequence[PruneEvent]) -> None:
        """Remember what a refresh kept, which is summed over ranks already: one rank alone may ask for the density."""
        self._kept |= {layer.name: layer.keep for event in events for layer in event.layers}

    def warn_once(self, events: Sequence[PruneEvent]) -> None:
        """Say, once of a kind and on one rank, where N_eff is no good budget, or a layer keeps next to nothing."""
        if self._backend.rank:
            return
        for kind, line in signatures_of(events).items():
            if kind not in self._warned:
                self._warned.add(kind)
                warn_the_user(line)

    def _rule_at(self, position: int) -> KeepRule:
        config, density, found = self._config, self._config.density_at(position), self._config.density == "found"
        rule = KeepRule(beta=config.beta_at(position), density=density, min_density=config.min_density, found=found)
        if config.pattern is not None:
            pattern = GroupPattern.parse(config.pattern)
            return KeepRule(density=pattern.density, pattern=pattern)
        if density is not None and config.shares != "uniform":
            rule = replace(rule, densities=shared_density(density, config.shares, self.layers))
        # Of weights there are so many that neither guard matters.
        few = config.target != "weights"
        if not few:
            return rule
        floors = {layer.name: layer.least for layer in self.layers if isinstance(layer, UnitLayer) and layer.least > 1}
        return replace(rule, min_units=config.min_units, tolerance=config.tolerance, floors=floors)

    def _regrowth_at(self, position: int, step: int) -> Regrowth | None:
        """Return what "rewire" replaces now; None in other modes, and before there is a mask."""
        if self.growth is None or any(layer.mask is None for layer in self.layers):
            return None
        self.growth.batches = self.evidence.gathered()
        if isinstance(self.growth, Random):
            self.growth.draw = step
        return Regrowth(self.growth, self._config.drop_fraction_at(position))

    def _count(self, n_eff: Tensor, size: int, nonzero: Tensor) -> Tensor:
        # Looked up at every call: a dynamic site must see the beta of the last refresh.
        return self._rule.counts(n_eff, size, nonzero)


def _identity(layer: Layer) -> tuple[str, tuple[int, ...]]:
    return layer.name, tuple(id(weight.segment.owner) for weight in layer.weights)


def _growth(config: EMPConfig) -> Saliency | Random | None:
    """Return what scores the pruned weights that "rewire" may grow; None in other modes."""
    if config.mode != "rewire" or config.observe_only:
        return None
    return Saliency() if config.grow == "gradient" else Random()
