"""Hooks on modules that gather what a criterion asks for: norms of inputs, sizes of activations."""

from __future__ import annotations

from typing import Any, Literal, final

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from emp_callbacks.targets.compiled_site import watch
from emp_callbacks.targets.forward_site import ForwardSite, in_backward


class Observer(ForwardSite):
    """Sums over everything that passes one module while `observing`; a comparison of two flags otherwise.

    Args:
        name: Name of the module, for messages.
        module: The module.
        size: Numbers to sum, each over `count` values.
    """

    def __init__(self, name: str, module: nn.Module, size: int) -> None:
        super().__init__(name, module)
        self.size = size

    def statistics(self) -> dict[str, Tensor]:
        """Return this rank's sums since `reset`, float64: "total", shape (size,), and "count", shape ()."""
        zeros = {"total": torch.zeros(self.size, dtype=torch.float64), "count": torch.zeros((), dtype=torch.float64)}
        return {key: self._sums.get(key, zero).cpu() for key, zero in zeros.items()}

    def _shown(self, values: Tensor) -> Tensor:
        """Look at what passes and return it, or in compiled code, where looking is an operator, a copy of it."""
        if not self._gathers:
            return values
        if torch.compiler.is_compiling():
            return watch(values, values.detach(), self._number, False)
        self.see_forward(values)
        return values

    @torch.no_grad()
    def see_forward(self, activation: Tensor) -> None:
        """Add what passes, unless it is only computed again for a backward pass."""
        if not in_backward():
            total = self._total(activation.detach())
            count = torch.tensor(activation.numel() / self.size, device=activation.device)
            self._add({"total": total, "count": count})

    def _total(self, values: Tensor) -> Tensor:
        raise NotImplementedError


@final
class InputSquares(Observer):
    """Sum of squares of each input feature over all samples, tokens and pixels.

    Args:
        name: Name of the module.
        module: A Linear, transformers' Conv1D, or a convolution.
        size: Input features or channels.
    """

    def _register(self) -> list[RemovableHandle]:
        return [self.module.register_forward_pre_hook(self._hook)]

    def _hook(self, module: nn.Module, args: Any) -> Any:  # noqa: ARG002
        return (self._shown(args[0]), *args[1:])

    def _total(self, values: Tensor) -> Tensor:
        own = feature_dim(self.module, values.ndim)
        return values.float().square().sum([d for d in range(values.ndim) if d != own], dtype=torch.float64)


@final
class ActivationSizes(Observer):
    """Sum of |a| of each unit over all samples, tokens and pixels.

    Args:
        name: Name of the module.
        module: The module at which the units pass by.
        size: Units: equal blocks of neighbours along the feature dimension.
        side: Whether they are in the module's input or output.
    """

    def __init__(self, name: str, module: nn.Module, size: int, side: Literal["input", "output"]) -> None:
        super().__init__(name, module, size)
        self.side = side

    def _register(self) -> list[RemovableHandle]:
        if self.side == "input":
            return [self.module.register_forward_pre_hook(self._before)]
        return [self.module.register_forward_hook(self._after)]

    def _before(self, module: nn.Module, args: Any) -> Any:  # noqa: ARG002
        return (self._shown(args[0]), *args[1:])

    def _after(self, module: nn.Module, args: Any, output: Any) -> Any:  # noqa: ARG002
        return self._shown(output)

    def _total(self, values: Tensor) -> Tensor:
        moved = values.movedim(feature_dim(self.module, values.ndim), -1)
        blocks = moved.reshape(-1, self.size, moved.shape[-1] // self.size)
        return blocks.float().abs().sum((0, 2), dtype=torch.float64)


def feature_dim(module: nn.Module, ndim: int) -> int:
    """Return the dimension of a module's inputs and outputs that counts features: 1 for images, else the last."""
    kinds = [kind.__name__ for kind in type(module).__mro__]
    is_spatial = any(kind in ("_ConvNd", "_NormBase", "_BatchNorm") for kind in kinds)
    return 1 if is_spatial and ndim > 2 else ndim - 1
