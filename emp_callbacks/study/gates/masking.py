"""What happens to the heads while an arm trains on: nothing, a fixed mask, or pruning step by step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from emp_callbacks.pruning.pruner import EMPPruner
from emp_callbacks.study.gates.bench import Bench

__all__ = ["HEADS", "FixedHeads", "NoMask", "Rescoring", "density_of", "hold"]

HEADS: Mapping[str, Any] = {"target": "heads", "scope": "global", "min_units": 0}


def hold(bench: Bench, optimizer: torch.optim.Optimizer | None, kept: Mapping[str, Tensor]) -> EMPPruner:
    """Return a pruner that has zeroed all heads but those of a mask, and keeps them so while an optimizer steps."""
    count = int(bench.flat(kept).sum())
    pruner = EMPPruner(
        bench.module,
        optimizer,
        criterion=lambda layer: kept[layer.name].double(),
        density=density_of(count, bench.n),
        mode="freeze",
        **HEADS,
    )
    pruner.refresh()
    return pruner


def density_of(keep: int, n: int) -> float:
    """Return the density that keeps so many of n heads: half a head more, so that no rounding loses one."""
    return min(1.0, (keep + 0.5) / n)


class NoMask:
    """Every head stays."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench

    def begin(self, optimizer: torch.optim.Optimizer) -> None:
        """Start: the weights are those of the trained model."""

    def after_step(self, step: int) -> None:
        """Count a step."""

    def finish(self) -> dict[str, Tensor]:
        """Return the kept heads, bool, by attention; what was done to the model's weights stays."""
        return self._bench.split(torch.ones(self._bench.n, dtype=torch.bool))

    def told(self) -> dict[str, Any]:
        """Return what else there is to say, as plain data."""
        return {}


class FixedHeads(NoMask):
    """One mask from the first step to the last."""

    def __init__(self, bench: Bench, kept: Mapping[str, Tensor]) -> None:
        super().__init__(bench)
        self._kept = kept

    def begin(self, optimizer: torch.optim.Optimizer) -> None:
        self._held = hold(self._bench, optimizer, self._kept)

    def after_step(self, step: int) -> None:  # noqa: ARG002
        self._held.step()

    def finish(self) -> dict[str, Tensor]:
        self._held.finalize()
        return self._held.masks


class Rescoring(NoMask):
    """Taylor scores of the steps since the last pruning take a tenth of all heads away, ten times at most.

    Source: iterative pruning of Michel et al., arXiv:1905.10650, with training between the prunings.
    """

    def __init__(self, bench: Bench, keep: int) -> None:
        super().__init__(bench)
        self._keep = keep
        self._every = max(1, bench.settings["steps"] // 10)

    def begin(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._watch = EMPPruner(self._bench.module, optimizer, criterion="taylor", observe_only=True, **HEADS)
        self._held = hold(self._bench, optimizer, super().finish())
        self._left = self._bench.n

    def after_step(self, step: int) -> None:
        self._watch.step()
        self._held.step()
        if step % self._every == 0 and self._left > self._keep:
            self._left = max(self._keep, self._bench.n - step // self._every * self._bench.n // 10)
            kept = self._bench.highest(self._watch.scores(), self._left)
            self._watch.refresh()  # which begins a new window of evidence
            self._held.finalize()
            self._held = hold(self._bench, self._optimizer, kept)

    def finish(self) -> dict[str, Tensor]:
        self._watch.finalize()
        self._held.finalize()
        return self._held.masks
