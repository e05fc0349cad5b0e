"""Where components lie on this rank: the one idea of sharding that the rest of the package knows."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class Span:
    """This rank's part of the components of one layer.

    Attributes:
        name: Name of the layer in the user's model: a parameter, or the module whose units are the components.
        shape: Shape of all components.
        output_dim: Dimension of `shape` that counts output units: the rows of `scope="row"`.
        positions: Flat index in the whole of the first component here, the others following; or the index of each,
            shape (n,), int64, where they do not follow each other.
        replicated: Whether every rank holds all components.
        counted: The part, in flat order, that this rank counts in sums. Over all ranks the counted parts cover the
            components once.
        is_summed: Whether the scores come out of sums over ranks: they are the same on every rank from the start.
    """

    name: str
    shape: torch.Size
    output_dim: int
    positions: int | Tensor
    replicated: bool
    counted: slice
    is_summed: bool = False

    @property
    def size(self) -> int:
        """Components of the whole layer."""
        return math.prod(self.shape)

    @property
    def length(self) -> int:
        """Components that this rank holds."""
        return self.size

    def positions_of(self, part: slice) -> int | Tensor:
        """Return `positions` of a flat part of the components that this rank holds."""
        start, _, _ = part.indices(self.length)
        return self.positions + start if isinstance(self.positions, int) else self.positions[part]


@dataclass(frozen=True, eq=False, kw_only=True)
class Segment(Span):
    """This rank's part of one parameter.

    Attributes:
        owner: The tensor that the innermost optimizer updates: the parameter, its local shard, or a flat fp32 master
            that holds parts of many parameters.
        view: Takes a tensor laid out like `owner` (its values, its gradient, an optimizer state) and returns this
            segment's part of it, in the same memory. The full parameter keeps its shape, a shard is flat.
    """

    owner: Tensor
    view: Callable[[Tensor], Tensor]

    @property
    def weight(self) -> Tensor:
        """The values outside autograd: the same memory, looked up at every use."""
        return self.view(self.owner.detach())

    @property
    def gradient(self) -> Tensor | None:
        """The gradient that the optimizer will read, laid out like `weight`; None if there is none."""
        return None if self.owner.grad is None else self.view(self.owner.grad)

    @property
    def length(self) -> int:
        return self.weight.numel()

    def indices_along(self, dim: int) -> Tensor:
        """Return the index along one dimension of the full parameter of each element here, flat, int64."""
        inner, count = math.prod(self.shape[dim + 1 :]), self.length
        at = self.positions
        device = self.weight.device
        flat = torch.arange(at, at + count, device=device) if isinstance(at, int) else at.to(device)
        return (flat // inner) % self.shape[dim]
