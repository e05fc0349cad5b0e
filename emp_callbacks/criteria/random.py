"""Scores that know nothing: the control arm of every comparison."""

import zlib
from typing import final

import torch
from torch import Tensor

from emp_callbacks.core.kernels.tables import to_device
from emp_callbacks.criteria.base import Criterion
from emp_callbacks.layer import Layer


@final
class Random(Criterion):
    """Uniform random scores in (0, 1], per layer name the same for the whole run, unless `draw` changes.

    Args:
        seed: Default: torch's initial seed, so that `seed_everything(k)` decides. A generator of its own draws the
            numbers; torch's global random state is neither read nor moved. A resumed run goes on with the seed that
            its checkpoint holds.

    Attributes:
        draw: Another number gives other scores.
    """

    seed: int
    draw: int = 0

    targets = ("weights", "heads", "neurons", "experts", "features", "kan_nodes")

    def __init__(self, seed: int | None = None) -> None:
        self.seed = torch.initial_seed() if seed is None else seed

    def score(self, layer: Layer) -> Tensor:
        span, like = layer.span, layer.mask_or_ones
        # In the low 32 bits, which are all that torch's generator on a CPU looks at.
        drawn = f"{span.name} {self.draw}" if self.draw else span.name
        key = (self.seed ^ zlib.crc32(drawn.encode())) & 0x7FFF_FFFF_FFFF_FFFF
        full = 1.0 - torch.rand(span.size, generator=torch.Generator().manual_seed(key))
        at = span.positions
        own = full[at : at + span.length] if isinstance(at, int) else full[at.cpu()]
        return to_device(own.view(like.shape), like.device)
