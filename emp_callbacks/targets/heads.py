"""Attention heads as units, in every attention whose layout is known."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from torch import nn

from emp_callbacks.blame import warn_the_user
from emp_callbacks.targets.adapter_members import adapter_columns
from emp_callbacks.targets.attention_layout import registered_layout
from emp_callbacks.targets.attention_parts import (
    Attention,
    NotUnderstoodError,
    attention,
    is_like_attention,
    layout_of,
    per_head,
    projections,
)
from emp_callbacks.targets.head_outputs import HeadOutputs
from emp_callbacks.targets.names import few, matches
from emp_callbacks.targets.shapes import FullShape, own_shape
from emp_callbacks.targets.unit_search import UnitSearch, has, is_layer, own, units_dim
from emp_callbacks.targets.units import UnitTarget

__all__ = ["attention_heads", "find_attention", "outputs_of", "projections"]

_LISTED = 6  # kinds of attentions that are left out, in one message
_UNKNOWN = "how its heads lie is not known"
_HOW = "emp_callbacks.register_attention describes one that is not known"


def attention_heads(
    model: nn.Module,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    full_shape: FullShape = own_shape,
) -> list[UnitTarget]:
    """Return the attention modules of a model with their heads as units, in the model's own order.

    Known are `nn.MultiheadAttention`, the attentions of timm and transformers, those whose projections have the usual
    names (`qkv`, `q_proj`, `to_q`, `Wqkv`, ...), and what `register_attention` describes. What looks like an attention
    and is not known is left out, with a warning that names it.

    A pruned head's columns of the output projection are zero, so that it adds exactly nothing, whichever kernel
    computes the attention. With grouped queries a unit is a key/value head and all query heads that read it; where all
    query heads read the same key and value, it is a query head.

    Args:
        model: Any module; shared modules count once, under their first name.
        include: Glob patterns on names of attention modules or of their output projection's weight: only these.
        exclude: The same, to leave out.
        full_shape: Gives the shape that a parameter has in the unsharded model.

    Returns:
        One `UnitTarget` per attention. Members: the output projection's columns (masked and scored, "output") and the
        rows of query, key and value projections (scored, "input"); what the attention holds for each head besides
        ("per_head"); where PEFT adapts the output projection, the part of its adapters that reads the heads (masked,
        "adapter"). Observed: the output projection's input, except where the module only reads its weight, as
        `nn.MultiheadAttention` does. `heads` says where their outputs pass by in any case.

    Raises:
        ValueError: The model has no attention whose heads are known, a registered layout does not fit its module, a
            pattern matches none, or nothing is left.
    """
    search = UnitSearch(model, full_shape)
    found: dict[nn.Module, UnitTarget] = {}
    left: dict[nn.Module, str] = {}
    for module in search.modules():
        try:
            if (one := find_attention(search, module)) is not None:
                found[module] = _target(search, one)
        except NotUnderstoodError as why:
            left[module] = str(why)
    told = _left_out(search, found, left, exclude or ())
    if not found:
        raise ValueError(
            "no attention with heads was found: looked for nn.MultiheadAttention, for modules that hold qkv and proj, "
            f"q_proj, k_proj, v_proj and o_proj, and the like, and for those of register_attention; {told}"
            f"{search.summary()}"
        )
    if told and not include:
        warn_the_user(f"{told}{_HOW}")
    chosen = search.choose(search.masked_once(list(found.values())), lambda _: True, include, exclude, "attention")
    if not chosen:
        names = [target.name for target in found.values()]
        raise ValueError(f"exclude={exclude} leaves no attention of {', '.join(names[:6])}")
    search.check(chosen)
    return chosen


def outputs_of(targets: Sequence[UnitTarget]) -> list[HeadOutputs]:
    """Return where the outputs of the heads of some attentions pass by, in order.

    Raises:
        ValueError: Something reads them beside the output projection.
    """
    for target in targets:
        if any(member.role == "adapter" for member in target.members):
            raise ValueError(
                f"the output projection of {target.name!r} has adapters of PEFT, which read the heads beside it: merge "
                f"them (merge_and_unload), or exclude={[target.name]!r}"
            )
    return [target.heads for target in targets if target.heads is not None]


def find_attention(search: UnitSearch, module: nn.Module) -> Attention | None:
    """Return the parts of an attention module; None if it is none.

    Raises:
        NotUnderstoodError: It looks like one, and its heads are not known.
        ValueError: The layout that is registered for it does not fit it.
    """
    try:
        layout = layout_of(module)
        return attention(search, module, layout) if layout is not None else None
    except NotUnderstoodError as why:
        if registered_layout(module) is None:
            raise
        raise ValueError(
            f"the layout that is registered for {type(module).__name__} does not fit {search.name(module)!r}: {why}"
        ) from None


def _target(search: UnitSearch, one: Attention) -> UnitTarget:
    rows = units_dim(one.output)
    members = [
        search.member(
            own(one.output, "weight"), 1 - rows, one.columns, "output", masked=True, scored=True, output_dim=rows
        ),
        *adapter_columns(search, one.output, one.columns),
    ]
    members += [
        search.member(where.parameter, where.dim, unit_of, "input", masked=False, scored=True, output_dim=where.dim)
        for where, unit_of, _ in one.inputs
    ]
    members += [
        search.member(own(holder, tensor), dim, unit_of, "per_head", masked=False, scored=False)
        for holder, tensor, dim, unit_of in per_head(search, one)
        if has(holder, tensor)
    ]
    name, shown = search.name(one.module), one.layout.columns == "heads" and one.layout.calls_output
    outputs = HeadOutputs(name, one.module, one.output, one.columns, one.units, one.layout.calls_output)
    return UnitTarget(name, one.units, tuple(members), (one.output, "input") if shown else None, heads=outputs)


def _left_out(
    search: UnitSearch, found: Collection[nn.Module], left: Mapping[nn.Module, str], exclude: Sequence[str]
) -> str:
    """Return a sentence on the attentions whose heads are not known, "" if there are none; same kinds told once."""
    known = {part for module in (*found, *left) for part in module.modules()}
    like = [module for module in search.modules() if module not in known and is_like_attention(search, module)]
    inner = {*found, *left, *like}
    holders = {one for one in search.modules() if any(part in inner and part is not one for part in one.modules())}
    reasons = {**left, **{module: _UNKNOWN for module in like if module not in holders}}
    kinds: dict[tuple[str, str], list[str]] = {}
    for module, why in reasons.items():
        name = search.name(module)
        if not (exclude and matches([name], exclude)):
            kinds.setdefault((f"{type(module).__name__} of {_held(module)}", why), []).append(name)
    told = [f"{few(names)} ({kind}): {why}" for (kind, why), names in list(kinds.items())[:_LISTED]]
    rest = f"; and {len(kinds) - _LISTED} other kinds" if len(kinds) > _LISTED else ""
    return f"left out of the heads: {'; '.join(told)}{rest}; " if told else ""


def _held(module: nn.Module) -> str:
    """Return the names of the layers, else of the parameters, that a module holds."""
    layers = [name for name, part in module.named_modules() if name and is_layer(part)]
    return ", ".join((layers or [name for name, _ in module.named_parameters()])[:6])
