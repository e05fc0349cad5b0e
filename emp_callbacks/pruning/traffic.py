"""What a refresh sends between ranks, known before it happens: every sum over ranks in its order, with its bytes.

`refresh`, `decision` and `accounting` ask for these sums; tests/distributed/test_traffic.py compares.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from emp_callbacks.config import EMPConfig
from emp_callbacks.core.effective_number import key_dtype
from emp_callbacks.core.group_pattern import GroupPattern
from emp_callbacks.core.search_sums import Sum, cut_row_sums, exactly, kernel_sums, torch_sums
from emp_callbacks.criteria import Criterion, make_criterion
from emp_callbacks.criteria.random import Random
from emp_callbacks.criteria.saliency import Saliency
from emp_callbacks.criteria.spline import Spline
from emp_callbacks.layer import FeatureLayer, Layer, UnitLayer, WeightLayer
from emp_callbacks.layer.base import seen_by
from emp_callbacks.pruning.evidence import KEPT_APART

__all__ = ["Bounds", "Held", "Spread", "Traffic", "refresh_traffic"]

Held = Literal["whole", "slices", "runs"]
"""What ranks hold of a weight: all of it (DDP), slices of its first dimension (FSDP2), runs of values (FSDP1, ZeRO)."""


class Bounds(NamedTuple):
    """The least and the most that a number can be: equal where it is known, math.inf where nothing is."""

    least: int
    most: float


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Where scores are searched.

    Attributes:
        ranks: Processes that train the model.
        held: What they hold of its weights.
        dtype: Of what the optimizer updates.
        by_kernels: Whether Triton's kernels search, on an accelerator; else torch does.
    """

    ranks: int
    held: Held = "whole"
    dtype: torch.dtype = torch.float32
    by_kernels: bool = False


@dataclass(frozen=True)
class Traffic:
    """What one refresh sends.

    Attributes:
        sums: All sums over ranks, in order; none on one rank.
    """

    sums: tuple[Sum, ...]

    @property
    def collectives(self) -> Bounds:
        """How many sums there are."""
        return Bounds(sum(one.certain for one in self.sums), len(self.sums))

    @property
    def nbytes(self) -> Bounds:
        """Bytes that each rank gives to all of them."""
        return Bounds(sum(one.least for one in self.sums if one.certain), sum(one.most for one in self.sums))

    def seconds(self, ranks: int, latency: float, bandwidth: float, algorithm: Literal["ring", "tree"]) -> float:
        """Return how long the sums take at most, one after the other, by the usual model of an all-reduce.

        Around a ring go 2 (P - 1) messages of n / P bytes; up a binomial tree and down again 2 ceil(log2 P) of n bytes.

        Args:
            ranks: P.
            latency: Seconds until a message without content arrives.
            bandwidth: Bytes per second that a rank sends.
            algorithm: Which way; libraries choose trees for few bytes.

        Source: Thakur, Rabenseifner and Gropp, "Optimization of Collective Communication Operations in MPICH", 2005.
        """
        if algorithm == "ring":
            messages, share = 2 * (ranks - 1), 1 / ranks
        else:
            messages, share = 2 * math.ceil(math.log2(ranks)), 1.0
        return sum(messages * (latency + share * one.most / bandwidth) for one in self.sums)


def refresh_traffic(config: EMPConfig, layers: Sequence[Layer], spread: Spread, *, first: bool = True) -> Traffic:
    """Return what a refresh sends.

    Not in it: what criteria of the user's own ask for, what a guard asks for a layer that would be emptied, and what a
    strategy sends to make its copies of the weights anew (ZeRO: as after an optimizer step).

    Args:
        config: The settings.
        layers: What has a mask of its own, of the whole model; unused where every forward pass makes masks.
        spread: The ranks.
        first: Whether it is the first one, at which "rewire" grows nothing yet.
    """
    if spread.ranks == 1:
        return Traffic(())
    if config.is_dynamic:
        sizes = [Sum("sizes of outputs", 0, math.inf)] if config.target == "features" else []
        return Traffic((*sizes, Sum("statistics of samples", 0, math.inf)))
    asked = _Asked(config, make_criterion(config.criterion, config.target), layers, spread)
    counts = exactly("counts of the new masks", 4 * len(layers))
    return Traffic((*asked.scores(), *asked.masks(first=first), *asked.certificates(), counts))


