"""Units that are more than one weight: which slices of which parameters belong together."""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import Tensor, nn

from emp_callbacks.targets.experts import StackedExperts
from emp_callbacks.targets.head_outputs import HeadOutputs
from emp_callbacks.targets.weights import WeightTarget

Role = Literal["weight", "bias", "scale", "shift", "behind", "input", "output", "adapter", "router", "per_head"]


class MemberTarget(NamedTuple):
    """The part that one parameter has in the units of a layer.

    Attributes:
        weight: The parameter.
        dims: Its dimensions along which the units lie, ascending: one, or of stacked experts two.
        unit_of: Unit of each index along `dims`, int64, flat, shape (product of their sizes,); -1 where it belongs to
            none.
        masked: Whether pruning a unit zeroes its slices here. What is not masked is only scored.
        scored: Whether criteria that read weights read this parameter.
        role: What the parameter is to the units: "weight", "bias", "scale" (batch norm's gamma), "shift" (its beta),
            "behind" (what further on would wake the unit: norms, biases of depthwise convolutions), "input" (weights
            that lead into the unit), "output" (weights that read it), "adapter" (of PEFT, beside one of these),
            "router" (what sends tokens to an expert), "per_head" (what an attention holds for each head besides:
            tables, biases, scales).
    """

    weight: WeightTarget
    dims: tuple[int, ...]
    unit_of: Tensor
    masked: bool
    scored: bool
    role: Role


class UnitTarget(NamedTuple):
    """A layer whose units are scored and pruned as wholes.

    Attributes:
        name: Name of the module in the user's model, without what wrappers added.
        units: Number of units.
        members: The parameters that the units are made of; a masked parameter is a member of one layer only.
        observed: Module at which the units' activations pass by, and whether as its "input" or "output"; None where
            no module shows them. Units lie along the last dimension of what passes a Linear or transformers' Conv1D
            and along dimension 1 of what passes a convolution or batch norm, as equal blocks of neighbours.
        experts: The experts that the units are, or whose hidden neurons they are; they are observed instead.
        least: Units that stay in any case.
        whole_experts: Whether the units are experts.
        heads: Where the heads' outputs pass by that the units are.
    """

    name: str
    units: int
    members: tuple[MemberTarget, ...]
    observed: tuple[nn.Module, Literal["input", "output"]] | None
    experts: StackedExperts | None = None
    least: int = 1
    whole_experts: bool = False
    heads: HeadOutputs | None = None
