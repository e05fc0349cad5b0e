"""A model as the finders of units see it: modules without their wrappers, parameters by name and full shape."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

from emp_callbacks.targets.activation_modules import is_activation
from emp_callbacks.targets.adapters import adapted, adapter_paths
from emp_callbacks.targets.matrices import is_conv1d
from emp_callbacks.targets.names import check_patterns, known_names, matches
from emp_callbacks.targets.shapes import FullShape
from emp_callbacks.targets.units import MemberTarget, Role, UnitTarget
from emp_callbacks.targets.weights import WeightTarget
from emp_callbacks.targets.wrappers import inner, innermost

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


class UnitSearch:
    """Looks things up in one model.

    Args:
        model: Any module; shared modules and tied parameters are seen once, under their first name, and answer to
            all their names.
        full_shape: Gives the shape that a parameter has in the unsharded model.
    """

    def __init__(self, model: nn.Module, full_shape: FullShape) -> None:
        self.model = model
        self._full_shape = full_shape
        self._names: dict[nn.Module | nn.Parameter, list[str]] = {}
        self._adapters: dict[nn.Module, list[nn.Module]] = {}
        self._refused: dict[nn.Parameter, str] = {}
        paths = adapter_paths(model)
        for name, module in model.named_modules(remove_duplicate=False):
            if (base := adapted(module)) is not None:
                self._adapters.setdefault(innermost(base), []).append(module)
            elif name not in paths and inner(module) is None:
                # With its dot, a wrapper's name is found at the end of the path too.
                self._names.setdefault(module, []).extend(one[:-1] for one in known_names(f"{name}."))
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self._names.setdefault(parameter, []).extend(known_names(name))

    def modules(self) -> Iterator[nn.Module]:
        """Yield every module once, in the model's order, without what wrappers added."""
        return (thing for thing in self._names if isinstance(thing, nn.Module))

    def name(self, thing: nn.Module | nn.Parameter) -> str:
        """Return the first name of a module or parameter in the user's own model."""
        return self._names[thing][0]

    def shape(self, parameter: nn.Parameter) -> torch.Size:
        """Return the shape of the parameter in the unsharded model."""
        return self._full_shape(parameter)

    def inputs(self, layer: nn.Module) -> int:
        """Return how many features a dense layer reads, or channels per group of a convolution."""
        return self.shape(own(layer, "weight"))[1 - units_dim(layer)]

    def outputs(self, layer: nn.Module) -> int:
        """Return how many features or channels a layer writes."""
        return self.shape(own(layer, "weight"))[units_dim(layer)]

    def is_norm(self, module: nn.Module) -> bool:
        """Say whether a module normalises: one of torch's, one that keeps means and variances, or one of a known form.

        That is a module without children whose parameters are a vector `weight` and, if it has more, a `bias` like it.
        """
        if isinstance(module, _NORMS) or is_batch_norm(module):
            return True
        if is_activation(module) or module._modules or is_layer(module):
            return False
        own = {name: parameter for name, parameter in module._parameters.items() if parameter is not None}
        vectors = all(len(self.shape(parameter)) == 1 for parameter in own.values())
        return "weight" in own and own.keys() <= {"weight", "bias"} and vectors

    def member(
        self,
        parameter: nn.Parameter,
        dims: int | tuple[int, ...],
        unit_of: Tensor,
        role: Role,
        *,
        masked: bool,
        scored: bool,
        output_dim: int = 0,
    ) -> MemberTarget:
        """Return the member that a parameter is, under the name that the user's model gives it."""
        along = (dims,) if isinstance(dims, int) else dims
        return MemberTarget(
            WeightTarget(self.name(parameter), parameter, output_dim), along, unit_of, masked, scored, role
        )

    def adapters_of(self, layer: nn.Module) -> list[nn.Module]:
        """Return the modules of PEFT that adapt a layer."""
        return self._adapters.get(layer, [])

    def refuse(self, parameter: nn.Parameter, why: str) -> None:
        """Say why the masks of a parameter would not do what they are for."""
        self._refused[parameter] = why

    def check(self, targets: Sequence[UnitTarget]) -> None:
        """Raise ValueError for the first of the layers whose masks would not do what they are for."""
        for member in (member for target in targets for member in target.members if member.masked):
            if (why := self._refused.get(member.weight.parameter)) is not None:
                raise ValueError(why)

    def masked_once(self, targets: Sequence[UnitTarget]) -> list[UnitTarget]:
        """Return the layers without those whose masked parameters, being tied, an earlier layer masks already."""
        taken: set[nn.Parameter] = set()
        kept = []
        for target in targets:
            masked = {member.weight.parameter for member in target.members if member.masked}
            if not masked & taken:
                kept.append(target)
                taken |= masked
        return kept

    def choose(
        self,
        targets: Sequence[UnitTarget],
        default: Callable[[UnitTarget], bool],
        include: Sequence[str] | None,
        exclude: Sequence[str] | None,
        kind: str,
    ) -> list[UnitTarget]:
        """Return the layers that the patterns choose, by layer name or name of a masked parameter.

        Raises:
            ValueError: A pattern matches none of the layers.
        """
        names = {target.name: self._names_of(target) for target in targets}
        # Near names are sought among all: those of the layers come first.
        every_name = list(dict.fromkeys(name for group in ([*names], *names.values()) for name in group))
        check_patterns([*(include or ()), *(exclude or ())], every_name, f"{kind} and none of its weights", "blocks.*")
        return [
            target
            for target in targets
            if (matches(names[target.name], include) if include else default(target))
            and not (exclude and matches(names[target.name], exclude))
        ]

    def summary(self) -> str:
        """Return the modules that hold dense layers or convolutions, for errors that say what was there instead."""
        holders: dict[str, list[str]] = {}
        for module in self.modules():
            if is_layer(module):
                parent, _, child = self.name(module).rpartition(".")
                holders.setdefault(parent, []).append(child)
        if not holders:
            return f"{type(self.model).__name__} holds no Linear, Conv1D or convolution at all"
        described = [f"{parent or 'the model itself'} ({', '.join(names[:6])})" for parent, names in holders.items()]
        return f"{type(self.model).__name__} holds dense layers in: {'; '.join(described[:6])}"

    def _names_of(self, target: UnitTarget) -> list[str]:
        modules = [names for names in self._names.values() if target.name in names]
        masked = [self._names[member.weight.parameter] for member in target.members if member.masked]
        return [target.name, *(name for names in modules + masked for name in names)]


