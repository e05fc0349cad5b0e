"""Other models of the same parameters: averages that are kept masked, and copies that are masked once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, final

import torch
from torch import Tensor, nn

from emp_callbacks.backends.local import LocalBackend
from emp_callbacks.backends.wrapped import Wrapped
from emp_callbacks.core.device import on_host
from emp_callbacks.core.masked_values import put_pruned, take_pruned, zero_pruned
from emp_callbacks.layer.hiding import hide_all, unhide_all
from emp_callbacks.layer.mask_mode import Feedback
from emp_callbacks.layer.masked_weight import MaskedWeight
from emp_callbacks.targets import WeightTarget, match_names
from emp_callbacks.targets.forward_site import ForwardSite

# By which torch's AveragedModel, and timm's ModelEmaV3 and V2, take in the model's weights.
_UPDATES = ("update_parameters", "update", "set")


def is_average(module: nn.Module) -> bool:
    """Return whether a module averages another one that it holds a copy of."""
    return isinstance(getattr(module, "module", None), nn.Module) and any(
        callable(getattr(module, name, None)) for name in _UPDATES
    )


@final
class Average:
    """A model that averages the pruned one, masked at all times; inside it the average is of dense values.

    Args:
        model: An AveragedModel, a timm ModelEmaV3, or any module with such an update method.
        weights: The pruner's masked weights.
        dense: Inside it the pruned model's own weights are dense.
        updates: Objects and the names of their methods that update the average, where it has none itself.

    Raises:
        ValueError: It has no update method, or none of the weights.
        NotImplementedError: The weights are sharded.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: Sequence[MaskedWeight],
        dense: Callable[[], AbstractContextManager[None]],
        updates: Sequence[tuple[Any, str]] = (),
    ) -> None:
        if not updates and not is_average(model):
            raise ValueError(
                f"{type(model).__name__} is no model average (torch's AveragedModel, timm's ModelEmaV3): it has none "
                f"of the methods {', '.join(_UPDATES)}; to mask a copy once, call pruner.mask(copy)"
            )
        self.model, self._dense = model, dense
        self._copies: list[tuple[MaskedWeight, MaskedWeight]] = []
        self.pair(weights)
        own_updates = [(model, name) for name in _UPDATES if callable(getattr(model, name, None))]
        self._wrapped = [Wrapped(owner, name, self.update) for owner, name in updates or own_updates]
        self.refreshed()

    def pair(self, weights: Sequence[MaskedWeight]) -> None:
        """Follow these weights of the pruned model."""
        pairs = pair_up(weights, self.model, all_of_them=False)
        known = {id(own.segment.owner): own for _, own in self._copies}
        targets = [WeightTarget(source.name, own, 0) for source, own in pairs]
        segments = LocalBackend(self.model, ()).segments(targets)
        copies = [known.pop(id(s.owner)) if id(s.owner) in known else MaskedWeight(s) for s in segments]
        for gone in known.values():
            gone.unhide()
        self._copies = [(source, own) for (source, _), own in zip(pairs, copies, strict=True)]

    def update(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call `inner` while the average and the pruned model hold their dense values."""
        with self._dense():
            self.unhide()
            try:
                return inner(*args, **kwargs)
            finally:
                self.hide()

    @torch.no_grad()
    def hide(self) -> None:
        """Show the masked average."""
        hide_all([own for _, own in self._copies])

    @torch.no_grad()
    def unhide(self) -> None:
        """Put the dense average in place, for its update."""
        copies = [own for _, own in self._copies]
        for own in copies if copies and on_host(copies[0].weight) else ():  # elsewhere `unhide_all` does it
            own.store.take_over(own.weight)
        unhide_all(copies, in_place=False)

    @torch.no_grad()
    def refreshed(self) -> None:
        """Take over the masks of the weights; after `detach` the average is the user's."""
        if not self._wrapped:
            return
        self.unhide()
        for source, own in self._copies:
            own.mask = _mask_for(own, source)
        self.hide()

    @property
    def hides(self) -> bool:
        """Whether there are dense values behind masks."""
        return any(own.stash is not None for _, own in self._copies)

    def hidden(self) -> dict[str, Tensor]:
        """Return the dense values behind the masks, by name of the weight in the pruned model."""
        return {source.name: own.stash.cpu().clone() for source, own in self._copies if own.stash is not None}

    @torch.no_grad()
    def restore(self, hidden: dict[str, Tensor]) -> None:
        """Take back what `hidden` gave, once the average's own weights and the masks are in place."""
        for source, own in self._copies:
            mask, found = _mask_for(own, source), hidden.get(source.name)
            own.store.forget()  # the average's own weights are in place, and no mask
            fits = mask is not None and found is not None and found.numel() == int((~mask).sum())
            Feedback().restore(own, mask, found.to(own.weight) if fits and found is not None else None)

    def detach(self) -> None:
        """Leave the average masked, and to itself."""
        while self._wrapped:
            self._wrapped.pop().remove()


@final
class MaskedCopy(AbstractContextManager[None]):
    """What `EMPPruner.mask` returns: the other model is masked; as a context manager, until the block ends.

    Args:
        model: The other model, changed at once.
        weights: The pruner's masked weights.
        sites: Its modules whose outputs are masked in the forward pass.
        optional: Names of weights that the other model may lack, as a merged one lacks adapters.

    Raises:
        ValueError: The model lacks one of the weights or modules, or has it in another shape; nothing was changed.
        NotImplementedError: The weights are sharded.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: nn.Module,
        weights: Sequence[MaskedWeight],
        sites: Iterable[ForwardSite],
        *,
        optional: Collection[str] = (),
    ) -> None:
        pairs = pair_up(weights, model, all_of_them=True, optional=optional)
        modules = _modules_of(model)
        there = list(sites)
        if missing := [site.name for site in there if site.name not in modules]:
            raise ValueError(f"{type(model).__name__} has no module {missing[0]!r}, whose output is masked")
        self._taken: list[tuple[Tensor, Tensor, Tensor]] = []
        for source, own in pairs:
            if source.mask is not None:
                values, mask = own.detach(), source.mask.to(own.device)
                self._taken.append((values, mask, take_pruned(values, mask)))
                zero_pruned(values, mask)
        self._sites = [site.on(modules[site.name]) for site in there]
        for site in self._sites:
            site.attach()

    @torch.no_grad()
    def undo(self) -> None:
        """Give the other model back what the masks took; twice is once."""
        while self._taken:
            put_pruned(*self._taken.pop())
        while self._sites:
            self._sites.pop().detach()

    def __exit__(self, *_: object) -> None:
        self.undo()


def pair_up(
    weights: Sequence[MaskedWeight], model: nn.Module, *, all_of_them: bool, optional: Collection[str] = ()
) -> list[tuple[MaskedWeight, nn.Parameter]]:
    """Return each weight with the parameter of another model that has its name, wrappers left out.

    Raises:
        ValueError: There is none for a weight (for any, unless `all_of_them`), or it has another shape.
        NotImplementedError: The weights are sharded.
    """
    if not all(weight.segment.replicated for weight in weights):
        raise NotImplementedError(
            "the weights are sharded, so no rank has whole masks for another model: save() the masks, and load() them "
            "into a pruner of the unsharded model"
        )
    parameters = dict(model.named_parameters(remove_duplicate=False))
    ours = {weight.name: weight for weight in weights}
    matched = match_names(list(ours), list(parameters))
    found = {own: parameters[theirs] for theirs, own in matched.items()}
    missing = [name for name in ours if name not in found and name not in optional]
    if missing and (all_of_them or not found):
        raise ValueError(
            f"{type(model).__name__} has no parameter {missing[0]!r} ({len(missing)} of {len(ours)} masked weights are "
            f"missing); it holds {', '.join(list(parameters)[:4])}, ...: pass a model with the same parameters"
        )
    for name, parameter in found.items():
        if parameter.shape != ours[name].weight.shape:
            raise ValueError(
                f"{name!r} has shape {tuple(parameter.shape)} in {type(model).__name__} and "
                f"{tuple(ours[name].weight.shape)} in the pruned model: masks fit models of the same shapes only"
            )
    return [(ours[name], parameter) for name, parameter in found.items()]


def _mask_for(own: MaskedWeight, source: MaskedWeight) -> Tensor | None:
    return None if source.mask is None else source.mask.to(own.weight.device)


def averages_in(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the averages of the model, or of a part of it, that are modules inside it."""
    return (module for module in model.modules() if is_average(module))


def _modules_of(model: nn.Module) -> dict[str, nn.Module]:
    own = dict(model.named_modules(remove_duplicate=False))
    return own | {ours: own[theirs] for theirs, ours in match_names(list(own), list(own)).items()}
