"""What a module does with its own parameters, read off its forward pass: which of them it multiplies its input with."""

from __future__ import annotations

import copy
import operator
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import fx, nn
from torch.nn import functional

Use = Literal["linear", "matmul", "conv", "conv_transpose", "other"]
"""Of a parameter: the input is multiplied with it as (..., outputs, inputs), as (..., inputs, outputs), as a kernel
(outputs, inputs, ...) or (inputs, outputs, ...); or it is used in another way."""

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
_TURNED = (torch.t, torch.transpose, "t", "transpose", "T", "mT")

_known: WeakKeyDictionary[nn.Module, dict[str, Use] | None] = WeakKeyDictionary()


def uses(module: nn.Module) -> dict[str, Use] | None:
    """Return what a module's forward pass does with each of its own parameters, by name; those it never reads lack.

    Only symbolic: nothing is computed, so that it does not matter where the values are.

    Returns:
        None where the pass cannot be followed, because what it does depends on its input.
    """
    if module not in _known:
        _known[module] = _traced(module)
    return _known[module]


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:  # noqa: ARG002
        return True  # only what the module itself does is asked for


def _traced(module: nn.Module) -> dict[str, Use] | None:
    twin = copy.copy(module)  # what the pass leaves in its module must not get into the user's
    twin._buffers = {name: None if held is None else held.clone() for name, held in module._buffers.items()}
    try:
        graph = _Tracer().trace(twin)
    except Exception:  # a forward pass may do anything at all with what it does not expect
        return None
    found: dict[str, Use] = {}
    for node in graph.nodes:
        if node.op == "get_attr" and node.target in module._parameters:
            found[node.target] = "other" if found.get(node.target) == "other" else _use(node, turned=False)
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
    target, args = user.target, user.args
    if target is getattr or user.op == "call_method" or target in _TURNED:
        name = args[1] if target is getattr else target
        if name in _SAME:
            return _use(user, turned=turned)
        if name in ("shape", "dtype", "device", "size", "dim"):
            return None
        if name in _TURNED:
            return _use(user, turned=not turned)
    if target in _SECOND_ARGUMENT and _second(user) is node:
        use = _SECOND_ARGUMENT[target]
        return use if not turned else "matmul" if use == "linear" else "other"
    first = target in _PRODUCTS and args[:1] == (node,)
    second = (target in _PRODUCTS and args[1:2] == (node,)) or (target in _SUM_AND_PRODUCT and args[2:3] == (node,))
    return "other" if first == second else "linear" if first != turned else "matmul"


def _second(user: fx.Node) -> object:
    return user.kwargs.get("weight", user.args[1] if len(user.args) > 1 else None)
