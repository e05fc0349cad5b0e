"""Weights that are computed from other parameters in every forward pass: weight norm, spectral norm and the like."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

GAIN = "the gain of a weight norm"


class WeightNormed(NamedTuple):
    """The two parameters of a weight norm: weight = gain * direction / ||direction|| (arXiv:1602.07868, eq. 2).

    A weight is 0 where the direction is; a whole output whose direction is 0 is 0 / 0.

    Attributes:
        layer: The module whose weight it is.
        gain: One number per slice along `dim`, other dimensions of size 1.
        direction: Shape of the weight.
        dim: Dimension of the slices that have a norm of their own; -1: one norm for all.
    """

    layer: nn.Module
    gain: nn.Parameter
    direction: nn.Parameter
    dim: int

    def factor(self) -> Tensor:
        """Return weight / direction, broadcastable to both."""
        return (self.gain / torch.norm_except_dim(self.direction, 2, self.dim)).detach()


def weight_norms(model: nn.Module) -> Iterator[WeightNormed]:
    """Yield the weight norms of a model, of both kinds that torch has."""
    for module in model.modules():
        for parametrization in _parametrizations(module):
            if len(parametrization) == 1 and isinstance(norm := parametrization[0], _WeightNorm):
                yield WeightNormed(module, parametrization.original0, parametrization.original1, norm.dim)
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, WeightNorm):
                gain, direction = (module.get_parameter(f"{hook.name}_{end}") for end in "gv")
                yield WeightNormed(module, gain, direction, hook.dim)


def parametrised(model: nn.Module) -> set[nn.Parameter]:
    """Return the parameters from which a weight is computed in every forward pass, but those of weight norms."""
    found: set[nn.Parameter] = set()
    for module in model.modules():
        found.update(p for parametrization in _parametrizations(module) for p in parametrization.parameters())
        hooks = module._forward_pre_hooks.values()
        found.update(module.get_parameter(f"{hook.name}_orig") for hook in hooks if isinstance(hook, SpectralNorm))
    return found - {parameter for norm in weight_norms(model) for parameter in (norm.gain, norm.direction)}


def _parametrizations(module: nn.Module) -> list[Any]:
    return [*module.parametrizations.values()] if parametrize.is_parametrized(module) else []  # type: ignore[operator]
