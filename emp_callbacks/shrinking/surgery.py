"""The cut itself: which modules can be cut along which axes, what is left of them, and the way back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from emp_callbacks.targets.weights import is_conv1d

__all__ = ["Cut", "Surgery", "axes_of", "axis_size", "cut_of", "cuttable_modules", "is_conv1d", "perform", "snapshot"]


class Cut(NamedTuple):
    """What is left of one axis of a module: `kept`, increasing indices below `of`, its size in the dense model."""

    of: int
    kept: list[int]


Surgery = dict[str, dict[str, Cut]]
"""Module name -> axis -> what is left of it. Axes are "outputs" and "inputs" of a layer; and of what an attention holds
"NAME:DIM", a tensor along a dimension, "=NAME", an attribute that is a multiple of its heads, and "heads", for readers.
"""


class Axis(NamedTuple):
    """The tensors that lie along an axis of a module, by dimension, and the attributes that state its size."""

    dims: dict[str, int]
    sizes: tuple[str, ...]


_LINEAR = {
    "outputs": Axis({"weight": 0, "bias": 0}, ("out_features",)),
    "inputs": Axis({"weight": 1}, ("in_features",)),
}
_CONV1D = {"outputs": Axis({"weight": 1, "bias": 0}, ("nf",)), "inputs": Axis({"weight": 0}, ("nx",))}
_CONVOLUTION = {
    "outputs": Axis({"weight": 0, "bias": 0}, ("out_channels",)),
    "inputs": Axis({"weight": 1}, ("in_channels",)),
}
_DEPTHWISE = {"outputs": Axis({"weight": 0, "bias": 0}, ("out_channels", "in_channels", "groups"))}
_BATCH_NORM = {"outputs": Axis({"weight": 0, "bias": 0, "running_mean": 0, "running_var": 0}, ("num_features",))}


def axes_of(module: nn.Module) -> dict[str, Axis]:
    """Return the axes along which a module can be cut; a depthwise convolution or batch norm has "outputs" alone.

    Empty for modules of an unknown kind, also if they hold tensors that their kind does not know.
    """
    axes = _axes_by_class(module)
    held = {name for name, value in {**module._parameters, **module._buffers}.items() if value is not None}
    known = {name for axis in axes.values() for name in axis.dims}
    return axes if held <= known | {"num_batches_tracked"} else {}


def _axes_by_class(module: nn.Module) -> dict[str, Axis]:
    if isinstance(module, nn.Linear):
        return _LINEAR
    if isinstance(module, _BatchNorm):
        return _BATCH_NORM
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        depthwise = module.groups == module.in_channels == module.out_channels
        return _CONVOLUTION if module.groups == 1 else _DEPTHWISE if depthwise else {}
    return _CONV1D if is_conv1d(module) else {}


def axis_size(module: nn.Module, axis: str) -> int:
    """Return how long an axis of the module is."""
    return int(getattr(module, axes_of(module)[axis].sizes[0]))


def cuttable_modules(model: nn.Module) -> set[nn.Module]:
    """Return the modules that have axes and share no parameter with another module."""
    holders = Counter(p for module in model.modules() for p in module._parameters.values() if p is not None)
    return {
        module
        for module in model.modules()
        if axes_of(module) and all(holders[p] == 1 for p in module._parameters.values() if p is not None)
    }


def cut_of(left: Tensor) -> Cut:
    """Return the cut that leaves what is True; bool, shape (size of the axis,)."""
    return Cut(len(left), left.nonzero().flatten().tolist())


@torch.no_grad()
def perform(model: nn.Module, surgery: Surgery) -> None:
    """Cut the modules of a model, in place; their parameters become new ones.

    Raises:
        AttributeError: The model has no module of such a name.
        ValueError: A module cannot be cut so, or has another size.
    """
    for name, axes in surgery.items():
        module = model.get_submodule(name)
        for axis, cut in axes.items():
            if axis.startswith("="):
                _scale(name, module, axis[1:], cut)
            elif ":" in axis:
                _cut_tensor(name, module, axis, cut)
            elif axis != "heads":
                _cut(name, module, axis, cut)


def _cut(name: str, module: nn.Module, axis: str, cut: Cut) -> None:
    known = axes_of(module).get(axis)
    if known is None or axis_size(module, axis) != cut.of:
        raise ValueError(f"{name!r} has no {axis} of size {cut.of} to cut; start from the dense architecture")
    for tensor, dim in known.dims.items():
        _put(module, tensor, dim, cut)
    for attribute in known.sizes:
        setattr(module, attribute, len(cut.kept))


def _scale(name: str, module: nn.Module, attribute: str, cut: Cut) -> None:
    """Scale an attribute, or the last entry of a tuple, as heads are left."""
    held = vars(module).get(attribute)
    size = held[-1] if isinstance(held, tuple) and held else held
    if not isinstance(size, int) or size % cut.of:
        raise ValueError(
            f"{name!r} has no {attribute} that is a multiple of {cut.of}; start from the dense architecture"
        )
    left = size // cut.of * len(cut.kept)
    setattr(module, attribute, (*held[:-1], left) if isinstance(held, tuple) else left)


def _cut_tensor(name: str, module: nn.Module, axis: str, cut: Cut) -> None:
    tensor, dim = axis.rsplit(":", 1)
    value = getattr(module, tensor, None)
    if not isinstance(value, Tensor) or value.shape[int(dim)] != cut.of:
        raise ValueError(f"{name!r} has no {tensor} of size {cut.of} along {dim}; start from the dense architecture")
    _put(module, tensor, int(dim), cut)
    for attribute, held in vars(module).items():  # made of the tensor as it was, to be made anew
        if isinstance(held, dict) and held and not attribute.startswith("_") and _are_tensors(held.values()):
            setattr(module, attribute, {})


def _are_tensors(values: Iterable[object]) -> bool:
    return all(isinstance(value, Tensor) for value in values)


def _put(module: nn.Module, tensor: str, dim: int, cut: Cut) -> None:
    """Replace a tensor, if there is one, by what is left of it."""
    value = getattr(module, tensor, None)
    if value is not None:
        left = value.detach().index_select(dim, torch.tensor(cut.kept, device=value.device))
        is_parameter = isinstance(value, nn.Parameter)
        setattr(module, tensor, nn.Parameter(left, value.requires_grad) if is_parameter else left)


def snapshot(model: nn.Module, surgery: Surgery) -> Callable[[], None]:
    """Return a function that gives every module that the surgery touches its present tensors and sizes back."""
    touched = {part for name in surgery for part in model.get_submodule(name).modules()}
    saved = [(part, vars(part).copy(), part._parameters.copy(), part._buffers.copy()) for part in touched]

    def undo() -> None:
        for part, attributes, parameters, buffers in saved:
            vars(part).update(attributes)
            part._parameters.update(parameters)
            part._buffers.update(buffers)

    return undo
