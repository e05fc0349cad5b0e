"""`shrink`: pruned heads, neurons and channels out of a model, with all that depends on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from emp_callbacks.shrinking.channel_facts import ChannelFacts, unit_rows
from emp_callbacks.shrinking.channels import cut_channels
from emp_callbacks.shrinking.equal_sizes import equal_counts
from emp_callbacks.shrinking.example_run import evaluating, measured, outputs
from emp_callbacks.shrinking.experts import cut_experts
from emp_callbacks.shrinking.heads import cut_heads
from emp_callbacks.shrinking.report import FOR_EQUAL_SIZES, ShrinkReport, ShrunkLayer
from emp_callbacks.shrinking.surgery import SHRUNK, Surgery, cuttable_modules, mixes, perform, why_whole
from emp_callbacks.shrinking.trial import Planned, largest_fit
from emp_callbacks.shrinking.units import alive_units, unit_layer, unit_layers
from emp_callbacks.targets import adapted_weights
from emp_callbacks.targets.units import UnitTarget

__all__ = ["shrink"]

_NOT_ZERO = "not zero in this model (apply the masks first)"


def shrink(
    model: nn.Module,
    kept: Mapping[str, Tensor],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    uniform: bool = False,
) -> ShrinkReport:
    """Remove pruned heads, experts, neurons and channels from a masked model, in place, with all that depends on them.

    The parameters become new, smaller ones: an optimizer has to be made anew. What cannot go stays, as zeros; the
    report says why.

    Args:
        model: A plain model whose pruned units are zero, as a pruner leaves them; not sharded.
        kept: Module name -> bool, shape (units,), True = kept: `pruner.masks`, or `pruned_units(model)`. Tokens of
            removed experts go to those that are left: the outputs are those of the masked model if its routers never
            chose a removed expert.
        args: Positional arguments of an example call, on the model's device; the outputs before and after are
            compared on it.
        kwargs: Keyword arguments of the example call.
        uniform: Leave as many heads in every attention of a kind, and as many hidden neurons in every MLP, as the one
            with most needs, so that the model's own configuration can say the sizes. Less is removed.

    Returns:
        What was removed and what had to stay, parameter counts and FLOPs, and the largest difference.

    Raises:
        ValueError: `kept` names no such layer, or has another number of units.
        NotImplementedError: The model has adapters of PEFT.
        ArithmeticError: Heads in `kept` are not zero, or the model gives other outputs each time. The model is as it
            was.

    Examples:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> with torch.no_grad():
        ...     model[0].weight[1] = 0
        ...     model[0].bias[1] = 0
        >>> shrink(model, {"0": torch.tensor([True, False, True])}, (torch.ones(1, 2),)).parameters
        (13, 9)
        >>> model[2].in_features
        2
    """
    if adapted_weights(model):
        raise NotImplementedError(
            "a model with adapters of PEFT cannot be shrunk: merge them first, model = model.merge_and_unload(), and "
            "mask what comes of it, pruner.mask(model)"
        )
    run = partial(outputs, model, tuple(args), dict(kwargs or {}))
    with evaluating(model):
        before, flops_before = measured(run)
        parameters_before = _parameter_count(model)
        plans = _Plans(model, kept, run)
        fit, errors = largest_fit(model, plans.names, plans.cut, run, before)
        gone = sum(layer.removed for layer in fit.layers.values())
        if uniform:
            names = [name for name in plans.names if name not in errors]
            most = equal_counts(model, partial(plans.cut, names))
            fit, more = largest_fit(model, names, partial(plans.cut, most=most), run, before)
            errors |= more
        perform(model, fit.surgery)
    repeated = model in SHRUNK
    if fit.surgery:
        SHRUNK.add(model)
    layers = {name: fit.layers.get(name) or plans.left_out(name, errors[name]) for name in plans.names}
    return ShrinkReport(
        layers=tuple(layers.values()),
        surgery=fit.surgery,
        parameters=(parameters_before, _parameter_count(model)),
        flops=(flops_before, fit.flops),
        difference=fit.difference,
        rerouted=fit.rerouted,
        brought_back=gone - sum(layer.removed for layer in layers.values()),
        repeated=repeated,
    )


class _Plans:
    """What to cut off every module, for any choice of the layers with pruned units.

    Heads, experts, and neurons and channels, each have their own rule; all add to one surgery.

    Attributes:
        names: The layers that have pruned units.
    """

    def __init__(self, model: nn.Module, kept: Mapping[str, Tensor], run: Callable[..., Any]) -> None:
        self._model, self._cuttable = model, cuttable_modules(model)
        known = {(target.name, target.units): target for target in unit_layers(model)}
        self._layers: dict[str, tuple[UnitTarget, Tensor]] = {}
        for name, mask in kept.items():
            if not mask.all():
                target = known.get((name, len(mask))) or unit_layer(model, name, len(mask))
                self._layers[name] = target, ~mask.cpu()
        self.names = list(self._layers)
        self._alive = {name: _alive(target, pruned) for name, (target, pruned) in self._layers.items()}
        self._heads = {name for name, (target, _) in self._layers.items() if _is_attention(target)}
        self._experts = {name for name, (target, _) in self._layers.items() if target.whole_experts}
        others = {name: of for name, of in self._layers.items() if name not in self._heads | self._experts}
        why_not = {name: _why_not(model, target) for name, (target, _) in others.items()}
        self._left_out = {name: why for name, why in why_not.items() if why is not None}
        channels = [
            (target, pruned & ~self._alive[name])
            for name, (target, pruned) in others.items()
            if name not in self._left_out
        ]
        self._channels: ChannelFacts | None = None
        try:
            self._channels = ChannelFacts(model, channels, self._cuttable, run) if channels else None
        except Exception as error:  # of the model's own code, called with other weights
            reason = f"the model cannot be followed with other weights ({type(error).__name__}: {error})"
            self._left_out |= {target.name: reason for target, _ in channels}

    def cut(self, names: Sequence[str], most: Mapping[str, int] | None = None) -> Planned:
        """Return the cuts of some of the layers, of each at most so many units."""
        surgery: Surgery = {}
        most = most or {}
        layers: dict[str, ShrunkLayer] = {}
        for name in names:
            if name in self._heads:
                layers[name] = self._cut_heads(name, most, surgery)
            elif name in self._experts:
                layers[name] = self._cut_experts(name, most, surgery)
        layers |= {name: self.left_out(name, why) for name, why in self._left_out.items() if name in names}
        if self._channels is not None:
            channels = [name for name in names if name not in layers]
            layers |= {layer.name: layer for layer in cut_channels(self._channels, channels, surgery, most)}
        return Planned(surgery, {name: self._told(layers[name]) for name in names})

    def left_out(self, name: str, reason: str) -> ShrunkLayer:
        """Return the row of a layer that cannot be cut."""
        _, pruned = self._layers[name]
        return ShrunkLayer(name, len(pruned), int(pruned.sum()), 0, reason)

    def _cut_heads(self, name: str, most: Mapping[str, int], surgery: Surgery) -> ShrunkLayer:
        target, going, kept_back = self._going(name, most)
        layer = cut_heads(self._model, target, going, self._cuttable, surgery)
        return layer._replace(reason=layer.reason or kept_back)

    def _cut_experts(self, name: str, most: Mapping[str, int], surgery: Surgery) -> ShrunkLayer:
        target, going, kept_back = self._going(name, most)
        layer = cut_experts(self._model, target, going & ~self._alive[name], surgery)
        return layer._replace(reason=layer.reason or kept_back)

    def _going(self, name: str, most: Mapping[str, int]) -> tuple[UnitTarget, Tensor, str | None]:
        """Return a layer, which of its pruned units go, and why fewer than all where that is so."""
        target, pruned = self._layers[name]
        going = pruned & (pruned.cumsum(0) <= most.get(name, len(pruned)))
        return target, going, FOR_EQUAL_SIZES if int(going.sum()) < int(pruned.sum()) else None

    def _told(self, layer: ShrunkLayer) -> ShrunkLayer:
        """Return the row of a layer with all of its pruned units, those too that are not zero."""
        alive = int(self._alive[layer.name].sum())
        reasons = ([f"{alive} of its units are {_NOT_ZERO}"] if alive else []) + (
            [layer.reason] if layer.reason else []
        )
        pruned = int(self._layers[layer.name][1].sum())
        return layer._replace(pruned=pruned, reason="; ".join(reasons) or None)


def _why_not(model: nn.Module, target: UnitTarget) -> str | None:
    """Return why neurons or channels of a layer cannot be cut, whatever reads them; None if they may."""
    if target.experts is not None:
        return "hidden neurons of stacked experts are not cut: all have as many"
    whole = [module for module in unit_rows(model, target) if not mixes(module)]
    return f"{type(whole[-1]).__name__}: {why_whole(whole[-1])}" if whole else None


def _alive(target: UnitTarget, pruned: Tensor) -> Tensor:
    """Return which pruned units are not zero in the model; bool, shape (units,)."""
    if len(pruned) != target.units:
        raise ValueError(
            f"the mask of {target.name!r} is for {len(pruned)} units, the layer has {target.units}; "
            "pass its own pruner.masks"
        )
    alive = pruned & alive_units(target)
    if alive.any() and _is_attention(target):
        raise ArithmeticError(f"{int(alive.sum())} heads of {target.name!r} in `kept` are {_NOT_ZERO}")
    return alive


def _is_attention(target: UnitTarget) -> bool:
    return any(member.role == "output" for member in target.members)


def _parameter_count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