def child(module: nn.Module, path: str) -> nn.Module | None:
    """Return the module at `path` below `module`, past wrappers; None where there is none.

    Attribute access would not do: compiled and wrapped modules answer for the module inside.
    """
    found: nn.Module | None = module
    for part in path.split("."):
        found = found._modules.get(part) if found is not None else None
        found = innermost(found) if found is not None else None  # not by its truth: a module may have a length
    return found


def chain(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the children of `module` past wrappers, in order, those of Sequentials within a Sequential in place."""
    links: list[tuple[str, nn.Module]] = []
    for name in module._modules:
        link = child(module, name)
        if isinstance(module, nn.Sequential) and isinstance(link, nn.Sequential):
            links += chain(link)
        elif link is not None and all(link is not other for _, other in links):
            links.append((name, link))
    return links


def is_dense(module: nn.Module | None) -> TypeGuard[nn.Module]:
    """Say whether the module is a Linear or transformers' Conv1D whose weight is a parameter of its own."""
    return (isinstance(module, nn.Linear) or is_conv1d(module)) and _has_weight(module)


def is_convolution(module: nn.Module | None) -> TypeGuard[nn.Module]:
    """Say whether the module is a convolution whose weight is a parameter of its own; transposed, of a single group.

    Of a transposed one with several groups no slice of the weight is an output channel.
    """
    known = isinstance(module, CONVOLUTIONS) or (isinstance(module, _TRANSPOSED) and module.groups == 1)
    return known and _has_weight(module)


def is_depthwise(module: nn.Module | None) -> bool:
    """Say whether the module is a convolution that reads one channel for each that it writes."""
    return isinstance(module, CONVOLUTIONS) and 1 < module.groups == module.in_channels


def is_batch_norm(module: nn.Module) -> bool:
    """Say whether the module keeps means and variances of batches; frozen ones have scale and shift in buffers."""
    keeps = {"running_mean", "running_var"} <= module._buffers.keys()
    return keeps and not isinstance(module, _InstanceNorm)


def is_layer(module: nn.Module | None) -> TypeGuard[nn.Module]:
    """Say whether the module is a dense layer or a convolution."""
    return is_dense(module) or is_convolution(module)


def has(module: nn.Module, *names: str) -> bool:
    """Say whether the module has parameters of its own under all these names, not buffers and not None."""
    return all(module._parameters.get(name) is not None for name in names)


def own(module: nn.Module, name: str) -> nn.Parameter:
    """Return a parameter that the module has itself."""
    parameter = module._parameters[name]
    assert parameter is not None
    return parameter


def units_dim(layer: nn.Module) -> int:
    """Return the dimension of a layer's weight that counts its outputs.

    transformers' Conv1D stores (in, out) and transposed convolutions (in, out, ...).
    """
    return 1 if is_conv1d(layer) or isinstance(layer, _TRANSPOSED) else 0


def blocks(size: int, units: int) -> Tensor:
    """Return the unit of each of `size` indices where units are equal blocks of neighbours, int64, shape (size,)."""
    return torch.arange(size, device="cpu") // (size // units)


def _has_weight(module: nn.Module | None) -> bool:
    # Quantized weights are codes: neither scores nor zeros mean anything there.
    return module is not None and has(module, "weight") and own(module, "weight").is_floating_point()
