"""Modules at which the forward pass is watched and masked: how names select them, how hooks come and go."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from emp_callbacks.core.device import is_captured
from emp_callbacks.core.effective_number import score_moments
from emp_callbacks.core.row_selection import top_rows
from emp_callbacks.targets.compiled_site import let_compiled_code_see_hooks, number_of
from emp_callbacks.targets.names import canonical_name, check_patterns, matches

# Keep counts of G groups, shape (G,), int64, from their N_eff (G,), float64, their size and their number of scores
# that are not 0 (G,), float64; on the device of what it is given.
CountRule = Callable[[Tensor, int, Tensor], Tensor]


class ForwardSite(ABC):
    """One module of the user's model whose forward pass is watched and masked through hooks.

    Attributes:
        name: Name of the module in the user's model, without what wrappers added.
        module: The module.
        root: The whole model: while it trains, modules inside it that stay in evaluation mode are watched, too.
        observing: Whether statistics are gathered now.
        in_eval: Whether they are also gathered while neither the module nor the whole model is in training mode.
        positions: Which positions of the batch at hand count, shape (B, T), bool; None: all.
        passed_in_eval: Whether, since `reset`, something passed in evaluation mode that was not gathered.
    """

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name = name
        self.module = module
        self.root = module
        self.observing = False
        self.in_eval = False
        self.positions: Tensor | None = None
        self.passed_in_eval = False
        self._handles: list[RemovableHandle] = []
        self._sums: dict[str, Tensor] = {}
        self._number = number_of(self)

    def __getstate__(self) -> dict[str, Any]:
        # A copy or a pickle of one module must not take the whole model with it, nor the last batch.
        return {**self.__dict__, "root": self.module, "positions": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copy of the model has a copy of the site, which compiled code must not mistake for this one.
        self.__dict__.update(state)
        self._number = number_of(self)

    def on(self, module: nn.Module) -> ForwardSite:
        """Return the same site, with the same mask, for a module of another model; hooks not yet attached."""
        twin = copy.copy(self)
        twin.module, twin.observing, twin._handles, twin._sums = module, False, [], {}
        return twin

    def attach(self) -> None:
        """Register the hooks; does nothing where they are in place, and registers them anew where they were cleared."""
        if not self._handles or not all(map(_registered, self._handles)):
            self.detach()
            let_compiled_code_see_hooks()
            self._handles = self._register()

    def detach(self) -> None:
        """Remove the hooks: the module is as it was before `attach`."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def watch_with(self, root: nn.Module) -> None:
        """Say which model the module is a part of: while that trains, the module is watched."""
        self.root = getattr(root, "_orig_mod", root)  # torch.compile cannot trace the mode of its own wrapper

    def reset(self) -> None:
        """Forget the statistics and release their memory."""
        self._sums = {}
        self.passed_in_eval = False

    @property
    def sums(self) -> dict[str, Tensor]:
        """What was gathered since `reset`, as a checkpoint keeps it: empty where nothing was."""
        return dict(self._sums)

    @sums.setter
    def sums(self, sums: dict[str, Tensor]) -> None:
        self._sums = dict(sums)
        self._recall()

    def _recall(self) -> None:
        """Learn from sums that a checkpoint kept what the forward passes before it had shown."""

    @property
    def reads_positions(self) -> bool:
        """Whether the statistics depend on `positions`."""
        return False

    @abstractmethod
    def statistics(self) -> dict[str, Tensor]:
        """Return this rank's sums since `reset`, float64: they add over ranks."""

    @abstractmethod
    def see_forward(self, activation: Tensor, positions: Tensor | None) -> None:
        """Gather what the statistics need of an activation; of the positions that count, shape (B, T), None: of all."""

    def see_gradient(self, activation: Tensor, gradient: Tensor, positions: Tensor | None) -> None:
        """Gather what the statistics need of an activation and the gradient of the output made of it."""
        raise NotImplementedError(f"{type(self).__name__} reads no gradients")

    def choose(self, scores: Tensor, noise: Tensor | None) -> Tensor:
        """Return what is kept, shape of `scores`, bool: the highest, or with noise what it draws (`choose_rows`)."""
        raise NotImplementedError(f"{type(self).__name__} chooses nothing")

    @abstractmethod
    def _register(self) -> list[RemovableHandle]:
        """Register the hooks and return their handles."""

    def _refuse_recording(self, *, steady: bool) -> None:
        """Raise RuntimeError where a CUDA graph would replay what changes by then: a choice's rule, what is gathered.

        Args:
            steady: Whether nothing does, so that it may be recorded.
        """
        if not steady and not torch.compiler.is_compiling() and is_captured():
            raise RuntimeError(
                f"the forward pass of {self.name!r} is recorded into a CUDA graph, whose replays would gather nothing "
                "and miss the next refresh: record it with static features after the first refresh and outside of "
                "the window in which evidence is gathered, or not at all"
            )

    def _sum(self, key: str, shape: tuple[int, ...], device: torch.device) -> Tensor:
        total = self._sums.get(key)
        return torch.zeros(shape, dtype=torch.float64, device=device) if total is None else total.clone()

    @property
    def _gathers(self) -> bool:
        if not self.observing:
            return False
        gathers = self.module.training or self.root.training or self.in_eval
        if not gathers and not torch.compiler.is_compiling():
            self.passed_in_eval = True
        return gathers

    @torch.inference_mode(False)
    def _add(self, sums: dict[str, Tensor]) -> None:
        # A sum that is born inside inference mode could not be added to outside of it.
        for key, value in sums.items():
            total = self._sums.get(key)
            self._sums[key] = value.double().clone() if total is None else total.add_(value.to(total.device))


