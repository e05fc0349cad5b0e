"""Whether the heads of a model's attentions lie where their layouts say, tried on an example."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from emp_callbacks.targets.attention_parts import Attention, NotUnderstoodError
from emp_callbacks.targets.heads import find_attention
from emp_callbacks.targets.shapes import own_shape
from emp_callbacks.targets.unit_search import UnitSearch


class AttentionCheck(NamedTuple):
    """What the rows of an attention's heads were seen to change in what its output projection reads.

    Attributes:
        name: Name of the module.
        heads: Number of heads, as `target="heads"` counts them.
        wrong: Heads whose rows do not change exactly their own columns: the layout is wrong.
        mixed: Heads that are not wrong, their values being their own, but whose queries and keys also act on others
            (talking heads, norms over all heads): pruned, such a head adds nothing, but it cannot be cut out.
        ran: Whether the module ran on the example, and so was checked.
    """

    name: str
    heads: int
    wrong: tuple[int, ...]
    mixed: tuple[int, ...]
    ran: bool


@torch.no_grad()
def check_attention(model: nn.Module, *args: Any, **kwargs: Any) -> list[AttentionCheck]:
    """Try on an example call whether the heads of each attention lie where its layout says.

    One after the other, the rows of each head in the query, key and value projections are changed: of what the output
    projection reads, exactly the columns of this head must change then. The model is left as it was; it runs two or
    three times per head, in evaluation mode.

    Args:
        model: A plain model with weights that are not all zero.
        args: Positional arguments of the example call.
        kwargs: Its keyword arguments.

    Returns:
        One result per attention, without those that do not call their output projection (`nn.MultiheadAttention`).

    Raises:
        ValueError: A registered layout does not fit its module.

    Examples:
        >>> class Attention(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.num_heads = 2
        ...         self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)
        ...     def forward(self, x):
        ...         q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        ...         return self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        >>> [(check.heads, check.wrong) for check in check_attention(nn.Sequential(Attention()), torch.ones(1, 3, 8))]
        [(2, ())]
    """
    search = UnitSearch(model, own_shape)
    found = []
    for module in search.modules():
        try:
            one = find_attention(search, module)
        except NotUnderstoodError:
            continue
        if one is not None and one.layout.calls_output:
            found.append(one)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        return [_check(model, search.name(one.module), one, args, kwargs) for one in found]
    finally:
        for module, training in modes:
            module.training = training


def _check(
    model: nn.Module, name: str, one: Attention, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> AttentionCheck:
    before, normed = _read(model, one, args, kwargs)
    if before is None:
        return AttentionCheck(name, one.units, (), (), ran=False)
    wrong: list[int] = []
    mixed: list[int] = []
    for head in range(one.units):
        if not _is_own(model, one, head, before, args, kwargs, values=False):
            values = _is_own(model, one, head, before, args, kwargs, values=True)
            (mixed if values else wrong).append(head)
        elif normed:
            mixed.append(head)
    return AttentionCheck(name, one.units, tuple(wrong), tuple(mixed), ran=True)


def _is_own(
    model: nn.Module,
    one: Attention,
    head: int,
    before: Tensor,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    values: bool,
) -> bool:
    """Return whether some of a head's columns, and no others, change with its rows, or with those of its values."""
    saved = []
    generator = torch.Generator().manual_seed(head)
    for projection, unit_of, is_value in one.inputs:
        rows = (unit_of == head) & is_value if values else unit_of == head
        weight = projection.parameter
        saved.append((weight, weight.detach().clone()))
        noise = torch.randn(weight.shape, generator=generator).to(weight) * weight.std()
        weight.movedim(projection.dim, 0)[rows] += noise.movedim(projection.dim, 0)[rows]
    try:
        after, _ = _read(model, one, args, kwargs)
    finally:
        for weight, old in saved:
            weight.copy_(old)
    assert after is not None
    same = (before == after) | (before.isnan() & after.isnan())
    changed = (~same).flatten(0, -2).any(0).cpu()
    own = one.columns == head
    return bool(changed[own].any()) and not bool(changed[~own].any())


def _read(
    model: nn.Module, one: Attention, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor | None, bool]:
    """Return what the output projection reads at its first call, features last, and whether a norm has made it.

    What a norm over all heads has made is looked at before the norm. None if the projection is not called.
    """
    seen: list[Tensor] = []
    normed: dict[int, tuple[Tensor, Tensor]] = {}  # by place in memory, which is theirs as long as they are held

    def look(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if not seen:
            seen.append(inputs[0])

    def remember(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if not seen:
            normed[output.data_ptr()] = (inputs[0], output)

    handles = [one.output.register_forward_pre_hook(look)]
    handles += [
        part.register_forward_hook(remember) for part in one.module.modules() if _is_norm(part, len(one.columns))
    ]
    try:
        model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    if not seen:
        return None, False
    is_normed = seen[0].data_ptr() in normed
    read = (normed[seen[0].data_ptr()][0] if is_normed else seen[0]).detach().clone()
    return (read.movedim(1, -1) if one.output.weight.dim() > 2 else read), is_normed  # type: ignore[operator]


def _is_norm(module: nn.Module, size: int) -> bool:
    """Say whether a module scales so many features, and holds nothing else; batch norms keep features apart."""
    own = list(module.parameters())
    return bool(own) and all(p.shape == (size,) for p in own) and not isinstance(module, _BatchNorm)
