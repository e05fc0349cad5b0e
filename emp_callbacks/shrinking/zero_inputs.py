"""Which inputs of a model's layers are zero by structure, not by chance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from emp_callbacks.shrinking.surgery import axes_of

__all__ = ["zero_inputs"]

_PROBES = 12  # runs with random weights


@torch.no_grad()
def zero_inputs(model: nn.Module, run: Callable[..., Any]) -> dict[nn.Module, Tensor]:
    """Return, for each layer that reads channels, which of them are zero whatever the weights that are not.

    Besides as they are, the weights are multiplied by random numbers: zeros stay zeros, so a channel that is exactly
    zero in all runs is so by its structure (pruned rows, also behind batch norms, products and activations that map
    0 to 0), and a ReLU that happens to be silent on the example is not mistaken for it.

    Args:
        model: The masked model.
        run: Calls it on the example, with other parameters if given `parameters`.

    Returns:
        Layer -> bool, shape (inputs,), True = zero, on the CPU; layers that did not run are missing.
    """
    zeros: dict[nn.Module, Tensor] = {}

    def look(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if inputs and isinstance(inputs[0], Tensor):
            channels = 1 - module.weight.dim()  # type: ignore[operator]
            rows = inputs[0].movedim(channels, 0)
            zero = (rows.reshape(len(rows), -1) == 0).all(1).cpu()
            zeros[module] = zeros[module] & zero if module in zeros else zero

    readers = [module for module in model.modules() if "inputs" in axes_of(module)]
    hooks = [module.register_forward_pre_hook(look) for module in readers]
    try:
        run()
        for probe in range(_PROBES):
            # In pairs: what a bias alone holds below zero in one, it lifts above zero in the other.
            generator, sign = torch.Generator().manual_seed(probe // 2), (-1) ** probe
            run(parameters={name: _drawn(p, generator, sign) for name, p in model.named_parameters()})
    finally:
        for hook in hooks:
            hook.remove()
    return zeros


def _drawn(parameter: Tensor, generator: torch.Generator, sign: int) -> Tensor:
    """Return the parameter times random factors, one per row times one per column; biases and scales also by `sign`."""
    if not parameter.is_floating_point():
        return parameter
    drawn = parameter * sign if parameter.dim() == 1 else parameter
    for dim, size in enumerate(parameter.shape):
        factors = 0.5 + torch.rand(size, generator=generator)
        factors *= torch.randint(0, 2, (size,), generator=generator) * 2 - 1
        drawn = drawn * factors.to(parameter).reshape(-1, *[1] * (parameter.dim() - dim - 1))
    return drawn
