"""What a module's forward does with its children, as a graph: torch.fx with every call of a module left as it is."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable
from functools import cache
from threading import RLock, get_ident
from typing import Any
from weakref import WeakKeyDictionary

from torch import fx, nn

from emp_callbacks.core.random_numbers import random_numbers_kept

_IN_PLACE = {"iadd", "isub", "imul", "itruediv"}


def called(node: fx.Node) -> str:
    """Return the plain name of what a node calls, without what says that it works in place; "" if it calls nothing."""
    if node.op not in ("call_function", "call_method"):
        return ""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    name = name.rstrip("_")
    return name[1:] if name in _IN_PLACE else name


@cache
def signature(forward: Callable[..., Any]) -> inspect.Signature:
    """Return the signature of a forward."""
    return inspect.signature(forward)


# While it traces, torch.fx replaces what calls a module, in every thread: two at once would leave that in place.
_TRACING = RLock()


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True

    def __init__(self) -> None:
        super().__init__()
        self._thread = get_ident()

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if get_ident() != self._thread:  # a model that runs meanwhile
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:  # noqa: ARG002
        return True


class _Call(nn.Module):
    """Calls the forward of a module with what it cannot do without: its first argument and those without a default."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, inputs: Any) -> Any:
        forward: Callable[..., Any] = type(self.module).forward
        positional, named = [], {}
        for index, argument in enumerate([*signature(forward).parameters.values()][1:]):
            if argument.kind is argument.VAR_POSITIONAL and index == 0:
                positional.append(inputs[argument.name])
            elif argument.kind in (argument.VAR_POSITIONAL, argument.VAR_KEYWORD):
                continue
            elif argument.default is argument.empty or index == 0:
                named[argument.name] = inputs[argument.name]
        return forward(self.module, *positional, **named)


# Pruners look again at every refresh: what a module was traced with, and its graph.
_TRACED: WeakKeyDictionary[nn.Module, tuple[object, fx.Graph | None]] = WeakKeyDictionary()


def traced(module: nn.Module) -> fx.Graph | None:
    """Return the graph of a module's forward in evaluation mode; None if it cannot be traced."""
    plain = {
        k: v for k, v in vars(module).items() if k != "training" and isinstance(v, bool | int | float | str | None)
    }
    state = (type(module), plain, [(name, id(child)) for name, child in module._modules.items()])
    if module not in _TRACED or _TRACED[module][0] != state:
        _TRACED[module] = (state, _trace(module))
    return _TRACED[module][1]


def _trace(module: nn.Module) -> fx.Graph | None:
    stand_in = object.__new__(type(module))
    # What the forward sets of itself, or puts into a cache, it does to the stand-in.
    own = {
        name: copy.copy(held) if isinstance(held, dict | list | set) else held for name, held in vars(module).items()
    }
    vars(stand_in).update({**own, "training": False})
    with _TRACING, random_numbers_kept(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            graph = _Tracer().trace(_Call(stand_in))
        except Exception:  # whatever code makes of a value that is none: then it cannot be traced
            return None
    for order, node in enumerate(graph.nodes):
        inputs = node.all_input_nodes
        node.meta["order"] = order
        node.meta["is_constant"] = node.op == "get_attr" or (inputs and all(one.meta["is_constant"] for one in inputs))
        node.meta["is_input"] = called(node) == "getitem" and node.args[0].op == "placeholder"
    return graph
