"""What the pruned heads of an attention take with them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from emp_callbacks.shrinking.report import ShrunkLayer
from emp_callbacks.shrinking.surgery import Surgery, cut_of
from emp_callbacks.targets.units import UnitTarget

__all__ = ["cut_heads"]


def cut_heads(
    model: nn.Module, target: UnitTarget, pruned: Tensor, cuttable: set[nn.Module], surgery: Surgery
) -> ShrunkLayer:
    """Add to `surgery` what the pruned heads of one attention take with them; one head stays in any case.

    Args:
        model: The model.
        target: The attention.
        pruned: Bool, shape (heads,).
        cuttable: Modules that can be cut.
        surgery: Is changed.

    Raises:
        NotImplementedError: The attention cannot have fewer heads, or a projection of it cannot be cut.
    """
    if isinstance(model.get_submodule(target.name), nn.MultiheadAttention):
        raise NotImplementedError(
            f"{target.name!r} is a torch.nn.MultiheadAttention, whose width must be num_heads * head_dim = embed_dim: "
            "it cannot have fewer heads. Leave it out with exclude, or export without --shrink"
        )
    alive = ~pruned
    if pruned.all():  # an attention without heads is none
        alive[0] = True
    kept_or_none = torch.cat([alive, torch.tensor([True])])  # the last is for -1: of no head, always kept
    for member in target.members:
        owner = member.weight.name.rpartition(".")[0]
        if (projection := model.get_submodule(owner)) not in cuttable:
            raise NotImplementedError(
                f"{owner!r} of {target.name!r} is a {type(projection).__name__} that cannot be cut (of an unknown "
                "kind, or its weight is tied to another's); export it without --shrink"
            )
        axis = "inputs" if member.role == "output" else "outputs"
        surgery.setdefault(owner, {})[axis] = cut_of(kept_or_none[member.unit_of])
    surgery.setdefault(target.name, {})["heads"] = cut_of(alive)
    return ShrunkLayer(target.name, target.units, int(pruned.sum()), int((~alive).sum()))
