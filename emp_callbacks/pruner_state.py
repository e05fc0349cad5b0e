"""A pruner's state as plain tensors, numbers and strings, and its way back, checked before anything changes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from emp_callbacks.config import EMPConfig
from emp_callbacks.core.packing import pack_bits, unpack_bits
from emp_callbacks.mask_mode import MaskedWeight, MaskMode
from emp_callbacks.trajectory import PruneEvent, Trajectory

FORMAT = 1
Position = tuple[int, int, int, int]
FoundMask = tuple[Tensor | None, Tensor | None]
"""Flat mask and dense values behind it, as a checkpoint holds them for one segment; None where it holds none."""


def describe(
    config: EMPConfig, mode: MaskMode, weights: Sequence[MaskedWeight], trajectory: Trajectory, position: Position
) -> dict[str, Any]:
    """Return all of the state but the masks and the values behind them, as plain JSON types."""
    return {
        "format": FORMAT,
        "mode": mode.name,
        "scope": config.scope,
        "criterion": config.criterion,
        "target": config.target,
        "position": list(position),
        "shapes": {weight.name: list(weight.segment.shape) for weight in weights},
        "trajectory": trajectory.records(),
    }


def check_fits(state: Any, config: EMPConfig, mode: MaskMode, weights: Sequence[MaskedWeight]) -> Position:
    """Check what `describe` returned against this run and return its position.

    Raises:
        ValueError: It is of another mode, scope, criterion, target or model, or is not such a state.
    """
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError("this is not the state of an EMP pruner (no known 'format'); pass what it saved")
    now = {"mode": mode.name, "scope": config.scope, "criterion": config.criterion, "target": config.target}
    for key, value in now.items():
        if state.get(key) != value:
            raise ValueError(
                f"the checkpoint was trained with {key}={state.get(key)!r}, this run has {key}={value!r}; resume with "
                "the same setting, or load only the model's weights to start anew"
            )
    shapes, held = {weight.name: list(weight.segment.shape) for weight in weights}, state.get("shapes")
    if not isinstance(held, dict):
        raise ValueError("the checkpoint is damaged: it holds no parameter shapes; go back to an older one")
    if shapes != held:
        differ = sorted(n for n in {*shapes, *held} if shapes.get(n) != held.get(n))
        raise ValueError(
            f"the checkpoint's masks belong to other parameters: {', '.join(differ[:5])} differ in name or shape "
            f"({len(differ)} in all); resume with the same model, include and exclude"
        )
    return _progress(state)


def _progress(state: dict[str, Any]) -> Position:
    try:
        for record in state["trajectory"]:
            PruneEvent.from_record(record)
        steps, epochs, last, at_refresh = (int(number) for number in state["position"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"the checkpoint is damaged: its position or trajectory cannot be read ({error}); go back to an older one"
        ) from error
    return steps, epochs, last, at_refresh


def fit_masks(mode: MaskMode, weights: Sequence[MaskedWeight], found: Sequence[FoundMask]) -> list[FoundMask]:
    """Return what was found for each weight in the weight's own layout, dtype and device; changes nothing.

    Raises:
        ValueError: The dense values behind a mask are not as many as its pruned entries.
    """
    return [_fit(mode, weight, mask, stash) for weight, (mask, stash) in zip(weights, found, strict=True)]


def put_back(mode: MaskMode, weights: Sequence[MaskedWeight], fitting: Sequence[FoundMask]) -> None:
    """Give every weight its mask and the values behind it, as `fit_masks` returned them."""
    for weight, (mask, stash) in zip(weights, fitting, strict=True):
        weight.mask, weight.stash = mask, stash
        with torch.no_grad():
            mode.restore(weight)


def pack_state(
    config: EMPConfig, mode: MaskMode, weights: Sequence[MaskedWeight], trajectory: Trajectory, position: Position
) -> dict[str, Any]:
    """Return the state; see `EMPPruner.state_dict`."""
    return {
        **describe(config, mode, weights, trajectory, position),
        "masks": {weight.name: pack_bits(weight.mask) for weight in weights if weight.mask is not None},
        "stash": {weight.name: weight.stash.cpu().clone() for weight in weights if weight.stash is not None},
    }


def install_state(
    state: dict[str, Any], config: EMPConfig, mode: MaskMode, weights: Sequence[MaskedWeight], trajectory: Trajectory
) -> Position:
    """Put a state back and return its position; see `EMPPruner.load_state_dict`.

    Raises:
        ValueError: The state does not fit; nothing was changed.
    """
    position = check_fits(state, config, mode, weights)
    found = [(_unpacked(state, weight), state["stash"].get(weight.name)) for weight in weights]
    fitting = fit_masks(mode, weights, found)
    trajectory.restore(state["trajectory"])
    put_back(mode, weights, fitting)
    return position


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
