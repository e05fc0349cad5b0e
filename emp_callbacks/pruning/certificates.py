"""What pruning can have changed at most, from the sums of the pruned scores; beside it what was measured.

Proofs: docs/certificates.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from emp_callbacks.criteria import Criterion
from emp_callbacks.layer import Layer, Ranks, UnitLayer, WeightLayer
from emp_callbacks.layer.shared_sums import Parts, together
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
    ranks: Ranks,
) -> Certificates:
    """Return what the new masks can change at most; dense weights are in place. Collective; changes nothing.

    Args:
        decisions: What each group keeps.
        scored: The scores of every layer.
        new_mask: Gives a layer's new mask, layout of its scores.
        layers: What is masked.
        criterion: Says what its scores bound.
        ranks: The processes.
    """
    of = {i: decision for decision in decisions for i in decision.members}

    def work(i: int) -> Certificate | None:
        layer = layers[i]

        def pruned() -> Tensor:
            return ~new_mask(of[i], i)

        if criterion.certificate == "loss_change":
            return _loss_change(layer, scored[i], pruned, criterion)
        if isinstance(layer, WeightLayer) and _reads_zeros_beyond_its_edge(layer):
            return _output_error(layer, scored[i], pruned)
        return None

    certificates = together([layer.asking for layer in layers], work, ranks)
    found = {i: one for i, one in enumerate(certificates) if one is not None}
    groups = {}
    if criterion.certificate == "loss_change":
        groups = {decision.group: _together([found[i] for i in decision.members]) for decision in decisions}
    return Certificates(found, groups)


def _loss_change(layer: Layer, scored: Scored, pruned: Callable[[], Tensor], criterion: Criterion) -> Certificate:
    """Bound |sum of w dL/dw over what is pruned|, averaged over batches, by the sum of the pruned scores.

    A score is the mean over batches of |sum over the unit|: with its sign known, pruned units may cancel.
    """

    def lost() -> Parts:
        part = scored.span.counted
        return {"bound": (scored.scores.reshape(-1)[part].double().abs() * pruned().reshape(-1)[part]).sum()}

    bound = float(layer.asking.sums(lost)["bound"])
    if not isinstance(layer, UnitLayer):
        return Certificate(kind="loss_change", bound=bound)
    signed = layer.signed_mean(criterion.batches)[pruned().cpu()]
    return Certificate(kind="loss_change", bound=bound, measured=0.0 - float(signed.sum()))


def _together(certificates: Sequence[Certificate]) -> Certificate:
    """Return the certificate of a group of layers: bounds add, and what was measured adds with its sign."""
    signed = [certificate.measured for certificate in certificates]
    measured = None if None in signed else sum(value for value in signed if value is not None)
    return Certificate(kind="loss_change", bound=sum(c.bound for c in certificates), measured=measured)


def _output_error(layer: WeightLayer, scored: Scored, pruned: Callable[[], Tensor]) -> Certificate:
    """Bound the l2 norm of the change of each output by the sum of its pruned scores |w| * ||x||, and add up.

    ||sum of w_j x_j over the pruned j|| <= sum of |w_j| ||x_j||, x_j the j-th input over all tokens.
    """
    span, part = scored.span, scored.span.counted
    outputs = span.rows

    def lost() -> Parts:
        own = scored.scores.reshape(-1)[part].double().abs() * pruned().reshape(-1)[part]
        by_output = torch.zeros(outputs, dtype=torch.float64, device=own.device)
        by_output.index_add_(0, layer.segment.row_indices()[part], own)
        return {"bounds": by_output, **(layer.input_products() if span.replicated else {})}

    sums = layer.asking.sums(lost)
    bounds, products = sums["bounds"], sums.get("products")
    bound = float(bounds.square().sum().sqrt())
    if products is None:
        return Certificate(kind="output_error", bound=bound)
    rows = layer.weight.movedim(span.output_dim, 0).reshape(outputs, -1).double().cpu()
    removed = rows * pruned().movedim(span.output_dim, 0).reshape(outputs, -1).cpu()
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