class RowChoice(NamedTuple):
    """What each of G rows of N scores keeps.

    Attributes:
        n_eff: Shape (G,), float64; 0 where the scores are all 0 or not finite.
        keep: Keep counts, shape (G,), int64; N where the scores are not finite.
        finite: Shape (G,), bool: no score of the row is NaN or Inf.
        mask: Shape (G, N), bool, True = kept.
        mass: Kept share of each row's scores, shape (G,), float64; 1 where they are all 0.
    """

    n_eff: Tensor
    keep: Tensor
    finite: Tensor
    mask: Tensor
    mass: Tensor


def choose_rows(scores_gn: Tensor, rule: CountRule, noise_gn: Tensor | None = None) -> RowChoice:
    """Choose in each row by itself, on the scores' device and without waiting for it.

    Args:
        scores_gn: Shape (G, N), floating, >= 0. A row with NaN or Inf is kept whole.
        rule: Gives the keep counts.
        noise_gn: Shape (G, N), floating, > 0: independent numbers of the standard exponential distribution. With it
            as many are drawn without replacement, each next one with probability proportional to its score among those
            left; None: the highest are kept.
    """
    size, moments = scores_gn.shape[1], score_moments(scores_gn)
    nothing = moments.total == 0
    n_eff = moments.total.square() / moments.total_sq.masked_fill(nothing, 1.0)
    finite = torch.isfinite(n_eff)
    n_eff = n_eff.masked_fill(~finite, 0.0)
    keep = rule(n_eff, size, moments.nonzero).masked_fill(~finite, size)
    # Minus the log of such noise is Gumbel's: the order is that of log s + Gumbel, and a score of 0 stays last.
    mask = top_rows(scores_gn, keep, moments) if noise_gn is None else top_rows(scores_gn / noise_gn, keep)
    kept = (scores_gn * mask).sum(1, dtype=torch.float64)
    mass = (kept / moments.total).masked_fill(nothing | ~finite, 1.0)
    return RowChoice(n_eff, keep, finite, mask, mass)


def runs_hooks(module: nn.Module) -> bool:
    """Return whether calls pass a module's hooks: nn.MultiheadAttention reads its out_proj's weight by itself."""
    return not isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)


def in_backward() -> bool:
    """Return whether autograd runs a backward pass now: a forward pass inside it is one of activation checkpointing."""
    return torch._C._current_graph_task_id() != -1


def named_sites(
    model: nn.Module,
    include: Sequence[str] | None,
    exclude: Sequence[str] | None,
    by_default: Callable[[nn.Module], bool],
    kind: str,
) -> list[tuple[str, nn.Module]]:
    """Return the chosen modules and their names, each once, in the model's own order.

    Args:
        model: Any module; a shared module counts once, under its first name.
        include: Globs on module names that replace the default rule.
        exclude: Globs on module names to leave out.
        by_default: Says of a module whether it is chosen without `include`.
        kind: What the chosen modules are, for messages.

    Raises:
        ValueError: A pattern matches no module, or nothing is left.
    """
    names = _module_names(model)
    every_name = [name for group in names.values() for name in group]
    check_patterns([*(include or ()), *(exclude or ())], every_name, "module", "blocks.*.act")
    chosen = [
        (group[0], module)
        for module, group in names.items()
        if (matches(group, include) if include else by_default(module)) and not matches(group, exclude or ())
    ]
    if never := [name for name, module in chosen if not runs_hooks(module)]:
        raise ValueError(
            f"{', '.join(map(repr, never))} cannot be watched: nn.MultiheadAttention reads the weight of its out_proj "
            "inside one function and never calls it; exclude it, or include the attention itself"
        )
    if not chosen:
        held = ", ".join(f"{group[0]} ({type(module).__name__})" for module, group in list(names.items())[:8])
        raise ValueError(
            f"no {kind} found in {type(model).__name__}, which holds {held or 'no modules'}: "
            "name modules with include=['pattern']"
        )
    return chosen


def _module_names(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Return every name of each module inside the model; of a wrapper and what it wraps, only the latter."""
    held: dict[str, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        own = canonical_name(f"{name}.").removesuffix(".")
        if own:
            held[own] = module
    names: dict[nn.Module, list[str]] = {}
    for name, module in held.items():
        names.setdefault(module, []).append(name)
    return names


def _registered(handle: RemovableHandle) -> bool:
    hooks = handle.hooks_dict_ref()
    return hooks is not None and handle.id in hooks
