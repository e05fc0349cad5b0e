"""Attention heads as units, found by the attributes that attention modules share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from emp_callbacks.targets.adapter_members import adapter_columns
from emp_callbacks.targets.unit_search import UnitSearch, blocks, child, has, is_layer, own, units_dim
from emp_callbacks.targets.units import MemberTarget, UnitTarget


class _Layout(NamedTuple):
    """Where a family of attention modules keeps its projections.

    Attributes:
        inputs: Path of each input projection and which of query, key and value its rows hold, in order.
        output: Path of the output projection.
    """

    inputs: tuple[tuple[str, str], ...]
    output: str


def _separate(query: str, key: str, value: str, output: str) -> _Layout:
    return _Layout(((query, "q"), (key, "k"), (value, "v")), output)


_LAYOUTS = (
    _Layout((("qkv", "qkv"),), "proj"),  # timm: ViT, DeiT, Swin, BEiT, EVA, ...
    *(_separate("q_proj", "k_proj", "v_proj", out) for out in ("o_proj", "out_proj", "proj")),  # Llama, OPT, timm EVA
    *(_separate("q", "k", "v", out) for out in ("proj", "o")),  # timm CaiT, T5
    _Layout((("q", "q"), ("kv", "kv")), "proj"),  # timm PVT, Twins
    _Layout((("qk", "qk"), ("v", "v")), "proj"),  # timm ConViT
    _separate("wq", "wk", "wv", "proj"),  # timm CrossViT
    _Layout((("q_attn", "q"), ("c_attn", "kv")), "c_proj"),  # GPT-2's cross attention
    _Layout((("c_attn", "qkv"),), "c_proj"),  # GPT-2
    _Layout((("qkv_proj", "qkv"),), "o_proj"),  # Phi-3
    *(_separate(f"{own}.query", f"{own}.key", f"{own}.value", "output.dense") for own in ("self", "attention")),  # BERT
    _separate("q_lin", "k_lin", "v_lin", "out_lin"),  # DistilBERT
)
_HEAD_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads", "groups")


def attention_heads(
    model: nn.Module,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    full_shape: Callable[[nn.Parameter], torch.Size] = lambda parameter: parameter.shape,
) -> list[UnitTarget]:
    """Return the attention modules of a model with their heads as units, in the model's own order.

    Known by their attributes: timm's attentions with a fused `qkv` or `q`/`k`/`v` and `proj`, GPT-2's
    (`c_attn`, `c_proj`), Llama's and its relatives' (`q_proj`, `k_proj`, `v_proj` and `o_proj` or `out_proj`), BERT's
    (`self.query`, ..., `output.dense`), T5's, DistilBERT's, Phi-3's and `nn.MultiheadAttention`.

    A pruned head's columns of the output projection are zero, so that it adds exactly nothing, whichever kernel
    computes the attention. With grouped queries a unit is a key/value head and all query heads that read it.

    Args:
        model: Any module; shared modules count once, under their first name.
        include: Glob patterns on names of attention modules or of their output projection's weight: only these.
        exclude: The same, to leave out.
        full_shape: Gives the shape that a parameter has in the unsharded model.

    Returns:
        One `UnitTarget` per attention. Members: the output projection's columns (masked and scored, "output") and the
        rows of query, key and value projections (scored, "input"); where PEFT adapts the output projection, the part
        of its adapters that reads the heads (masked, "adapter"). Observed: the output projection's input, except
        with `nn.MultiheadAttention`, whose output projection runs no hooks.

    Raises:
        ValueError: The model has no such attention, a pattern matches none, nothing is left, or the projections of
            an attention do not divide into its heads.
    """
    search = UnitSearch(model, full_shape)
    found = [target for module in search.modules() if (target := _heads_of(search, module)) is not None]
    if not found:
        raise ValueError(
            "no attention with heads was found: looked for nn.MultiheadAttention and for modules that hold "
            f"{'; '.join(_described(layout) for layout in _LAYOUTS[:4])} and the like, with a number of heads; "
            f"{search.summary()}"
        )
    chosen = search.choose(search.masked_once(found), lambda _: True, include, exclude, "attention")
    if not chosen:
        raise ValueError(f"exclude={exclude} leaves no attention of {', '.join(target.name for target in found[:6])}")
    search.check(chosen)
    return chosen


def projections(module: nn.Module) -> list[nn.Module]:
    """Return the dense layers or convolutions that are the projections of this attention; none if it is not one."""
    if isinstance(module, nn.MultiheadAttention):
        return [out] if (out := child(module, "out_proj")) is not None else []
    layout = _layout(module)
    if layout is None:
        return []
    return [part for path in (*(path for path, _ in layout.inputs), layout.output) if (part := child(module, path))]


def _described(layout: _Layout) -> str:
    return f"{', '.join(path for path, _ in layout.inputs)} and {layout.output}"


def _layout(module: nn.Module) -> _Layout | None:
    for layout in _LAYOUTS:
        if all(is_layer(child(module, path)) for path in (*(path for path, _ in layout.inputs), layout.output)):
            return layout
    return None


def _heads_of(search: UnitSearch, module: nn.Module) -> UnitTarget | None:
    if isinstance(module, nn.MultiheadAttention):
        return _multihead(search, module)
    layout = _layout(module)
    if layout is None:
        return None
    output = child(module, layout.output)
    assert output is not None
    columns = search.inputs(output)
    heads = _head_count(module, columns)
    if heads is None:
        return None
    inputs = [layer for path, _ in layout.inputs if (layer := child(module, path)) is not None]
    widths = [
        _widths(search, module, layer, parts, columns) for layer, (_, parts) in zip(inputs, layout.inputs, strict=True)
    ]
    groups = heads if _heads_are_outermost(module) else _value_heads(widths, columns, heads)
    name = search.name(module)
    if not groups or any(width % groups for width in (columns, *(w for held in widths for w in held))):
        raise ValueError(
            f"attention {name!r} has {heads} heads, which do not divide its projections: query, key and value of "
            f"widths {widths}, {columns} inputs of {layout.output!r}; heads of this kind are not known here"
        )
    unit_of = _output_units(module, columns, groups)
    members = [_columns(search, output, unit_of), *adapter_columns(search, output, unit_of)]
    for layer, held in zip(inputs, widths, strict=True):
        members.append(_rows(search, layer, torch.cat([blocks(width, groups) for width in held])))
    return UnitTarget(name, groups, tuple(members), None if _heads_are_minor(module) else (output, "input"))


def _head_count(module: nn.Module, columns: int) -> int | None:
    """Return the number of query heads that the module or its config states; None where neither does."""
    for holder in (module, child(module, "self"), child(module, "attention")):
        for name in _HEAD_COUNTS:
            if isinstance(count := getattr(holder, name, None), int):
                return count
    if isinstance(head_dim := getattr(module, "head_dim", None), int):
        return columns // head_dim
    count = getattr(getattr(module, "config", None), "num_attention_heads", None)
    return count if isinstance(count, int) else None


def _widths(search: UnitSearch, module: nn.Module, layer: nn.Module, parts: str, columns: int) -> list[int]:
    """Return the number of rows of each part that a projection holds, of which each lies head after head."""
    rows = search.outputs(layer)
    if parts == "qkv" and _heads_are_outermost(module):
        return [rows]
    if parts == "qkv" and not _asks_from_outside(module):
        return [columns, (rows - columns) // 2, (rows - columns) // 2]
    count = min(len(parts), 2)
    return [rows // count] * count


def _value_heads(widths: list[list[int]], columns: int, heads: int) -> int:
    """Return the number of value heads: as much narrower as the values are than the outputs, as fewer are they."""
    groups, left = divmod(heads * widths[-1][-1], columns)
    return 0 if left else groups


def _output_units(module: nn.Module, columns: int, groups: int) -> Tensor:
    if _heads_are_minor(module):
        return torch.arange(columns, device="cpu") % groups
    return blocks(columns, groups)


def _heads_are_outermost(module: nn.Module) -> bool:
    """Say whether a fused projection holds query, key and value of one head, then of the next.

    timm's MaxViT can, TinyViT and EfficientFormer do (`key_dim` and `val_dim`), transformers' GPT-BigCode does
    where every head has its own key and value.
    """
    return (
        getattr(module, "head_first", False) is True
        or getattr(module, "multi_query", None) is False
        or (hasattr(module, "key_dim") and hasattr(module, "val_dim"))
    )


def _asks_from_outside(module: nn.Module) -> bool:
    """Say whether `qkv` holds keys and values only: timm's GCViT, whose queries are the whole image's."""
    return getattr(module, "use_global", False) is True


def _heads_are_minor(module: nn.Module) -> bool:
    """Say whether the output projection reads the first feature of every head, then the second: timm's NesT."""
    return type(module).__module__.endswith(".nest")


