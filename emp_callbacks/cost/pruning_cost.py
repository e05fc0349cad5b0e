"""What pruning a finished model costs in loss: measured, to second order, and what theory allows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from emp_callbacks.core import bounds
from emp_callbacks.core.effective_number import ScoreMoments, effective_numbers, score_moments
from emp_callbacks.cost.curvature import Losses, TraceEstimate, hessian_trace, mean_loss, quadratic_change
from emp_callbacks.pruning.pruner import EMPPruner
from emp_callbacks.targets.names import canonical_name
from emp_callbacks.trajectory import PruneEvent

__all__ = ["LOSS_BOUNDS", "PruningCost", "masked_parameters", "prune_and_measure"]


@dataclass(frozen=True, kw_only=True)
class PruningCost:
    """One refresh of a finished model and its loss on some batches, in evaluation mode.

    Attributes:
        n: Weights in the parameters that the masks reach.
        keep: Those that are kept.
        n_eff: Effective number of their magnitudes, in components, whatever the criterion.
        l1_norm: ||theta||_1 of them before pruning.
        distance_sq: ||theta - theta_masked||_2^2.
        trace: Tr(H) of the mean loss over the batches, in these weights.
        loss_before: Mean loss of the dense weights.
        loss_after: Mean loss of the masked weights.
        first_order: g^T d, d the change of the weights and g the gradient at the dense ones.
        second_order: d^T H d.
        events: The rows of the refresh.
    """

    n: int
    keep: int
    n_eff: float
    l1_norm: float
    distance_sq: float
    trace: TraceEstimate
    loss_before: float
    loss_after: float
    first_order: float
    second_order: float
    events: tuple[PruneEvent, ...]

    @property
    def change(self) -> float:
        """Loss after minus before."""
        return self.loss_after - self.loss_before

    @property
    def quadratic(self) -> float:
        """The change of the loss to second order: g^T d + d^T H d / 2."""
        return self.first_order + self.second_order / 2

    @property
    def alignment(self) -> float:
        """Curvature along d over the mean curvature Tr(H) / n; 1 where pruning moves in no special direction."""
        mean = self.trace.mean / self.n
        return self.second_order / self.distance_sq / mean if self.distance_sq and mean else 0.0

    def bounds(self, trace: float | None = None) -> dict[str, float | None]:
        """Return what each of LOSS_BOUNDS allows for |change|; None where Tr(H) <= 0: they assume H >= 0.

        Args:
            trace: Tr(H) to put in; default the estimate's mean.
        """
        value = self.trace.mean if trace is None else trace
        return {name: bound(self, value) if value > 0 else None for name, bound in LOSS_BOUNDS.items()}


LOSS_BOUNDS: Mapping[str, Callable[[PruningCost, float], float]] = {
    "distance": lambda c, trace: bounds.distance_loss_bound(trace, c.distance_sq, c.keep, c.n),
    "norm": lambda c, trace: bounds.norm_loss_bound(trace, c.l1_norm, c.keep, c.n, c.n_eff),
    "curvature": lambda c, trace: bounds.curvature_bound(trace, c.distance_sq),
    "asymptotic": lambda c, trace: bounds.asymptotic_loss_bound(trace, c.l1_norm, c.keep, c.n),
    "inverse_trace": lambda c, trace: bounds.inverse_trace_loss_bound(trace, c.l1_norm, c.keep, c.n),
}
"""Name -> bound on the change of the loss, see `core.bounds`; those with Tr(H) speak of magnitude scores."""


def masked_parameters(pruner: EMPPruner, module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that a pruner's masks reach, by name.

    Raises:
        ValueError: The pruner masks no weights (features, attention edges).
    """
    parameters = {canonical_name(name): parameter for name, parameter in module.named_parameters()}
    reached = {name: parameters[name] for name in pruner.weight_masks}
    if not reached:
        raise ValueError(
            f"target {pruner.config.target!r} is masked in the forward pass and moves no weights, so no loss bound "
            "speaks of it; use weights, heads, neurons or kan_nodes"
        )
    return reached


def prune_and_measure(
    pruner: EMPPruner, module: nn.Module, losses: Losses, *, trace: TraceEstimate | None = None, probes: int = 16
) -> PruningCost:
    """Refresh a pruner of a finished model and return what that costs; the model is masked afterwards.

    Costs four passes over the batches, two of them with double backward, and `hessian_trace` if `trace` is not given.

    Args:
        pruner: Of the dense model, in mode "project"; it has seen what its criterion reads of data.
        module: The model, in evaluation mode.
        losses: The loss, batch by batch.
        trace: Of the Hessian in `masked_parameters`, where it is known already: it does not depend on the masks.
        probes: Random vectors for the trace.

    Raises:
        ValueError: The pruner masks no weights, or there is no batch.
        FloatingPointError: A score is NaN or Inf; no mask was changed.
    """
    parameters = list(masked_parameters(pruner, module).values())
    dense = [parameter.detach().clone() for parameter in parameters]
    before = mean_loss(losses)
    trace = trace or hessian_trace(losses, parameters, probes=probes)
    events = pruner.refresh()
    after = mean_loss(losses)
    masked = [parameter.detach().clone() for parameter in parameters]
    step = [new - old for new, old in zip(masked, dense, strict=True)]
    _put(parameters, dense)
    first, second = quadratic_change(losses, parameters, step)
    _put(parameters, masked)
    moments = ScoreMoments.unstack(torch.cat([score_moments(w.reshape(1, -1)).stack() for w in dense])).sum()
    return PruningCost(
        n=sum(parameter.numel() for parameter in parameters),
        keep=sum(int(mask.sum()) for mask in pruner.weight_masks.values()),
        n_eff=float(effective_numbers(moments)[0]),
        l1_norm=float(moments.total[0]),
        distance_sq=sum(float(d.double().square().sum()) for d in step),
        trace=trace,
        loss_before=before,
        loss_after=after,
        first_order=first,
        second_order=second,
        events=tuple(events),
    )


@torch.no_grad()
def _put(parameters: list[nn.Parameter], values: list[torch.Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)
