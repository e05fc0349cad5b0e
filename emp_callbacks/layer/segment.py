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
        stacked: Whether dimension 0 counts matrices, such as experts, each with output units of its own.
        never_empty: Dimension whose slices each keep a component in any case, -1: the whole layer does; None: of none.
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
    stacked: bool = False
    never_empty: int | None = None

    @property
    def matrices(self) -> int:
        """Matrices that lie in the components: 1, or where they are stacked the size of dimension 0."""
        return self.shape[0] if self.stacked else 1

    @property
    def rows(self) -> int:
        """Output units of all matrices."""
        return self.matrices * self.shape[self.output_dim]

    @property
    def input_dim(self) -> int:
        """Dimension of `shape` that counts the inputs that one output unit reads; of a vector there is none."""
        return (3 if self.stacked else 1) - self.output_dim

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

    def indices_along(self, *dims: int) -> Tensor:
        """Return the index along one dimension of the full parameter of each element here, flat, int64.

        Along several, ascending, it is that of an array of these dimensions alone, read row by row.
        """
        at, count = self.positions, self.length
        device = self.weight.device
        flat = torch.arange(at, at + count, device=device) if isinstance(at, int) else at.to(device)
        index = torch.zeros_like(flat)
        for dim in dims:
            index = index * self.shape[dim] + flat // math.prod(self.shape[dim + 1 :]) % self.shape[dim]
        return index

    def row_indices(self) -> Tensor:
        """Return the output unit of each element here, counted over all matrices, flat, int64."""
        return self.indices_along(*([0] if self.stacked else []), self.output_dim)
