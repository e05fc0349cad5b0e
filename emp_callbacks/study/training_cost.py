"""What a training and its network cost in floating-point operations, were every pruned weight skipped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from emp_callbacks.study.flops import masked_flops

__all__ = ["network_cost"]

# Of a step's three passes (forward; gradients of inputs; gradients of weights) those that masked weights leave out.
_SPARSE_PASSES = {"feedback": 2, "freeze": 3, "rewire": 3}


def network_cost(
    layer_flops: Mapping[str, int], rows: Sequence[Mapping[str, Any]], mode: str, steps: int, batch: int
) -> dict[str, float]:
    """Return the FLOPs of a forward pass for one example, and those of the whole training.

    A step costs three forward passes for each example. Between two refreshes `feedback` skips what is masked in two of
    them, its weights' gradients being dense; `freeze` and `rewire` in all; `project`, whose weights grow back, in none.

    Args:
        layer_flops: Of the network, see `emp_callbacks.study.flops.layer_flops`.
        rows: Of the trajectory; without any the network is dense.
        mode: The mask mode, or "observe".
        steps: Optimizer steps.
        batch: Examples of a step.

    Returns:
        "dense" and "inference": a forward pass without and with the last masks; "training": all steps;
        "dense_training": the same without masks.

    Source: the count of Evci et al., arXiv:1911.11134, appendix H.

    Examples:
        >>> network_cost({"0": 24, "2": 16}, [], "observe", steps=10, batch=2)["training"]
        2400.0
    """
    dense = float(sum(layer_flops.values()))
    refreshes: dict[int, dict[str, float]] = {}
    for row in rows if mode != "observe" else ():
        layers = {layer["name"]: layer["density"] for layer in row["layers"]}
        refreshes.setdefault(row["step"], {}).update(layers)
    sparse = _SPARSE_PASSES.get(mode, 0)
    spent, now, at = 0.0, dense, 0
    for step, densities in [*sorted(refreshes.items()), (steps, {})]:
        spent += (step - at) * batch * (sparse * now + (3 - sparse) * dense)
        at, now = step, masked_flops(layer_flops, densities) if densities else now
    return {"dense": dense, "inference": now, "training": spent, "dense_training": 3.0 * steps * batch * dense}
