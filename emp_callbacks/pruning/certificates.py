"""What pruning can have changed at most, from the sums of the pruned scores; beside it what was measured.

Proofs: docs/certificates.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from emp_callbacks.criteria import Criterion
from emp_callbacks.layer import Layer, UnitLayer, WeightLayer
from emp_callbacks.pruning.groups import Decision, Scored
from emp_callbacks.trajectory import Certificate


class Certificates(NamedTuple):
    """Certificates by index of the layer and by name of the group; empty where none were asked for."""

    layers: dict[int, Certificate]
    groups: dict[str, Certificate]


def certify(
    decisions: Sequence[Decision],
    scored: Sequence[Scored],
    new_mask: Callable[[Decision, int], Tensor],
    layers: Sequence[Layer],
    criterion: Criterion,
) -> Certificates:
    """Return what the new masks can change at most; dense weights are in place. Collective; changes nothing.

    Args:
        decisions: What each group keeps.
        scored: The scores of every layer.
        new_mask: Gives a layer's new mask, layout of its scores.
        layers: What is masked.
        criterion: Says what its scores bound.
    """
    found: dict[int, Certificate] = {}
    groups: dict[str, Certificate] = {}
    for decision in decisions:
        for i in decision.members:
            pruned = ~new_mask(decision, i)
            layer = layers[i]
            if criterion.certificate == "loss_change":
                found[i] = _loss_change(layer, scored[i], pruned, criterion)
            elif isinstance(layer, WeightLayer) and _reads_zeros_beyond_its_edge(layer):
                found[i] = _output_error(layer, scored[i], pruned)
        if criterion.certificate == "loss_change":
            groups[decision.group] = _together([found[i] for i in decision.members])
    return Certificates(found, groups)


def _loss_change(layer: Layer, scored: Scored, pruned: Tensor, criterion: Criterion) -> Certificate:
    """Bound |sum of w dL/dw over what is pruned|, averaged over batches, by the sum of the pruned scores.

    A score is the mean over batches of |sum over the unit|: with its sign known, pruned units may cancel.
    """
    part = scored.span.counted
    own = (scored.scores.reshape(-1)[part].double().abs() * pruned.reshape(-1)[part]).sum()
    bound = float(layer.ranks.all_sum(own.cpu()))
    if not isinstance(layer, UnitLayer):
        return Certificate(kind="loss_change", bound=bound)
    signed = layer.signed_mean(criterion.batches)[pruned.cpu()]
    return Certificate(kind="loss_change", bound=bound, measured=0.0 - float(signed.sum()))


def _together(certificates: Sequence[Certificate]) -> Certificate:
    """Return the certificate of a group of layers: bounds add, and what was measured adds with its sign."""
    signed = [certificate.measured for certificate in certificates]
    measured = None if None in signed else sum(value for value in signed if value is not None)
    return Certificate(kind="loss_change", bound=sum(c.bound for c in certificates), measured=measured)


def _output_error(layer: WeightLayer, scored: Scored, pruned: Tensor) -> Certificate:
    """Bound the l2 norm of the change of each output by the sum of its pruned scores |w| * ||x||, and add up.

    ||sum of w_j x_j over the pruned j|| <= sum of |w_j| ||x_j||, x_j the j-th input over all tokens.
    """
    span, part = scored.span, scored.span.counted
    outputs = span.shape[span.output_dim]
    by_output = torch.zeros(outputs, dtype=torch.float64, device=pruned.device)
    lost = scored.scores.reshape(-1)[part].double().abs() * pruned.reshape(-1)[part]
    by_output.index_add_(0, layer.segment.indices_along(span.output_dim)[part], lost)
    bounds = layer.ranks.all_sum(by_output.cpu())
    bound = float(bounds.square().sum().sqrt())
    products = layer.input_products() if span.replicated else None
    if products is None:
        return Certificate(kind="output_error", bound=bound)
    rows = layer.weight.movedim(span.output_dim, 0).reshape(outputs, -1).double().cpu()
    removed = rows * pruned.movedim(span.output_dim, 0).reshape(outputs, -1).cpu()
    errors, norms = (_norms(of, products) for of in (removed, rows))
    certain = bounds > 0
    return Certificate(
        kind="output_error",
        bound=bound,
        measured=float(errors.square().sum().sqrt()),
        scale=float(norms.square().sum().sqrt()),
        tightness=float((errors[certain] / bounds[certain]).max()) if bool(certain.any()) else 0.0,
    )


def _norms(rows: Tensor, products: Tensor) -> Tensor:
    """Return ||row X||_2 for each row of weights, shape (outputs,), from X X^T of its group's inputs."""
    groups = products.shape[0]
    by_group = rows.view(groups, -1, rows.shape[1])
    squares = (torch.bmm(by_group, products) * by_group).sum(2)
    return squares.clamp(min=0.0).sqrt().reshape(-1)


def _reads_zeros_beyond_its_edge(layer: WeightLayer) -> bool:
    """Return whether no input is read twice by one tap of a kernel: reflected or repeated edges are."""
    return layer.inputs is not None and getattr(layer.inputs.module, "padding_mode", "zeros") == "zeros"