def _multihead(search: UnitSearch, module: nn.MultiheadAttention) -> UnitTarget:
    out, heads = child(module, "out_proj"), module.num_heads
    assert out is not None
    unit_of = blocks(search.inputs(out), heads)
    members = [_columns(search, out, unit_of), *adapter_columns(search, out, unit_of)]
    if has(module, "in_proj_weight"):
        inputs = [("in_proj_weight", 3)]
    else:
        inputs = [("q_proj_weight", 1), ("k_proj_weight", 1), ("v_proj_weight", 1)]
    for path, parts in inputs:
        parameter = own(module, path)
        unit_of = blocks(search.shape(parameter)[0] // parts, heads).repeat(parts)
        members.append(search.member(parameter, 0, unit_of, "input", masked=False, scored=True))
    return UnitTarget(search.name(module), heads, tuple(members), None)


def _columns(search: UnitSearch, layer: nn.Module, unit_of: Tensor) -> MemberTarget:
    dim = units_dim(layer)
    return search.member(own(layer, "weight"), 1 - dim, unit_of, "output", masked=True, scored=True, output_dim=dim)


def _rows(search: UnitSearch, layer: nn.Module, unit_of: Tensor) -> MemberTarget:
    dim = units_dim(layer)
    return search.member(own(layer, "weight"), dim, unit_of, "input", masked=False, scored=True, output_dim=dim)
