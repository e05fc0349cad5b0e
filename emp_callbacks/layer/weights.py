"""Single weights of one parameter."""

from __future__ import annotations

from collections.abc import Collection
from typing import final

import torch
from torch import Tensor

from emp_callbacks.core.kernels.tables import to_device
from emp_callbacks.layer.base import Batches, Layer, PerWeight, check_gathered, no_gradient
from emp_callbacks.layer.masked_weight import MaskedWeight
from emp_callbacks.layer.observers import InputSquares, Observer
from emp_callbacks.layer.segment import Segment, Span
from emp_callbacks.layer.shared_sums import Parts, Ranks
from emp_callbacks.targets.parametrised import WeightNormed


@final
class WeightLayer(Layer):
    """Single weights of one parameter.

    Args:
        segment: This rank's part of the parameter.
        ranks: The job's processes.
        inputs: Observer of the inputs that the weights multiply, for criteria that ask for it.
        normed: The weight norm whose direction the parameter is.
    """

    def __init__(
        self, segment: Segment, ranks: Ranks, inputs: Observer | None = None, normed: WeightNormed | None = None
    ) -> None:
        super().__init__(ranks)
        self.segment = segment
        self.weights = [MaskedWeight(segment)]
        self.inputs = inputs
        self.sites = [inputs] if inputs is not None else []
        self.normed = normed
        self._sum: Tensor | None = None

    @property
    def span(self) -> Span:
        return self.segment

    @property
    def weight(self) -> Tensor:
        """The values outside autograd, dense while scores are taken; the full parameter's shape, a shard flat."""
        return self.segment.weight

    @property
    def effective(self) -> Tensor:
        """What inputs are multiplied with: `weight`, or what a weight norm makes of it."""
        return self.weight if self.normed is None else self.weight * self.normed.factor()

    @property
    def mask(self) -> Tensor | None:
        return self.weights[0].mask

    def put_mask(self, mask: Tensor) -> list[Tensor]:
        return [mask]

    def _ones(self) -> Tensor:
        return self.weights[0].mask_or_ones

    def gather(self, owners: Collection[int], batch: int, per_weight: PerWeight) -> None:  # noqa: ARG002
        gradient = self.segment.gradient
        if id(self.segment.owner) in owners and gradient is not None:
            values = per_weight(self.weight, gradient).abs()
            values = values if values.dtype == torch.float64 else values.float()
            self._sum = values if self._sum is None else self._sum.add_(values)

    def evidence(self, batches: Batches) -> Tensor:
        """Return mean over batches of |per_weight|, or the l2 norm of the input that each weight multiplies."""
        if self.inputs is not None:
            squares, _ = self._observed(self.inputs, "inputs")
            return self._spread(to_device(squares.sqrt(), self.weight.device))
        check_gathered(self.name, batches)
        if not bool(self.asking.sums(lambda: {"reached": self._is_reached()})["reached"] > 0):
            raise no_gradient(self.name)
        if self._sum is None:  # this rank holds nothing of it, or its batches did not reach it
            # in the dtype of the other ranks' sums, by which all of them search
            return torch.zeros_like(self.weight, dtype=torch.promote_types(self.weight.dtype, torch.float32))
        return self._sum / batches.total

    def _is_reached(self) -> Tensor:
        """Return whether a gradient reached this rank's part, 1 or 0, shape (), float64."""
        # Zeros are what set_to_none=False leaves of a gradient: a weight that no batch reached has no score of 0.
        return torch.zeros((), dtype=torch.float64) if self._sum is None else self._sum.any().double()

    def input_products(self) -> Parts:
        """Return by "products" this rank's part of X X^T of what each output reads; nothing where it was not gathered.

        Shape (groups, inputs, inputs), float64.
        """
        if not isinstance(self.inputs, InputSquares) or self.inputs.patch is None:
            return {}
        return {"products": self.inputs.statistics()["products"]}

    def release(self) -> None:
        self._sum = None

    @property
    def gathered(self) -> Tensor | None:
        """Sum over batches of what gradients said, layout of `weight`; None if there is nothing."""
        return self._sum

    @gathered.setter
    def gathered(self, value: Tensor | None) -> None:
        self._sum = value

    def _spread(self, norms: Tensor) -> Tensor:
        """Return for each weight the norm of its input, layout of `weight`."""
        segment = self.segment
        if segment.stacked:  # each matrix has inputs of its own
            return norms[segment.indices_along(0, segment.input_dim)].view(self.weight.shape)
        index = segment.indices_along(segment.input_dim)
        if segment.output_dim == 1:  # (input, output)
            return norms[index].view(self.weight.shape)
        if norms.numel() != segment.shape[1]:  # grouped convolution: its rows read different channels
            per_group = segment.shape[0] // (norms.numel() // segment.shape[1])
            index = index + segment.indices_along(0) // per_group * segment.shape[1]
        return norms[index].view(self.weight.shape)
