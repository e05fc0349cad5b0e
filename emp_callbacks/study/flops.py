"""Floating-point operations of a forward pass, by layer, and what is left of them under masks."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from emp_callbacks.shrinking.example_run import evaluating

__all__ = ["layer_flops", "masked_flops"]

_Operations = Counter[str]


def layer_flops(model: nn.Module, call: Callable[[], object], examples: int = 1) -> dict[str, int]:
    """Return the forward FLOPs of each layer for one example, in the order of the model's modules.

    A layer is a module that owns parameters; it has 0 where its parameters multiply nothing (embeddings, and norms
    and biases, which are not counted). What other modules compute themselves, such as the products of queries, keys
    and values in attention, stands under their own names and belongs to no weight; that of `nn.MultiheadAttention`
    stands under its name plus ".products". The values sum to the FLOPs of the call.

    Counted by `torch.utils.flop_counter.FlopCounterMode`: matrix products, convolutions and attention, a
    multiply-add as 2; nothing that acts on single elements. Attention is computed by its formula, because the fused
    kernels of a CPU are not counted, and in full where it is causal. The model evaluates, without gradients.

    Args:
        model: Any module. A tied weight counts under the module that multiplies by it.
        call: Runs the model once.
        examples: Number of examples in that call.

    Raises:
        ValueError: The call did not run the model, or its FLOPs are no multiple of `examples`.

    Warns:
        UserWarning: A layer has matrices and no FLOPs: torch counts none for its operation (recurrent layers), or
            another module multiplies by them and has their FLOPs (the output projection in nn.MultiheadAttention).

    Examples:
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> layer_flops(net, lambda: net(torch.zeros(5, 3)), examples=5)
        {'0': 24, '2': 16}
    """
    if examples < 1:
        raise ValueError(f"examples must be at least 1, got {examples}: the number of examples in the call")
    counter = FlopCounterMode(display=False)
    with evaluating(model), _all_counted(), counter, _by_module(model, counter) as own:
        call()
    if model not in own:
        raise ValueError(f"the call did not run the {type(model).__name__} whose FLOPs are asked for: call it directly")
    found: dict[str, int] = {}
    for name, module in model.named_modules():
        operations = own.get(module, Counter())
        products = operations["aten.bmm"] if isinstance(module, nn.MultiheadAttention) else 0
        flops = sum(operations.values()) - products
        if flops or _owned(module):
            found[name] = _each(flops, examples, name)
        if products:
            found[f"{name}.products".removeprefix(".")] = _each(products, examples, name)
    _warn_of_uncounted(model, found)
    return found


def masked_flops(layer_flops: Mapping[str, int], densities: Mapping[str, float]) -> float:
    """Return the forward FLOPs for one example of a model that skips masked weights.

    Each weight of a layer is used equally often, so a layer's FLOPs go with its density; layers without a density
    count in full. It is what hardware could skip at best, not a measured speed.

    Args:
        layer_flops: As `layer_flops` gives them.
        densities: Name of a parameter, such as "conv1.weight" -> share of it that is kept, in [0, 1].

    Raises:
        ValueError: A layer is unknown or has two densities, which share its FLOPs in unknown parts, or a density is
            not in [0, 1].

    Examples:
        >>> masked_flops({"0": 24, "2": 16}, {"0.weight": 0.5})
        28.0
    """
    by_layer: dict[str, float] = {}
    for parameter, density in densities.items():
        layer = parameter.rpartition(".")[0]
        if layer not in layer_flops:
            raise ValueError(f"no layer {layer!r} was counted for the density of {parameter!r}: both of one model")
        if layer in by_layer:
            raise ValueError(f"layer {layer!r} has two densities, but its FLOPs are not counted by parameter")
        if not 0 <= density <= 1:
            raise ValueError(f"the density of {parameter!r} must lie in [0, 1], got {density}")
        by_layer[layer] = density
    return float(sum(flops * by_layer.get(layer, 1.0) for layer, flops in layer_flops.items()))


@contextmanager
def _all_counted() -> Iterator[None]:
    """Keep torch from fused kernels that its counter does not know."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@contextmanager
def _by_module(model: nn.Module, counter: FlopCounterMode) -> Iterator[dict[nn.Module, _Operations]]:
    """Give what each module computes itself, outside of the modules that it calls."""
    own: dict[nn.Module, _Operations] = {}
    # Of each module that runs now: the count when it began, and what the modules that it called have computed.
    running: list[tuple[_Operations, _Operations]] = []

    def enter(*_: Any) -> None:
        running.append((_counted(counter), Counter()))

    def leave(module: nn.Module, *_: Any) -> None:
        began, inner = running.pop()
        all_of_it = _counted(counter) - began
        own[module] = own.get(module, Counter()) + (all_of_it - inner)
        if running:
            running[-1][1].update(all_of_it)

    with ExitStack() as hooks:
        for module in model.modules():
            hooks.enter_context(module.register_forward_pre_hook(enter))
            hooks.enter_context(module.register_forward_hook(leave))
        yield own


def _counted(counter: FlopCounterMode) -> _Operations:
    return Counter({str(operation): flops for operation, flops in counter.get_flop_counts().get("Global", {}).items()})


def _owned(module: nn.Module) -> list[nn.Parameter]:
    return list(module.parameters(recurse=False))


def _each(flops: int, examples: int, name: str) -> int:
    if flops % examples:
        raise ValueError(f"{name!r} has {flops:,} FLOPs, no multiple of {examples} examples: give those of the call")
    return flops // examples


def _warn_of_uncounted(model: nn.Module, found: Mapping[str, int]) -> None:
    uncounted = [
        name
        for name, module in model.named_modules()
        if found.get(name) == 0
        and not isinstance(module, (nn.Embedding, nn.EmbeddingBag))
        and not list(module.children())
        and any(parameter.dim() > 1 for parameter in _owned(module))
    ]
    if uncounted:
        warnings.warn(
            f"no FLOPs were counted for {', '.join(uncounted)}: torch's counter does not know the operation, or "
            "another module multiplies by these weights; leave them out of what you claim",
            stacklevel=3,
        )