class _Asked:
    """The sums of one refresh, in the order in which `refresh_masks` asks for them."""

    def __init__(self, config: EMPConfig, criterion: Criterion, layers: Sequence[Layer], spread: Spread) -> None:
        self._config, self._criterion, self._layers, self._spread = config, criterion, layers, spread

    def scores(self) -> Iterator[Sum]:
        count, criterion = len(self._layers), self._criterion
        if isinstance(self._layers[0], FeatureLayer):
            yield exactly("sizes of outputs", 3 * count)
            yield Sum("evidence: activations", 8 * count, math.inf)  # of features whose number the first batch tells
        else:
            yield from self._evidence(criterion)
        if criterion.signed == "shift":
            yield exactly("lowest scores", count)

    def _evidence(self, criterion: Criterion) -> Iterator[Sum]:
        layers, of_weights = self._layers, isinstance(self._layers[0], WeightLayer)
        units = sum(layer.span.size for layer in layers)
        if criterion.needs in ("inputs", "activations"):
            sites = [site for layer in layers for site in layer.sites]
            yield exactly(
                f"evidence: {criterion.needs}", sum(v.numel() for site in sites for v in seen_by(site).values())
            )
        elif criterion.needs == "gradients" and of_weights:
            yield exactly("evidence: whether gradients came", len(layers))
        elif criterion.needs == "gradients":
            config = self._config
            window = min(config.evidence_steps, config.every_n_steps or config.evidence_steps, KEPT_APART)
            yield exactly("evidence: gradients", window * units)  # of each batch apart
        elif not of_weights and not isinstance(criterion, Random):
            times = 2 if isinstance(criterion, Spline) else 1
            yield from itertools.repeat(exactly("evidence: sums over units", units), times)

    def masks(self, *, first: bool) -> Iterator[Sum]:
        """Yield the sums from scores to masks on which all ranks agree."""
        if self._config.pattern is not None:
            yield from self._pattern()
        elif self._config.scope == "row":
            yield from self._rows()
        else:
            yield from self._pooled()
        if self._config.mode == "rewire" and not first:
            yield from self._grown()
        yield exactly("digest of the masks", 1)
        yield exactly("ranks with another one", 1)

    def _pooled(self) -> Iterator[Sum]:
        sizes, dtype = [layer.span.size for layer in self._layers], self._score_dtype
        groups = [sum(sizes)] if self._config.scope == "global" else sizes
        before: list[Sum] = []
        search: list[Sum] = []
        if self._spread.by_kernels:
            before, search = kernel_sums(groups, dtype)
        else:
            search = [*torch_sums(groups, dtype)]
        alone = all(layer.span.is_summed for layer in self._layers)  # then every rank searches by itself
        yield from () if alone else before
        yield exactly("moments", 3 * len(sizes))
        yield from () if alone else search

    def _rows(self) -> Iterator[Sum]:
        rows = [layer.span.rows for layer in self._layers]
        yield exactly("moments of rows", 3 * sum(rows))
        if self._spread.held != "whole":
            flag = torch.int32.itemsize
            yield Sum("which rows are cut", flag * sum(rows), flag * sum(rows))
            cut = {i: own for i, layer in enumerate(self._layers) if (own := self._most_cut(layer))}
            if cut:
                longest = max(self._layers[i].span.size // rows[i] for i in cut)
                certain = self._spread.held == "slices"
                yield from cut_row_sums(sum(cut.values()), longest, self._score_dtype, certain=certain)
        yield exactly("lowest kept scores", len(rows))

    def _most_cut(self, layer: Layer) -> int:
        """Return of how many rows of a layer any rank holds a piece only, at most."""
        span = layer.span
        if span.output_dim and not span.stacked:  # the first dimension counts inputs
            return span.rows
        return min(span.rows, self._spread.ranks - 1) if self._spread.held == "runs" else 0

    def _pattern(self) -> Iterator[Sum]:
        layers = self._layers
        yield exactly("moments", 3 * len(layers))
        yield from self._cut_groups()
        yield exactly("lowest kept scores", len(layers))

    def _cut_groups(self) -> Iterator[Sum]:
        if self._spread.held != "whole":
            yield exactly("ends of shards", 2 * self._spread.ranks * len(self._layers))
            yield Sum("scores of groups that are cut", 0, sum(map(self._most_of_groups, self._layers)))

    def _most_of_groups(self, layer: Layer) -> int:
        """Return how many bytes the scores have that lie in the cut groups of a layer's N:M pattern, at most."""
        span, pattern = layer.span, GroupPattern.parse(str(self._config.pattern))
        if self._spread.held == "slices" and not self._most_cut(layer):
            return 0
        slab = pattern.size * math.prod(span.shape[span.input_dim + 1 :])
        return min(span.size, (self._spread.ranks - 1) * slab) * key_dtype([self._score_dtype]).itemsize

    def _grown(self) -> Iterator[Sum]:
        """Yield what "rewire" sums to choose, of all that does not stay, what is grown."""
        if self._config.grow == "gradient":
            yield from self._evidence(Saliency())
        yield from self._pooled() if self._config.pattern is None else self._cut_groups()

    def certificates(self) -> Iterator[Sum]:
        if not self._config.certify:
            return
        layers = self._layers
        if self._criterion.certificate == "loss_change":
            yield exactly("certificates: bounds", len(layers))
            if isinstance(layers[0], UnitLayer):
                yield from self._evidence(self._criterion)
            return
        words = sum(layer.span.rows for layer in layers)
        if self._spread.held == "whole":
            products = [layer.input_products() for layer in layers if isinstance(layer, WeightLayer)]
            words += sum(value.numel() for found in products for value in found.values())
        yield exactly("certificates: errors of outputs", words)

    @property
    def _score_dtype(self) -> torch.dtype:
        if isinstance(self._layers[0], UnitLayer):
            return torch.float64
        wide = self._criterion.needs is not None
        return torch.promote_types(self._spread.dtype, torch.float32) if wide else self._spread.dtype
