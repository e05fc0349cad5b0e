"""Mixture-of-experts layers, found by their structure: stacked parameters or lists of modules, and their router."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn

from emp_callbacks.targets.multiplied import uses
from emp_callbacks.targets.shapes import FullShape
from emp_callbacks.targets.wrappers import inner, innermost


class StackedExperts(NamedTuple):
    """Experts whose matrices lie in 3-D parameters: x -> down(gate(up(x))), chosen anew for every token.

    Attributes:
        module: Holds the parameters.
        names: Of the two stacks in it, the first and the second.
        up: First matrices, shape (E, U, H), or transposed (E, H, U): U = I, or 2 I where a gate is multiplied.
        down: Second matrices, shape (E, H, I), or transposed (E, I, H).
        number: E.
        hidden: I, the hidden neurons of one expert.
        width: H, the features of a token.
        transposed: Whether the matrices are (input, output).
        gated: Whether two outputs of `up` are multiplied to one hidden neuron.
        interleaved: Whether these two are neighbours along U, where they are not one half each.
        biases: Those of `up`, shape (E, U), and of `down`, shape (E, H), where there are any.
    """

    module: nn.Module
    names: tuple[str, str]
    up: nn.Parameter
    down: nn.Parameter
    number: int
    hidden: int
    width: int
    transposed: bool
    gated: bool
    interleaved: bool
    biases: tuple[nn.Parameter | None, nn.Parameter | None]

    def holds(self, parameter: nn.Parameter) -> bool:
        """Return whether a parameter is one of the two stacks of matrices."""
        return parameter is self.up or parameter is self.down


def stacked_experts(module: nn.Module, full_shape: FullShape) -> StackedExperts | None:
    """Return the experts that a module's own parameters are; None if they are none.

    They are two 3-D parameters of equal first dimension E > 1, of which the first feeds the second: the one has H
    inputs and I or 2 I outputs, the other I inputs and H outputs. Where the sizes fit both ways, transformers' modules
    say whether theirs are transposed, and the forward pass of others.
    """
    own = {name: p for name, p in module._parameters.items() if p is not None and p.is_floating_point()}
    shapes = {name: full_shape(p) for name, p in own.items()}
    cubes = [name for name, shape in shapes.items() if len(shape) == 3]
    if len(cubes) != 2 or shapes[cubes[0]][0] != shapes[cubes[1]][0] or shapes[cubes[0]][0] < 2:
        return None
    up, down = cubes
    fits = [turned for turned in (False, True) if _hidden(shapes[up], shapes[down], turned) is not None]
    if len(fits) == 2:
        told = module.__dict__.get("is_transposed", {"linear": False, "matmul": True}.get(uses(module).get(up, "")))
        fits = [told] if isinstance(told, bool) else []
    if not fits:
        return None
    (turned,) = fits
    hidden = _hidden(shapes[up], shapes[down], turned)
    assert hidden is not None
    count = shapes[up][0]
    biases = tuple(own.get(f"{name}_bias") if shapes.get(f"{name}_bias", (0,))[0] == count else None for name in cubes)
    return StackedExperts(
        module=module,
        names=(up, down),
        up=own[up],
        down=own[down],
        number=count,
        hidden=hidden,
        width=shapes[up][1 if turned else 2],
        transposed=turned,
        gated=shapes[up][2 if turned else 1] == 2 * hidden,
        interleaved=module.__dict__.get("is_concatenated", True) is False,
        biases=(biases[0], biases[1]),
    )


def _hidden(up: torch.Size, down: torch.Size, turned: bool) -> int | None:
    """Return I where the two fit together in this orientation."""
    outputs, inputs = (up[2], up[1]) if turned else (up[1], up[2])
    read, written = (down[1], down[2]) if turned else (down[2], down[1])
    return read if inputs == written and outputs in (read, 2 * read) else None


class ExpertGroup(NamedTuple):
    """The experts of one layer, of which a router chooses some for each token.

    Attributes:
        module: Holds the experts.
        number: E.
        stacked: Their parameters where these are stacked; None where each expert is a module of its own.
        routers: The modules beside them whose only matrix has a row for each expert.
        shared_gates: The modules beside them whose only matrix has one row: they scale what a shared expert puts out.
        top_k: How many experts a token is sent to, as the router or the layer says; 1 where neither does.
    """

    module: nn.Module
    number: int
    stacked: StackedExperts | None
    routers: tuple[nn.Module, ...]
    shared_gates: tuple[nn.Module, ...]
    top_k: int


def expert_groups(model: nn.Module, full_shape: FullShape) -> Iterator[ExpertGroup]:
    """Yield the mixture-of-experts layers of a model."""
    for parent in (module for module in model.modules() if inner(module) is None):
        for name, given in parent.named_children():
            child = innermost(given)
            stacked = stacked_experts(child, full_shape)
            if stacked is not None:
                yield _group(parent, child, stacked.number, stacked, full_shape)
            elif "expert" in name and _are_alike(child):  # that these are alternatives nothing but the name says
                yield _group(parent, child, len(child._modules), None, full_shape)


def _are_alike(module: nn.Module) -> bool:
    """Return whether a module is a list or a dictionary of several modules of one class, not called in order."""
    if isinstance(module, nn.Sequential) or len(module._modules) < 2:
        return False
    is_list = isinstance(module, nn.ModuleList | nn.ModuleDict) or all(map(str.isdigit, module._modules))
    return is_list and len({type(child) for child in module.children()}) == 1


def _group(
    parent: nn.Module, experts: nn.Module, number: int, stacked: StackedExperts | None, full_shape: FullShape
) -> ExpertGroup:
    beside: dict[int, list[nn.Module]] = {}
    for module in map(innermost, parent.children()):
        matrices = [p for p in module.parameters() if len(full_shape(p)) == 2]
        if module is not experts and len(matrices) == 1:
            beside.setdefault(full_shape(matrices[0])[0], []).append(module)
    routers = tuple(beside.get(number, ()))
    told = (getattr(module, name, None) for module in (*routers, parent) for name in ("top_k", "num_experts_per_tok"))
    top_k = next((count for count in told if isinstance(count, int)), 1)
    return ExpertGroup(experts, number, stacked, routers, tuple(beside.get(1, ())), top_k)


def routers(model: nn.Module, full_shape: FullShape) -> set[nn.Parameter]:
    """Return the weights by which tokens are sent to experts, and those that scale a shared expert."""
    groups = expert_groups(model, full_shape)
    gates = {module for group in groups for module in (*group.routers, *group.shared_gates)}
    return {p for module in gates for p in module.parameters() if len(full_shape(p)) > 1}
