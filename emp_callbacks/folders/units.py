"""What of a model is in memory at a time: its blocks, and the large layers beside them."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import NamedTuple

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

__all__ = ["Unit", "find_units", "merged", "split"]

LARGE = 1 << 22  # parameters of a layer beside the blocks that is loaded when it is called


class Unit(NamedTuple):
    """A part of the model whose weights are loaded and dropped together.

    Attributes:
        name: Name of the module.
        module: The module.
    """

    name: str
    module: nn.Module

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Unit) and self.module is other.module

    def __hash__(self) -> int:
        return id(self.module)


def find_units(model: nn.Module, chosen: Collection[nn.Parameter] = ()) -> list[Unit]:
    """Return the units of a model, none inside another.

    They are the entries of its outermost lists of modules; of what is beside them, each module that itself holds
    parameters that are chosen, or many.

    Args:
        model: The model.
        chosen: Parameters that are pruned.
    """
    return list(dict.fromkeys(_found("", model, chosen)))  # a module may have several names, as T5's embedding has


def _found(name: str, module: nn.Module, chosen: Collection[nn.Parameter]) -> Iterator[Unit]:
    if _is_list(module):
        yield from (Unit(_join(name, key), entry) for key, entry in module.named_children() if _holds_any(entry))
        return
    # Of a parametrised layer the parameters lie in a module inside, which is not called by itself.
    own = list(module.parameters(recurse=is_parametrized(module)))
    listed = any(map(_is_list, module.modules()))
    if name and not listed and any(one in chosen or one.numel() >= LARGE for one in own):
        yield Unit(name, module)
        return
    for key, child in module.named_children():
        yield from _found(_join(name, key), child, chosen)


def _is_list(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList) and not isinstance(module, ParametrizationList)


def _holds_any(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _join(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def split(units: list[Unit], unit: Unit) -> list[Unit]:
    """Return the units with one of them replaced by what it holds."""
    at = units.index(unit)
    inside = [Unit(_join(unit.name, key), child) for key, child in unit.module.named_children() if _holds_any(child)]
    return [*units[:at], *inside, *units[at + 1 :]]


def merged(model: nn.Module, units: list[Unit], unit: Unit) -> list[Unit]:
    """Return the units with one of them, and those beside it, replaced by the module that they are in.

    Raises:
        NotImplementedError: That is the model.
    """
    parent = unit.name.rpartition(".")[0]
    while isinstance(model.get_submodule(parent), (nn.ModuleList, nn.Sequential)):
        parent = parent.rpartition(".")[0]
    if not parent:
        raise NotImplementedError(
            f"{unit.name} is called more than once in a forward pass, and is in nothing that is called once: it cannot "
            "be pruned block by block; exclude it, or use a criterion that reads no inputs, such as magnitude"
        )
    inside = {id(module) for module in model.get_submodule(parent).modules()}
    apart = [one for one in units if id(one.module) not in inside]
    at = units.index(unit) - sum(id(one.module) in inside for one in units[: units.index(unit)])
    return [*apart[:at], Unit(parent, model.get_submodule(parent)), *apart[at:]]
