"""What a user reads of a pruner: masks, scores, rows, where it stands, what it leaves out."""

from __future__ import annotations

from collections import Counter

from torch import Tensor

from emp_callbacks.backends import Backend
from emp_callbacks.layer import Layer
from emp_callbacks.layer.head_gates import HeadGates
from emp_callbacks.layer.mask_mode import MaskMode
from emp_callbacks.layer.masked_weight import MaskedWeight
from emp_callbacks.pruning.audit import Audit, audit_masks
from emp_callbacks.pruning.loop import PruningLoop
from emp_callbacks.pruning.refresher import Refresher
from emp_callbacks.pruning.weight_keeper import WeightKeeper
from emp_callbacks.schedule import Clock
from emp_callbacks.targets import NO_MULTIPLE, NOT_A_WEIGHT, SURPRISING, LeftOut, few
from emp_callbacks.trajectory import LayerStats, PruneEvent, Trajectory

_MANY = 0.1
AVERAGED = "an average, which is kept masked"


class Readings:
    """The reading half of `EMPPruner`; nothing here changes anything.

    Attributes:
        trajectory: One PruneEvent per refresh and group.
    """

    trajectory: Trajectory
    _backend: Backend
    _mode: MaskMode
    _refresher: Refresher
    _loop: PruningLoop
    _keeper: WeightKeeper

    @property
    def _layers(self) -> list[Layer]:
        return self._refresher.layers

    @property
    def _weights(self) -> list[MaskedWeight]:
        return self._refresher.weights

    @property
    def masks(self) -> dict[str, Tensor]:
        """Layer name -> bool mask of its components, True = kept; all kept before the first refresh.

        Weights: parameter name -> its shape, or this rank's part, flat, where it is sharded. Heads, neurons, nodes and
        features: module name -> shape (units,). Features are absent until their module was called, and where every
        sample has its own mask. With `observe_only` these are the masks that EMP would apply.
        """
        return {layer.name: layer.mask_or_ones.clone() for layer in self._layers if layer.is_known}

    def scores(self) -> dict[str, Tensor]:
        """Return layer name -> |score| of its components now, layout of `masks`. Collective; changes nothing.

        A criterion that reads gradients, inputs or activations speaks of what was gathered since the last refresh.

        Raises:
            ValueError: Every sample or query row scores for itself.
            RuntimeError: Nothing was gathered.
        """
        return self._refresher.scores(self._keeper.dense_owners())

    @property
    def gates(self) -> HeadGates | None:
        """The learned gates of heads, with the setting `gates`; None before they begin at the first refresh."""
        return self._refresher.gating.gates

    @property
    def weight_masks(self) -> dict[str, Tensor]:
        """Parameter name -> bool mask of what is zeroed in it (False), like `masks` for weights; {} for features."""
        return {weight.name: weight.mask_or_ones.clone() for weight in self._weights}

    @property
    def density(self) -> float:
        """Kept share of all scored components, in [0, 1]. Where each sample has its own: the last mean.

        With apply="training" it is that of training: evaluation is dense.
        """
        return self._refresher.density(self.trajectory)

    @property
    def layers(self) -> list[LayerStats]:
        """Every layer as the last refresh left it; empty before the first."""
        return [layer for event in self.last_events for layer in event.layers]

    @property
    def last_events(self) -> list[PruneEvent]:
        """The rows of the last refresh, one per group."""
        return self.trajectory[-self._refresher.groups :]

    @property
    def sharded(self) -> bool:
        """Whether this rank holds only parts of the parameters; `state_dict()` then is this rank's part, too."""
        return not all(weight.segment.replicated for weight in self._weights)

    @property
    def needs_closing_refresh(self) -> bool:
        """Whether weights have moved away from the mask since the last refresh (`project`), or gates learn."""
        return self._loop.needs_closing_refresh

    @property
    def clock(self) -> Clock:
        """Steps and epochs so far, and where the schedule stands."""
        return self._loop.clock

    @property
    def steps(self) -> int:
        """Applied optimizer steps so far."""
        return self.clock.steps

    @property
    def epochs(self) -> int:
        """Finished epochs so far."""
        return self.clock.epochs

    def audit(self) -> Audit:
        """Count, over all ranks, the entries of every copy of the weights that contradict the masks. Collective."""
        return audit_masks(self._weights, self._mode, self._backend)

    @property
    def left_out(self) -> list[LeftOut]:
        """Every parameter that is not pruned: its name, why not, and its size; [] where modules' outputs are masked."""
        averaged = self._loop.averaged_names()
        return [one._replace(reason=AVERAGED) if one.name in averaged else one for one in self._refresher.left_out]

    @property
    def left_out_share(self) -> float:
        """Share of all of the model's weights that is not pruned, in [0, 1]."""
        return sum(one.size for one in self.left_out) / self._weights_in_all if self.left_out else 0.0

    @property
    def _weights_in_all(self) -> int:
        return sum(self._backend.full_shape(p).numel() for p in self._backend.module.parameters())

    @property
    def left_out_line(self) -> str:
        """`left_out` in one line: shares of all weights, by reason; empty if there is nothing to say."""
        if not self.left_out:
            return ""
        total = sum(one.size for one in self.left_out)
        by_reason: Counter[str] = Counter()
        for one in self.left_out:
            by_reason[one.reason] += one.size
        told = "; ".join(f"{reason}: {size / total:.0%}" for reason, size in by_reason.most_common())
        return f"not pruned: {self.left_out_share:.1%} of all weights ({told}); left_out names them"


def surprising(left_out: list[LeftOut], share_of: int) -> str:
    """Return one line on weights that a user expects to be pruned and that are not; empty if there are none.

    Args:
        left_out: What is not pruned.
        share_of: All of the model's weights.
    """
    parts = []
    for reason in SURPRISING:
        found = [one for one in left_out if one.reason == reason]
        # Small tensors of odd names (tokens, tables of positions) surprise nobody.
        enough = _MANY * share_of if reason == NOT_A_WEIGHT else 0
        if sum(one.size for one in found) > enough:
            names = few([one.name for one in found], most=2)
            parts.append(f"{sum(one.size for one in found) / share_of:.0%} of all weights, {reason}: {names}")
    can_be_named = any(one.reason in SURPRISING and one.reason != NO_MULTIPLE for one in left_out)
    remedy = ". Name them in include to prune them too" if can_be_named else ""
    return f"left out of pruning: {'; '.join(parts)}{remedy}" if parts else ""
