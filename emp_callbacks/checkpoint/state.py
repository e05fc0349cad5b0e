"""A pruner's state as plain tensors, numbers and strings, and its way back, checked before anything changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from emp_callbacks.config import EMPConfig
from emp_callbacks.core.packing import pack_bits, unpack_bits
from emp_callbacks.layer import FeatureLayer, Layer, UnitLayer, WeightLayer
from emp_callbacks.layer.mask_mode import MaskedWeight, MaskMode
from emp_callbacks.schedule import Clock
from emp_callbacks.trajectory import PruneEvent, Trajectory

FORMAT = 2
FoundMask = tuple[Tensor | None, Tensor | None]
"""Flat mask and dense values behind it, as a checkpoint holds them for one segment; None where it holds none."""


def masked_weights(layers: Sequence[Layer]) -> list[MaskedWeight]:
    """Return the masked parameters of all layers, in order."""
    return [weight for layer in layers for weight in layer.weights]


def describe(
    config: EMPConfig, mode: MaskMode, layers: Sequence[Layer], trajectory: Trajectory, clock: Clock
) -> dict[str, Any]:
    """Return all of the state but the masks of parameters and the values behind them, as plain JSON types."""
    return {
        "format": FORMAT,
        "mode": mode.name,
        "scope": config.scope,
        "criterion": config.criterion_name,
        "target": config.target,
        "clock": asdict(clock),
        "shapes": _shapes(layers),
        "units": {layer.name: _unit_record(layer) for layer in layers if _has_own_mask(layer)},
        "trajectory": trajectory.records(),
    }


def _shapes(layers: Sequence[Layer]) -> dict[str, list[int]]:
    # A module's features are known only once it was called: their number is checked when their mask is put back.
    units = {layer.name: [layer.units] for layer in layers if isinstance(layer, UnitLayer)}
    return {**units, **{weight.name: list(weight.segment.shape) for weight in masked_weights(layers)}}


def _has_own_mask(layer: Layer) -> bool:
    return not isinstance(layer, WeightLayer) and layer.mask is not None


def _unit_record(layer: Layer) -> dict[str, Any]:
    mean = layer.mean if isinstance(layer, FeatureLayer) else None
    pruned = (~layer.mask_or_ones).nonzero().flatten().tolist()
    return {"units": layer.span.size, "pruned": pruned, "mean": None if mean is None else mean.tolist()}


def check_fits(state: Any, config: EMPConfig, mode: MaskMode, layers: Sequence[Layer]) -> Clock:
    """Check what `describe` returned against this run and return its clock.

    Raises:
        ValueError: It is of another mode, scope, criterion, target or model, or is not such a state.
    """
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        held = state.get("format") if isinstance(state, dict) else None
        raise ValueError(
            f"this is not the state of an EMP pruner of this version (format {held!r}, not {FORMAT}); pass what it "
            "saved, or load only the model's weights to start anew"
        )
    now = {"mode": mode.name, "scope": config.scope, "criterion": config.criterion_name, "target": config.target}
    for key, value in now.items():
        if state.get(key) != value:
            raise ValueError(
                f"the checkpoint was trained with {key}={state.get(key)!r}, this run has {key}={value!r}; resume with "
                "the same setting, or load only the model's weights to start anew"
            )
    shapes, held = _shapes(layers), state.get("shapes")
    if not isinstance(held, dict) or not isinstance(state.get("units"), dict):
        raise ValueError("the checkpoint is damaged: it holds no parameter shapes; go back to an older one")
    if shapes != held or not {layer.name for layer in layers} >= set(state["units"]):
        differ = sorted(n for n in {*shapes, *held} if shapes.get(n) != held.get(n)) or sorted(state["units"])
        raise ValueError(
            f"the checkpoint's masks belong to other parameters: {', '.join(differ[:5])} differ in name or shape "
            f"({len(differ)} in all); resume with the same model, include and exclude"
        )
    return _progress(state)


def _progress(state: dict[str, Any]) -> Clock:
    try:
        for record in state["trajectory"]:
            PruneEvent.from_record(record)
        for record in state["units"].values():
            _unit_mask(record)
        clock = Clock(**state["clock"])
        if not all(isinstance(number, int) for number in (clock.steps, clock.epochs, clock.last_position)):
            raise ValueError(f"clock {state['clock']}")
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ValueError(
            f"the checkpoint is damaged: its position or trajectory cannot be read ({error}); go back to an older one"
        ) from error
    return clock


def _unit_mask(record: dict[str, Any]) -> Tensor:
    mask = torch.ones(record["units"], dtype=torch.bool)
    mask[torch.tensor(record["pruned"], dtype=torch.int64)] = False
    return mask


def fit_masks(mode: MaskMode, weights: Sequence[MaskedWeight], found: Sequence[FoundMask]) -> list[FoundMask]:
    """Return what was found for each weight in the weight's own layout, dtype and device; changes nothing.

    Raises:
        ValueError: The dense values behind a mask are not as many as its pruned entries.
    """
    return [_fit(mode, weight, mask, stash) for weight, (mask, stash) in zip(weights, found, strict=True)]


def put_back(
    mode: MaskMode, layers: Sequence[Layer], fitting: Sequence[FoundMask], units: dict[str, dict[str, Any]]
) -> None:
    """Give every layer its masks and the values behind them, as `fit_masks` and `describe` returned them."""
    for layer in layers:
        if (record := units.get(layer.name)) is not None:
            mean = None if record["mean"] is None else torch.tensor(record["mean"], dtype=torch.float64)
            layer.put_back(_unit_mask(record), mean)
    for weight, (mask, stash) in zip(masked_weights(layers), fitting, strict=True):
        with torch.no_grad():
            mode.restore(weight, mask, stash)


def pack_state(
    config: EMPConfig, mode: MaskMode, layers: Sequence[Layer], trajectory: Trajectory, clock: Clock
) -> dict[str, Any]:
    """Return the state; see `EMPPruner.state_dict`."""
    weights = masked_weights(layers)
    return {
        **describe(config, mode, layers, trajectory, clock),
        "masks": {weight.name: pack_bits(weight.mask) for weight in weights if weight.mask is not None},
        "stash": {weight.name: weight.stash.cpu().clone() for weight in weights if weight.stash is not None},
    }


def install_state(
    state: dict[str, Any], config: EMPConfig, mode: MaskMode, layers: Sequence[Layer], trajectory: Trajectory
) -> Clock:
    """Put a state back and return its clock; see `EMPPruner.load_state_dict`.

    Raises:
        ValueError: The state does not fit; nothing was changed.
    """
    clock = check_fits(state, config, mode, layers)
    weights = masked_weights(layers)
    found = [(_unpacked(state, weight), state["stash"].get(weight.name)) for weight in weights]
    fitting = fit_masks(mode, weights, found)
    trajectory.restore(state["trajectory"])
    put_back(mode, layers, fitting, state["units"])
    return clock


def _unpacked(state: dict[str, Any], weight: MaskedWeight) -> Tensor | None:
    packed = state["masks"].get(weight.name)
    return None if packed is None else unpack_bits(packed, weight.weight.numel())


def _fit(mode: MaskMode, weight: MaskedWeight, flat: Tensor | None, stash: Tensor | None) -> FoundMask:
    if flat is None:
        return None, None
    # to the parameter's memory format, so that masking never walks two layouts at once
    mask = torch.empty_like(weight.weight, dtype=torch.bool)
    mask.copy_(flat.view(weight.weight.shape))
    if mode.name != "feedback":
        return mask, None
    pruned = int((~mask).sum())
    if stash is None or stash.numel() != pruned:
        held = "none" if stash is None else stash.numel()
        raise ValueError(
            f"{pruned} dense values belong behind the mask of {weight.name!r}, the checkpoint holds {held}"
        )
    return mask, stash.to(device=weight.weight.device, dtype=weight.weight.dtype, copy=True)
