"""Gates that learn which heads to keep, and what they begin with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from scipy import stats
from torch import Tensor

from emp_callbacks.core.hard_concrete import proportional_probabilities
from emp_callbacks.pruning.pruner import EMPPruner
from emp_callbacks.study.gates.bench import Bench
from emp_callbacks.study.gates.masking import HEADS, NoMask, density_of, hold

__all__ = ["Gates", "first_open"]


class Gates(NoMask):
    """Gates that learn for the first part of the steps, then exactly `keep` heads.

    Args:
        bench: The model.
        keep: Heads.
        gates: As in EMPConfig.
        init: "open", or P(open) by attention.
    """

    def __init__(self, bench: Bench, keep: int, gates: str, init: str | Mapping[str, list[float]]) -> None:
        super().__init__(bench)
        self._keep, self._gates, self._init = keep, gates, init
        self._held: EMPPruner | None = None

    def begin(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._pruner = EMPPruner(
            self._bench.module,
            optimizer,
            criterion="taylor",
            gates=self._gates,
            init=self._init,
            density=density_of(self._keep, self._bench.n),
            gate_lr=self._bench.settings["gate_lr"],
            gate_warmup=self._bench.settings["gate_warmup"],
            mode="freeze",
            **HEADS,
        )
        self._pruner.refresh()

    def after_step(self, step: int) -> None:
        if self._held is not None:
            self._held.step()
            return
        self._pruner.step()
        if step == self._bench.settings["gated_steps"]:
            self._harden()

    def _harden(self) -> None:
        gates = self._pruner.gates
        assert gates is not None, "the gates have begun"
        self._expected = gates.expected
        found = gates.scores()  # P(open); of top-K, which draws nothing, by what it chooses
        self._chosen_by = self._bench.flat({name: found[part] for name, part in gates.parts.items()})
        self._pruner.close()
        self._pruner.finalize()
        self._held = hold(self._bench, self._optimizer, self._pruner.masks)

    def finish(self) -> dict[str, Tensor]:
        assert self._held is not None, "gates are hardened before the last step"
        self._held.finalize()
        return self._held.masks

    def told(self) -> dict[str, Any]:
        found = stats.spearmanr(self._chosen_by, self._bench.flat(self._bench.scores)).statistic
        return {"open": self._chosen_by.tolist(), "expected": self._expected, "spearman": float(found)}


def first_open(bench: Bench, keep: int, init: str) -> str | dict[str, list[float]]:
    """Return what gates begin with: "open", or P(open) in proportion to EMP's scores, as they are or permuted."""
    if init == "open":
        return init
    open_ = proportional_probabilities(bench.flat(bench.scores), float(keep))
    if init == "permuted":
        generator = torch.Generator().manual_seed(bench.dense.seed)
        open_ = open_[torch.randperm(bench.n, generator=generator)]
    return {name: part.tolist() for name, part in bench.split(open_).items()}
