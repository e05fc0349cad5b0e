"""How gates learn: the gradient of the loss, and a Lagrangian that moves their number to what it is to be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from emp_callbacks.layer import Ranks
from emp_callbacks.layer.head_gates import GateGroup, HeadGates

_MEMORY = 0.99  # of the mean square of the gradient
_PENALTY = 50.0  # of the square of the gap: a tenth of all heads too many outweighs the loss's own gradient
_ASCENT = 3.0  # how much faster the multiplier moves than the gates
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


class GateLearning:
    """Adam on the gates' parameter, alike on all ranks.

    The gradient of the loss is divided by a running root of its mean square: neither the loss's unit nor what a
    gradient scaler multiplies it by then decides how it weighs against the constraint. "hard_concrete": to it comes
    that of an augmented Lagrangian, lambda * gap + rho / 2 * gap^2, the gap that between the expected number of open
    gates and the target, as a share of all; lambda ascends by the gap (Wang et al., arXiv:1910.04732, and for heads
    CoFi, Xia et al., arXiv:2204.00408, let both factors ascend; with rho fixed the number does not swing as far).
    "top_k" keeps its number by itself.

    Args:
        gates: What learns.
        lr: Adam's learning rate, in units of log alpha per step.
        ranks: Over which gradients are averaged, as those of the loss are.
    """

    def __init__(self, gates: HeadGates, lr: float, ranks: Ranks) -> None:
        self._gates, self._ranks, self._lr = gates, ranks, lr
        self._adam = torch.optim.Adam([gates.log_alpha], lr=lr, betas=(0.9, 0.98))
        self._mean_square, self._seen = 0.0, 0
        self.multipliers = [0.0] * len(gates.groups)

    @torch.no_grad()
    def step(self) -> None:
        """Move the gates by what the forward and backward passes since the last call said. Collective.

        A gradient with NaN or Inf, as of a step that a gradient scaler skipped, moves nothing.
        """
        log_alpha, own = self._gates.log_alpha, self._gates.log_alpha.grad
        sent = torch.zeros_like(log_alpha) if own is None else own.detach()
        log_alpha.grad = None
        gradient = self._ranks.all_sum(sent.double()).cpu() / self._ranks.world_size
        if not bool(torch.isfinite(gradient).all()):
            return
        gradient = self._in_own_unit(gradient)
        if self._gates.kind == "hard_concrete":
            gradient = gradient + self._constraint()
        log_alpha.grad = gradient.to(log_alpha)
        self._adam.step()
        log_alpha.grad = None
        self._gates.steps += 1
        self._gates.renew()

    def _in_own_unit(self, gradient: Tensor) -> Tensor:
        self._seen += 1
        self._mean_square = _MEMORY * self._mean_square + (1 - _MEMORY) * float(gradient.square().mean())
        scale = (self._mean_square / (1 - _MEMORY**self._seen)) ** 0.5
        return gradient / scale if scale else gradient

    def _constraint(self) -> Tensor:
        """Return the gradient of the constraints, shape (N,), and let their multipliers ascend."""
        probability = self._gates.scores()
        slope = probability * (1 - probability)  # d P / d log alpha
        found = torch.zeros_like(probability)
        for i, group in enumerate(self._gates.groups):
            gap = _gap(group, probability, self._gates.progress)
            self.multipliers[i] += _ASCENT * self._lr * gap
            found[group.heads] = (self.multipliers[i] + _PENALTY * gap) * slope[group.heads]
        return found

    def record(self) -> dict[str, Any]:
        """Return the state as plain numbers and lists."""
        state = self._adam.state[self._gates.log_alpha]
        return {
            "adam": {name: state[name].tolist() for name in _MOMENTS if name in state},
            "mean_square": self._mean_square,
            "seen": self._seen,
            "multipliers": [*self.multipliers],
        }

    def restore(self, record: Mapping[str, Any]) -> None:
        """Go on from what `record` returned."""
        like = self._gates.log_alpha
        moments = {name: torch.tensor(value) for name, value in record["adam"].items()}
        if moments:
            step = moments.pop("step")
            self._adam.state[like] = {**{name: value.to(like) for name, value in moments.items()}, "step": step}
        self._mean_square, self._seen = float(record["mean_square"]), int(record["seen"])
        self.multipliers = [*map(float, record["multipliers"])]


def _gap(group: GateGroup, probability: Tensor, progress: float) -> float:
    """Return by which share of a group's heads more are expected to be open than are to be."""
    return (float(probability[group.heads].sum()) - group.target(progress)) / len(group.heads)
