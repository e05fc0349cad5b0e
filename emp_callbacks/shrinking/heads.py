"""What the pruned heads of an attention take with them, or why they stay."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from emp_callbacks.shrinking.report import ShrunkLayer
from emp_callbacks.shrinking.surgery import Surgery, axes_of, cut_of
from emp_callbacks.targets.attention_parts import Attention, per_head
from emp_callbacks.targets.heads import find_attention
from emp_callbacks.targets.shapes import own_shape
from emp_callbacks.targets.unit_search import UnitSearch, is_layer
from emp_callbacks.targets.units import UnitTarget

__all__ = ["cut_heads"]

# What attention modules call a multiple of the number of their heads, of their keys and values, and heads per key.
_QUERY_SIZES = {"num_heads", "num_attention_heads", "n_heads", "n_head", "heads"} | {
    *("attn_dim", "all_head_size", "split_size", "attention_dim", "inner_dim", "bias_shape")
}
_KEY_SIZES = {"num_key_value_heads", "num_kv_heads", "kv_dim"}
_READERS = {"num_key_value_groups", "num_kv_groups"}


class _StaysError(Exception):
    """Why the heads of an attention stay."""


def cut_heads(
    model: nn.Module, target: UnitTarget, pruned: Tensor, cuttable: set[nn.Module], surgery: Surgery
) -> ShrunkLayer:
    """Add to `surgery` what the pruned heads of one attention take with them; one head stays in any case.

    Args:
        model: The model.
        target: The attention.
        pruned: Bool, shape (heads,).
        cuttable: Modules that can be cut.
        surgery: Is changed, unless heads stay for a reason that is known before they are cut.
    """
    left = ~pruned
    if pruned.all():  # an attention without heads is none
        left[0] = True
    search = UnitSearch(model, own_shape)
    found = find_attention(search, model.get_submodule(target.name))
    assert found is not None
    try:
        cuts = list(_cuts(model, search, found, left, cuttable))
    except _StaysError as why:
        return ShrunkLayer(target.name, target.units, int(pruned.sum()), 0, str(why))
    for module, axis, kept in cuts:
        surgery.setdefault(search.name(module), {})[axis] = cut_of(kept)
    reason = "an attention keeps one head" if pruned.all() else None
    return ShrunkLayer(target.name, target.units, int(pruned.sum()), int((~left).sum()), reason)


def _cuts(
    model: nn.Module, search: UnitSearch, found: Attention, left: Tensor, cuttable: set[nn.Module]
) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Yield module, axis and what is left of it, for all that the heads take with them.

    Raises:
        _StaysError: The attention cannot have fewer heads.
    """
    if found.layout.fixed:
        raise _StaysError(found.layout.fixed)
    kept_or_none = torch.cat([left, torch.tensor([True])])  # the last is for -1: of no head, always kept
    yield found.output, _layer_axis(search, found.output, cuttable, "inputs"), left[found.columns]
    for (layer, tensor, dim, _), unit_of, _ in found.inputs:
        axis = _layer_axis(search, layer, cuttable, "outputs") if is_layer(layer) else f"{tensor}:{dim}"
        yield layer, axis, kept_or_none[unit_of]
    holders = Counter(p for module in model.modules() for p in module._parameters.values() if p is not None)
    for module, tensor, dim, unit_of in per_head(search, found):
        if (parameter := module._parameters.get(tensor)) is not None and holders[parameter] > 1:
            raise _StaysError(f"its {tensor!r} is shared with other layers")
        axes = [axis for axis, known in axes_of(module).items() if known.dims.get(tensor) == dim]
        yield module, axes[0] if axes else f"{tensor}:{dim}", kept_or_none[unit_of]
    yield from ((part, f"={name}", left) for part, name in _sizes(found))
    yield found.module, "heads", left


def _sizes(found: Attention) -> Iterator[tuple[nn.Module, str]]:
    """Yield the attributes of an attention and its parts that are a multiple of its heads."""
    names = _QUERY_SIZES | (_READERS if found.shares_keys else _KEY_SIZES) | {*found.layout.sizes}
    for part in found.module.modules():
        for name in names & vars(part).keys():
            held = vars(part)[name]
            size = held[-1] if isinstance(held, tuple) and held else held
            if isinstance(size, int) and size and size % found.units == 0:
                yield part, name


def _layer_axis(search: UnitSearch, layer: nn.Module, cuttable: set[nn.Module], axis: str) -> str:
    if layer not in cuttable:
        kind = type(layer).__name__
        raise _StaysError(f"{search.name(layer)!r}, a {kind}, is of an unknown kind or its weight is tied to another's")
    if axis not in axes_of(layer):
        raise _StaysError(f"{search.name(layer)!r} cannot be cut along its {axis}")
    return axis
