"""What pruned experts take with them: their matrices, and their rows in the router."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from emp_callbacks.shrinking.report import ShrunkLayer
from emp_callbacks.shrinking.surgery import EXPERT_COUNTS, Surgery, cut_of
from emp_callbacks.targets.units import UnitTarget

__all__ = ["cut_experts", "past_removed_experts"]


def cut_experts(model: nn.Module, target: UnitTarget, pruned: Tensor, surgery: Surgery) -> ShrunkLayer:
    """Add to `surgery` what the pruned experts of one layer take with them, or say why they stay.

    Args:
        model: The model.
        target: The experts.
        pruned: Bool, shape (experts,).
        surgery: Is changed.
    """
    gone = int(pruned.sum())
    routers = {member.weight.name.rpartition(".")[0] for member in target.members if member.role == "router"}
    if (reason := _why_not(model, target, pruned, routers)) is not None:
        return ShrunkLayer(target.name, target.units, gone, 0, reason)
    cut = cut_of(~pruned)
    for name in (target.name, *routers):
        surgery.setdefault(name, {})["experts"] = cut
    parent = target.name.rpartition(".")[0]
    for attribute in EXPERT_COUNTS & vars(model.get_submodule(parent)).keys():
        surgery.setdefault(parent, {})[f"={attribute}"] = cut
    return ShrunkLayer(target.name, target.units, gone, gone)


def _why_not(model: nn.Module, target: UnitTarget, pruned: Tensor, routers: set[str]) -> str | None:
    left = target.units - int(pruned.sum())
    if not routers:
        return "no router was found beside these experts"
    if left < target.least:
        return f"a token is sent to {target.least} experts, and {left} would be left"
    for name in routers:
        router = model.get_submodule(name)
        groups = next((n for key in ("num_group", "n_group") if isinstance(n := getattr(router, key, None), int)), 1)
        if groups > 1:
            return f"{name!r} chooses among {groups} groups of neighbouring experts, which would become others"
    return None


@contextmanager
def past_removed_experts(model: nn.Module, surgery: Surgery) -> Iterator[None]:
    """Let routers choose for the block as if the experts that the surgery removes were not there.

    That is what a shrunk model does: a masked one still sends tokens to pruned experts, which add nothing.
    """
    with ExitStack() as stack:
        for name, axes in surgery.items():
            cut, router = axes.get("experts"), model.get_submodule(name)
            if cut is not None and any(parameter.dim() == 2 for parameter in router.parameters(recurse=False)):
                gone = torch.ones(cut.of, dtype=torch.bool)
                gone[cut.kept] = False
                stack.enter_context(_never_chosen(router, gone))
        yield


@contextmanager
def _never_chosen(router: nn.Module, gone: Tensor) -> Iterator[None]:
    """Give these experts the logit -inf, and no bonus, for the block."""
    bonuses = [b for b in router.buffers(recurse=False) if b.shape == gone.shape and b.is_floating_point()]
    before = [bonus.clone() for bonus in bonuses]
    modes: list[ExitStack] = []

    def enter(module: nn.Module, args: Any) -> None:  # noqa: ARG001
        modes.append(ExitStack())
        modes[-1].enter_context(_Logits(gone))

    def leave(module: nn.Module, args: Any, output: Any) -> None:  # noqa: ARG001
        modes.pop().close()

    handles = [router.register_forward_pre_hook(enter), router.register_forward_hook(leave, always_call=True)]
    try:
        for bonus in bonuses:
            bonus.masked_fill_(gone.to(bonus.device), -torch.inf)
        yield
    finally:
        for handle in handles:
            handle.remove()
        for bonus, value in zip(bonuses, before, strict=True):
            bonus.copy_(value)


class _Logits(TorchFunctionMode):
    """Makes the logits of some experts -inf where a dense layer puts out one for each."""

    def __init__(self, gone: Tensor) -> None:
        super().__init__()
        self._gone = gone

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        if func is functional.linear and found.shape[-1] == len(self._gone):
            return found.masked_fill(self._gone.to(found.device), -torch.inf)
        return found
