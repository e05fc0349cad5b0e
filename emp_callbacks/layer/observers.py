"""Hooks on modules that gather what a criterion asks for: norms of inputs, sizes of activations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, final

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from emp_callbacks.targets.compiled_site import watch
from emp_callbacks.targets.forward_site import ForwardSite, in_backward
from emp_callbacks.targets.positions import counted_rows


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

    @property
    def reads_positions(self) -> bool:
        return True

    def statistics(self) -> dict[str, Tensor]:
        """Return this rank's sums since `reset`, float64: "total", shape (size,), and "count", shape ()."""
        zeros = {"total": torch.zeros(self.size, dtype=torch.float64), "count": torch.zeros((), dtype=torch.float64)}
        return {key: self._sums.get(key, zero) for key, zero in zeros.items()}

    def _shown(self, values: Tensor) -> Tensor:
        """Look at what passes and return it, or in compiled code, where looking is an operator, a copy of it."""
        if not self._gathers:
            return values
        if torch.compiler.is_compiling():
            watched: Tensor = watch(values, values.detach(), self.positions, self._number, False)
            return watched
        self._refuse_recording(steady=False)
        self.see_forward(values, self.positions)
        return values

    @torch.no_grad()
    def see_forward(self, activation: Tensor, positions: Tensor | None) -> None:
        """Add what passes, unless it is only computed again for a backward pass."""
        if in_backward():
            return
        if activation.is_nested:  # of samples of different lengths; nothing in it is padding
            for sample in activation.detach().unbind():
                self._see(sample, None)
        else:
            self._see(activation.detach(), positions)

    def _see(self, values: Tensor, positions: Tensor | None) -> None:
        count = torch.full((), values.numel() / self.size, dtype=torch.float64, device=values.device)
        last = feature_dim(self.module, values.ndim) == values.ndim - 1
        if last and (rows := counted_rows(positions, values.shape)) is not None:
            rows = rows.to(values.device)
            values = values.masked_fill(~rows.view(*rows.shape, *[1] * (values.ndim - rows.ndim)), 0.0)
            count = count * rows.sum() / rows.numel()
        self._add({"total": self._total(values), "count": count, **self._further(values)})

    def _further(self, values: Tensor) -> dict[str, Tensor]:  # noqa: ARG002
        """Return further sums over what passes, float64."""
        return {}

    def _total(self, values: Tensor) -> Tensor:
        raise NotImplementedError


@final
class InputSquares(Observer):
    """Sum of squares of each input feature over all samples, tokens and pixels.

    Args:
        name: Name of the module.
        module: A Linear, transformers' Conv1D, or a convolution.
        size: Input features or channels.
        patch: Number of groups and of inputs that one output of a group reads, to sum the products of these inputs with
            each other as well: what the error of the outputs is measured from.
    """

    def __init__(self, name: str, module: nn.Module, size: int, patch: tuple[int, int] | None = None) -> None:
        super().__init__(name, module, size)
        self.patch = patch

    def statistics(self) -> dict[str, Tensor]:
        """Return this rank's sums as any observer's; with `patch` also "products", shape (groups, inputs, inputs)."""
        sums = super().statistics()
        if self.patch is not None:
            groups, inputs = self.patch
            nothing = torch.zeros(groups, inputs, inputs, dtype=torch.float64)
            sums["products"] = self._sums.get("products", nothing)
        return sums

    def _further(self, values: Tensor) -> dict[str, Tensor]:
        if self.patch is None:
            return {}
        total = torch.zeros(self.patch[0], self.patch[1], self.patch[1], dtype=torch.float64, device=values.device)
        with torch.autocast(values.device.type, enabled=False):  # it would multiply in half precision
            for patches in _patches(self.module, values, self.patch):
                total += patches @ patches.mT
        return {"products": total}

    def _register(self) -> list[RemovableHandle]:
        return [self.module.register_forward_pre_hook(self._hook)]

    def _hook(self, module: nn.Module, args: Any) -> Any:  # noqa: ARG002
        return (self._shown(args[0]), *args[1:]) if args else None  # named arguments do not come by here

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
        return (self._shown(args[0]), *args[1:]) if args else None  # named arguments do not come by here

    def _after(self, module: nn.Module, args: Any, output: Any) -> Any:  # noqa: ARG002
        return self._shown(output)

    def _total(self, values: Tensor) -> Tensor:
        moved = values.movedim(feature_dim(self.module, values.ndim), -1)
        blocks = moved.reshape(-1, self.size, moved.shape[-1] // self.size)
        return blocks.float().abs().sum((0, 2), dtype=torch.float64)


def can_unfold(module: nn.Module) -> bool:
    """Return whether what each output of a module reads is known here: not of a Conv3d, nor of edges that repeat."""
    return not isinstance(module, nn.Conv3d) and getattr(module, "padding_mode", "zeros") == "zeros"


def _patches(module: nn.Module, values: Tensor, patch: tuple[int, int]) -> Iterator[Tensor]:
    """Yield what each output of a module reads, shape (groups, inputs, outputs), float32, in pieces.

    A convolution's patches are as many times as large as its input as its kernel has taps: one sample at a time.
    """
    if not isinstance(module, (nn.Conv1d, nn.Conv2d)):
        yield values.float().reshape(1, -1, patch[1]).mT
        return
    flat = isinstance(module, nn.Conv1d)

    def both(setting: int | tuple[int, ...], other: int) -> tuple[int, ...]:
        pair = tuple(setting) if isinstance(setting, tuple) else (setting,)
        return (other, *pair) if flat else pair

    images = values.float().unsqueeze(-2) if flat else values.float()
    padding = module.padding
    if isinstance(padding, str):  # "same" or "valid"
        taps = zip(module.kernel_size, module.dilation, strict=True)
        total = [dilation * (kernel - 1) if padding == "same" else 0 for kernel, dilation in taps]
        sides = [side for amount in reversed(total) for side in (amount // 2, amount - amount // 2)]
        images, padding = functional.pad(images, sides), (0,) * len(total)
    for image in images.split(1):  # type: ignore[no-untyped-call]
        columns = functional.unfold(
            image,
            both(module.kernel_size, 1),
            dilation=both(module.dilation, 1),
            padding=both(padding, 0),
            stride=both(module.stride, 1),
        )
        yield columns.view(*patch, -1)


def feature_dim(module: nn.Module, ndim: int) -> int:
    """Return the dimension of a module's inputs and outputs that counts features: 1 for images, else the last."""
    kinds = [kind.__name__ for kind in type(module).__mro__]
    is_spatial = any(kind in ("_ConvNd", "_NormBase", "_BatchNorm") for kind in kinds)
    return 1 if is_spatial and ndim > 2 else ndim - 1
