"""What a module does with its own parameters, read off its forward pass: which of them it multiplies its input with."""

from __future__ import annotations

import operator
from typing import Any, Literal

import torch
from torch import fx, nn
from torch.nn import functional

from emp_callbacks.targets.tracing import traced

Use = Literal["linear", "matmul", "conv", "conv_transpose", "reshaped", "other"]
"""Of a parameter: the input is multiplied with it as (..., outputs, inputs), as (..., inputs, outputs), as a kernel
(outputs, inputs, ...) or (inputs, outputs, ...), or with its elements in another shape; or what it is for differs."""

_SECOND_ARGUMENT: dict[Any, Use] = {
    functional.linear: "linear",
    **dict.fromkeys([functional.conv1d, functional.conv2d, functional.conv3d], "conv"),
    **dict.fromkeys(
        [functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d], "conv_transpose"
    ),
}
_PRODUCTS = (torch.matmul, operator.matmul, torch.mm, torch.bmm, "matmul", "mm", "bmm")
_SUM_AND_PRODUCT = (torch.addmm, torch.baddbmm, "addmm", "baddbmm")
# These leave every element what it is, and where it is.
_SAME = ("to", "type", "type_as", "float", "double", "half", "bfloat16", "contiguous", "detach")
_RESHAPED = (
    *("view", "reshape", "flatten", "squeeze", "unsqueeze", "permute", "chunk", "expand", "view_as", "reshape_as"),
    *(torch.reshape, torch.flatten, torch.squeeze, torch.unsqueeze, torch.permute, torch.chunk),
)
_SCALED = (operator.mul, operator.truediv, torch.mul, torch.div, "mul", "div")
_ASKED = ("shape", "dtype", "device", "ndim", "size", "dim", "numel")
_TURNED = (torch.t, torch.transpose, "t", "transpose", "T", "mT")


def uses(module: nn.Module) -> dict[str, Use]:
    """Return what a module's forward pass does with its own parameters, by name, as far as that is seen.

    Only symbolic: nothing is computed, so that it does not matter where the values are. Those lack that it never reads,
    and all of a pass that cannot be followed, because what it does depends on its input.
    """
    found: dict[str, Use] = {}
    if (graph := traced(module)) is None:
        return found
    for node in graph.nodes:
        name = str(node.target).removeprefix("module.")
        if node.op == "get_attr" and name in module._parameters:
            found[name] = "other" if found.get(name) == "other" else _use(node, turned=False)
    return found


def _use(node: fx.Node, *, turned: bool) -> Use:
    """Return how a parameter is used, or what became of it by turning it around."""
    reached = {_use_by(user, node, turned) for user in node.users} - {None}
    if len(reached) != 1:
        return "other"
    use = reached.pop()
    assert use is not None
    return use


def _use_by(user: fx.Node, node: fx.Node, turned: bool) -> Use | None:
    """Return how one operation uses a parameter, or what follows it; None where it only asks for its shape."""
    what = user.args[1] if user.target is getattr else user.target
    if what in _ASKED:
        return None
    if what in _TURNED:
        return _use(user, turned=not turned)
    if what in _RESHAPED:
        return "other" if _use(user, turned=turned) == "other" else "reshaped"
    if what in _SAME or _takes_matrix(user, node) or _scales(user, node):
        return _use(user, turned=turned)
    return _multiplied_by(user, node, turned)


def _multiplied_by(user: fx.Node, node: fx.Node, turned: bool) -> Use:
    target, args = user.target, user.args
    if target is torch.einsum and node in args:
        return "reshaped"
    if target in _SECOND_ARGUMENT and user.kwargs.get("weight", args[1] if len(args) > 1 else None) is node:
        use = _SECOND_ARGUMENT[target]
        return use if not turned else "matmul" if use == "linear" else "other"
    first = target in _PRODUCTS and args[:1] == (node,)
    second = (target in _PRODUCTS and args[1:2] == (node,)) or (target in _SUM_AND_PRODUCT and args[2:3] == (node,))
    return "other" if first == second else "linear" if first != turned else "matmul"


def _takes_matrix(user: fx.Node, node: fx.Node) -> bool:
    return user.target is operator.getitem and user.args[0] is node


def _scales(user: fx.Node, node: fx.Node) -> bool:
    return user.target in _SCALED and user.args[0] is node and bool(user.meta["is_constant"])
