"""How a shrunk model loads without this package: the sizes that its own library can state."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain, combinations
from typing import Any, NamedTuple

import torch
from torch import nn

from emp_callbacks.shrinking import ShrinkReport

__all__ = ["HostLoading", "host_loading", "same_shapes"]

_FIELDS = 6  # of a configuration that are tried in all combinations


class HostLoading(NamedTuple):
    """How the model's own library builds the shrunk model.

    Attributes:
        call: What to write, with FILE for the file and FOLDER for its folder.
        config: The configuration of a transformers model, else None.
        arguments: What timm's `create_model` is given.
    """

    call: str
    config: Any = None
    arguments: dict[str, Any] = {}  # noqa: RUF012


def host_loading(model: nn.Module, shrunk: ShrinkReport) -> HostLoading | None:
    """Return how a transformers or timm model that was shrunk is built by its own library; None where it cannot be.

    Sizes that the library's configuration or arguments can state are set, and the model is built from them, on no
    device: if names and shapes are those of the shrunk model, that is the way.
    """
    if hasattr(model, "config") and hasattr(model.config, "to_dict") and type(model).__module__.startswith("transfor"):
        return _transformers(model, shrunk)
    architecture = (getattr(model, "pretrained_cfg", None) or {}).get("architecture")
    return _timm(model, shrunk, architecture) if architecture else None


class _Size(NamedTuple):
    """A count in the dense model and what is left of it, the same in every layer."""

    of: int
    left: int


def _sizes(shrunk: ShrinkReport) -> tuple[set[_Size], set[_Size]]:
    """Return the sizes of attentions (in heads) and of layers (in neurons)."""
    heads, neurons = set[_Size](), set[_Size]()
    for layer in shrunk.layers:
        sizes = heads if "heads" in shrunk.surgery.get(layer.name, {}) else neurons
        if layer.removed:
            sizes.add(_Size(layer.units, layer.units - layer.removed))
    return heads, neurons


def same_shapes(model: nn.Module, build: Callable[[], nn.Module]) -> bool:
    """Return whether what is built has the names and shapes of the model's tensors."""
    try:
        with torch.device("meta"):
            built = build()
    except (ValueError, TypeError, RuntimeError, AssertionError, NotImplementedError):
        return False  # such sizes are refused
    shapes = [{name: value.shape for name, value in one.state_dict().items()} for one in (model, built)]
    return shapes[0] == shapes[1]


# ---- transformers --------------------------------------------------------------------------------------------------


def _transformers(model: nn.Module, shrunk: ShrinkReport) -> HostLoading | None:
    dense: Any = model.config
    kind = type(model).__name__
    changes = list(_changes(dense, *_sizes(shrunk)))[:_FIELDS]
    for chosen in chain.from_iterable(combinations(changes, count) for count in range(len(changes), -1, -1)):
        config = _changed(dense, chosen)
        if config is not None and same_shapes(model, partial(type(model), config)):
            return HostLoading(f"transformers.{kind}.from_pretrained('FOLDER')", config)
    return None


def _changes(config: Any, heads: set[_Size], neurons: set[_Size]) -> Iterator[tuple[str, Any]]:
    """Yield fields of a configuration with other values that may state the sizes that are left."""
    for field, value in config.to_dict().items():
        counts_heads = isinstance(value, int) and "head" in field and field != "head_dim"
        for size in heads if counts_heads else neurons:
            if counts_heads and value % size.of == 0:
                yield field, value // size.of * size.left
            elif not counts_heads and (value == size.of or (field == "n_inner" and value is None)):
                yield field, size.left
            elif field == "mlp_ratio":
                yield field, value * size.left / size.of


def _changed(dense: Any, changes: tuple[tuple[str, Any], ...]) -> Any:
    config = copy.deepcopy(dense)
    width, heads = getattr(dense, "hidden_size", None), getattr(dense, "num_attention_heads", None)
    if hasattr(dense, "head_dim") and width and heads:
        config.head_dim = dense.head_dim or width // heads  # not to follow from the number of heads
    for field, value in changes:
        setattr(config, field, value)
    try:
        return type(config)(**config.to_dict())  # checks the sizes against each other, as loading does
    except (ValueError, TypeError) as error:
        if changes:
            return None
        raise error


# ---- timm ----------------------------------------------------------------------------------------------------------


def _timm(model: nn.Module, shrunk: ShrinkReport, architecture: str) -> HostLoading | None:
    import timm

    heads, neurons = _sizes(shrunk)
    if heads or len(neurons) > 1:  # timm has no argument for the width of a head
        return None
    arguments: dict[str, Any] = {}
    for size in neurons:
        widths = {
            getattr(model.get_submodule(layer.name), "in_features", 0)
            for layer in shrunk.layers
            if layer.units == size.of
        }
        if len(widths) != 1 or 0 in widths:
            return None
        arguments["mlp_ratio"] = size.left / widths.pop()
    for name, usual in (("num_classes", 1000), ("in_chans", 3)):
        if (value := getattr(model, name, usual)) != usual:
            arguments[name] = value
    if not same_shapes(model, partial(timm.create_model, architecture, **arguments)):
        return None
    told = [repr(architecture), *(f"{name}={value!r}" for name, value in arguments.items())]
    return HostLoading(f"model = timm.create_model({', '.join(told)})", arguments=arguments)
