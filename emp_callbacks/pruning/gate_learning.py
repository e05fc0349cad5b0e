"""How gates learn: the gradient of the loss, and a Lagrangian that moves their number to what it is to be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from emp_callbacks.layer import Ranks
from emp_callbacks.layer.head_gates import HeadGates

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
        # Fused, it can be told on the device to leave a step out.
        self._adam = torch.optim.Adam([gates.log_alpha], lr=lr, betas=(0.9, 0.98), fused=True)
        nothing = torch.zeros((), dtype=torch.float64, device=gates.log_alpha.device)
        self._mean_square, self._seen = nothing, nothing.clone()
        self._multipliers = nothing.new_zeros(len(gates.groups))

    @torch.no_grad()
    def step(self) -> None:
        """Move the gates by what the forward and backward passes since the last call said. Collective.

        A gradient with NaN or Inf, as of a step that a gradient scaler skipped, moves nothing. No accelerator is waited
        for.
        """
        log_alpha, own = self._gates.log_alpha, self._gates.log_alpha.grad
        sent = torch.zeros_like(log_alpha) if own is None else own.detach()
        gradient = self._ranks.all_sum(sent.double()) / self._ranks.world_size
        finite = torch.isfinite(gradient).all()
        gradient = self._in_own_unit(gradient.where(finite, 0.0), finite)
        if self._gates.kind == "hard_concrete":
            gradient = gradient + self._constraint(finite)
        log_alpha.grad = gradient.to(log_alpha)
        self._adam.found_inf = (~finite).to(log_alpha)  # type: ignore[attr-defined]
        self._adam.step()
        log_alpha.grad = None
        self._gates.steps += 1
        self._gates.renew()

    def _in_own_unit(self, gradient: Tensor, finite: Tensor) -> Tensor:
        self._seen += finite
        now = _MEMORY * self._mean_square + (1 - _MEMORY) * gradient.square().mean()
        self._mean_square.copy_(now.where(finite, self._mean_square))
        scale: Tensor = (self._mean_square / (1 - _MEMORY ** self._seen.clamp(min=1))).sqrt()
        return gradient / scale.where(scale > 0, 1.0)

    def _constraint(self, finite: Tensor) -> Tensor:
        """Return the gradient of the constraints, shape (N,), and let their multipliers ascend."""
        probability = self._gates.probability
        slope = probability * (1 - probability)  # d P / d log alpha
        found = torch.zeros_like(probability)
        for multiplier, group in zip(self._multipliers, self._gates.groups, strict=True):
            gap = (probability[group.heads].sum() - group.target(self._gates.progress)) / group.size
            multiplier += _ASCENT * self._lr * gap * finite
            found[group.heads] = (multiplier + _PENALTY * gap) * slope[group.heads]
        return found

    def record(self) -> dict[str, Any]:
        """Return the state as plain numbers and lists."""
        state = self._adam.state[self._gates.log_alpha]
        return {
            "adam": {name: state[name].tolist() for name in _MOMENTS if name in state},
            "mean_square": float(self._mean_square),
            "seen": float(self._seen),
            "multipliers": self._multipliers.tolist(),
        }

    def restore(self, record: Mapping[str, Any]) -> None:
        """Go on from what `record` returned."""
        like = self._gates.log_alpha
        if record["adam"]:
            self._adam.state[like] = {name: torch.tensor(value).to(like) for name, value in record["adam"].items()}
        self._mean_square.fill_(record["mean_square"])
        self._seen.fill_(record["seen"])
        self._multipliers.copy_(torch.tensor(record["multipliers"]))
