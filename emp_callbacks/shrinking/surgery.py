"""The cut itself: which modules can be cut along which axes, what is left of them, and the way back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from emp_callbacks.targets import unit_search
from emp_callbacks.targets.matrices import is_conv1d

__all__ = [
    "EXPERT_COUNTS",
    "SHRUNK",
    "Cut",
    "Surgery",
    "axes_of",
    "axis_size",
    "cut_of",
    "cuttable_modules",
    "groups_of",
    "is_depthwise",
    "mixes",
    "passes",
    "perform",
    "snapshot",
    "why_whole",
]


class Cut(NamedTuple):
    """What is left of one axis of a module: `kept`, indices below `of`, its size in the dense model, in their order."""

    of: int
    kept: list[int]


Surgery = dict[str, dict[str, Cut]]
"""Module name -> axis -> what is left of it. Axes are "outputs" and "inputs" of a layer, "groups" of a convolution,
"experts" of a mixture; and of what an attention holds "NAME:DIM", a tensor along a dimension, "=NAME", an attribute
that is a multiple of its heads, and "heads", for readers.
"""

SHRUNK: WeakSet[nn.Module] = WeakSet()
"""Models of which something was cut for good: a report of their next cut tells of a part."""

# What mixtures and routers call the number of experts.
EXPERT_COUNTS = {"num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"}


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
_TRANSPOSED = {
    "outputs": Axis({"weight": 1, "bias": 0}, ("out_channels",)),
    "inputs": Axis({"weight": 0}, ("in_channels",)),
}
_DEPTHWISE = {"outputs": Axis({"weight": 0, "bias": 0}, ("out_channels", "in_channels", "groups"))}
_PRELU = {"outputs": Axis({"weight": 0}, ("num_parameters",))}
_NORM = {"outputs": Axis({"weight": 0, "bias": 0, "running_mean": 0, "running_var": 0}, ("num_features",))}

_PLAIN = {kind.forward for kind in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)} | {
    kind.forward for kind in (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
}


def axes_of(module: nn.Module) -> dict[str, Axis]:
    """Return the axes along which a module can be cut; what acts on each channel alone has "outputs" only.

    Empty for modules of an unknown kind, also if they hold tensors that their kind does not know. A layer that
    standardises its weights over the inputs has no axis of inputs.
    """
    if hasattr(module, "parametrizations"):
        return {}
    axes = _axes_by_class(module)
    held = {name: value for name, value in {**module._parameters, **module._buffers}.items() if value is not None}
    known = {name for axis in axes.values() for name in axis.dims} | {"num_batches_tracked"}
    if not (extra := held.keys() - known):
        return axes if "inputs" not in axes or _inputs_are_apart(module) else {"outputs": axes["outputs"]}
    if "inputs" not in axes or any(not _per_output(module, axes, held[name]) for name in extra):
        return {}
    outputs = Axis(axes["outputs"].dims | dict.fromkeys(extra, 0), axes["outputs"].sizes)
    return {"outputs": outputs, "inputs": axes["inputs"]} if _inputs_are_apart(module) else {"outputs": outputs}


def _per_output(module: nn.Module, axes: dict[str, Axis], tensor: Tensor) -> bool:
    """Return whether a tensor has one value for each output, like the gain of a weight-standardised convolution."""
    weight = module._parameters["weight"]
    if weight is None or axes["outputs"].dims["weight"] != 0:
        return False
    return tensor.shape == (len(weight), *[1] * (weight.dim() - 1))


@torch.no_grad()
def _inputs_are_apart(module: nn.Module) -> bool:
    """Return whether the weights of an input that is zero have no effect; they have where weights are standardised."""
    if type(module).forward in _PLAIN or not isinstance(module, (nn.Linear, _ConvNd)):
        return True
    weight = module._parameters["weight"]
    if weight is None or weight.is_meta:
        return True
    transposed = isinstance(module, _ConvTransposeNd)
    other = weight.detach().clone()
    inputs = torch.ones(1, *_least_input(module), dtype=weight.dtype, device=weight.device)
    inputs[:, 0 if transposed else slice(None, None, weight.shape[1])] = 0
    other[(0,) if transposed else (slice(None), 0)] += 1
    forward: Callable[..., Any] = type(module).forward  # past hooks
    try:
        before = forward(module, inputs)
        module._parameters["weight"] = nn.Parameter(other, requires_grad=False)
        after = forward(module, inputs)
    except Exception:  # a forward of somebody's own may want anything else: then nothing is known of its inputs
        return False
    finally:
        module._parameters["weight"] = weight
    return isinstance(before, Tensor) and isinstance(after, Tensor) and torch.equal(before, after)


def _least_input(module: nn.Module) -> tuple[int, ...]:
    """Return the size of the smallest example, without the batch."""
    if isinstance(module, _ConvNd):
        windows = zip(module.kernel_size, module.dilation, strict=True)
        return (module.in_channels, *(dilation * (size - 1) + 1 for size, dilation in windows))
    return (int(module.in_features),)  # type: ignore[arg-type]


def _axes_by_class(module: nn.Module) -> dict[str, Axis]:
    if isinstance(module, nn.Linear):
        return _LINEAR
    if isinstance(module, _NormBase):
        return _NORM
    if isinstance(module, nn.PReLU):
        return _PRELU if module.num_parameters > 1 else {}
    if isinstance(module, _ConvTransposeNd):
        return _TRANSPOSED if module.groups == 1 else {}
    if isinstance(module, _ConvNd):
        return _DEPTHWISE if is_depthwise(module) else _CONVOLUTION
    return _CONV1D if is_conv1d(module) else {}


def is_depthwise(module: nn.Module) -> bool:
    """Return whether a module is a convolution of each channel alone, with one output for each."""
    return unit_search.is_depthwise(module) and module.in_channels == module.out_channels


def mixes(module: nn.Module) -> bool:
    """Return whether a module is a layer whose outputs read all inputs, or a group of them."""
    return isinstance(module, (nn.Linear, _ConvNd)) or is_conv1d(module)


def passes(module: nn.Module) -> bool:
    """Return whether a module acts on each channel alone."""
    return isinstance(module, (_NormBase, nn.PReLU)) or is_depthwise(module)


def groups_of(module: nn.Module) -> int:
    """Return the number of groups of a convolution, else 1."""
    return module.groups if isinstance(module, _ConvNd) else 1


def why_whole(module: nn.Module) -> str:
    """Return why a module, or its inputs, cannot be cut."""
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        return "recurrent layers are not cut"
    if hasattr(module, "parametrizations"):
        return "its weight is parametrised"
    if "outputs" in axes_of(module) and mixes(module) and not _inputs_are_apart(module):
        return "its weights are standardised over all of its inputs"
    if axes_of(module):
        return "its weight is tied to another's"
    if isinstance(module, _ConvTransposeNd):
        return "a transposed convolution of several groups is not cut"
    return "it is of a kind that is not known"


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
        if groups_of(module) > 1 and not is_depthwise(module):
            _cut_groups(name, module, axes)
            continue
        for axis, cut in axes.items():
            if axis.startswith("="):
                _scale(name, module, axis[1:], cut)
            elif ":" in axis:
                _cut_tensor(name, module, axis, cut)
            elif axis == "experts":
                _cut_experts(name, module, cut)
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


def _cut_groups(name: str, module: nn.Module, axes: dict[str, Cut]) -> None:
    """Cut a grouped convolution; between channels of groups that were apart, its new weights are zero."""
    convolution: Any = module
    sizes = {"groups": groups_of(module), "outputs": convolution.out_channels, "inputs": convolution.in_channels}
    cuts = {axis: axes.get(axis, Cut(size, list(range(size)))) for axis, size in sizes.items()}
    if any(cut.of != sizes[axis] for axis, cut in cuts.items()):
        raise ValueError(f"{name!r} has other groups, inputs or outputs; start from the dense architecture")
    groups = len(cuts["groups"].kept)
    weight = module._parameters["weight"].detach()  # type: ignore[union-attr]
    inputs = torch.tensor(cuts["inputs"].kept, device=weight.device).reshape(groups, -1)
    outputs = torch.tensor(cuts["outputs"].kept, device=weight.device)
    per_group = sizes["outputs"] // sizes["groups"], sizes["inputs"] // sizes["groups"]
    read = inputs.repeat_interleave(len(outputs) // groups, 0)  # of each output
    same = (outputs // per_group[0])[:, None] == read // per_group[1]
    left = weight[outputs[:, None], read % per_group[1]]
    left = left * same.reshape(*same.shape, *[1] * (weight.dim() - 2)).to(left)
    for tensor in axes_of(module)["outputs"].dims:
        value = getattr(module, tensor, None)
        if value is not None:
            new = left if tensor == "weight" else value.detach()[outputs]
            setattr(module, tensor, nn.Parameter(new, value.requires_grad))
    vars(module).update(groups=groups, out_channels=len(outputs), in_channels=inputs.numel())


def _cut_experts(name: str, module: nn.Module, cut: Cut) -> None:
    """Cut experts that are modules of a list, or else what is stacked in a module, and their rows in a router."""
    tensors = {**module._parameters, **module._buffers}
    along = [own for own, value in tensors.items() if value is not None and value.shape[:1] == (cut.of,)]
    if not along and len(module._modules) != cut.of:
        raise ValueError(f"{name!r} holds nothing of {cut.of} experts; start from the dense architecture")
    for tensor in along:
        _put(module, tensor, 0, cut)
    if not along:
        names, held = zip(*module._modules.items(), strict=True)
        module._modules = {names[i]: held[expert] for i, expert in enumerate(cut.kept)}
    for attribute in {*EXPERT_COUNTS, "out_features"} & vars(module).keys():
        if vars(module)[attribute] == cut.of:
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
