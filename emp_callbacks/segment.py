"""Where a parameter lives on this rank: the one idea of sharding that the rest of the package knows."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class Segment:
    """This rank's part of one parameter.

    Attributes:
        name: Name of the parameter in the user's model.
        shape: Shape of the full parameter.
        output_dim: Dimension of the full parameter that counts output units: the rows of `scope="row"`.
        owner: The tensor that the innermost optimizer updates: the parameter, its local shard, or a flat fp32 master
            that holds parts of many parameters.
        view: Takes a tensor laid out like `owner` (its values, its gradient, an optimizer state) and returns this
            segment's part of it, in the same memory. The full parameter keeps its shape, a shard is flat.
        positions: Flat index in the full parameter of the segment's first element, the others following; or the
            index of each, shape (n,), int64, where they do not follow each other.
        replicated: Whether every rank holds the full parameter.
        counted: The part of the segment, in flat order, that this rank counts in sums. Over all ranks the counted
            parts cover the parameter once.
    """

    name: str
    shape: torch.Size
    output_dim: int
    owner: Tensor
    view: Callable[[Tensor], Tensor]
    positions: int | Tensor
    replicated: bool
    counted: slice

    @property
    def weight(self) -> Tensor:
        """The values outside autograd: the same memory, looked up at every use."""
        return self.view(self.owner.detach())

    @property
    def gradient(self) -> Tensor | None:
        """The gradient that the optimizer will read, laid out like `weight`; None if there is none."""
        return None if self.owner.grad is None else self.view(self.owner.grad)

    @property
    def size(self) -> int:
        """Components of the full parameter."""
        return math.prod(self.shape)

    def positions_of(self, part: slice) -> int | Tensor:
        """Return `positions` of a flat part of the segment."""
        start, _, _ = part.indices(self.weight.numel())
        return self.positions + start if isinstance(self.positions, int) else self.positions[part]
