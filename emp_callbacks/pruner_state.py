"""A pruner's state as plain tensors, numbers and strings, and its way back, checked before anything changes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from emp_callbacks.config import EMPConfig
from emp_callbacks.core.packing import pack_bits, unpack_bits
from emp_callbacks.mask_mode import MaskedWeight, MaskMode
from emp_callbacks.trajectory import Trajectory

FORMAT = 1
Position = tuple[int, int, int, int]


def pack_state(
    config: EMPConfig, mode: MaskMode, weights: Sequence[MaskedWeight], trajectory: Trajectory, position: Position
) -> dict[str, Any]:
    """Return the state; see `EMPPruner.state_dict`."""
    return {
        "format": FORMAT,
        "mode": mode.name,
        "scope": config.scope,
        "criterion": config.criterion,
        "target": config.target,
        "position": list(position),
        "shapes": {weight.name: list(weight.segment.shape) for weight in weights},
        "masks": {weight.name: pack_bits(weight.mask) for weight in weights if weight.mask is not None},
        "stash": {weight.name: weight.stash.cpu().clone() for weight in weights if weight.stash is not None},
        "trajectory": trajectory.records(),
    }


def install_state(
    state: dict[str, Any], config: EMPConfig, mode: MaskMode, weights: Sequence[MaskedWeight], trajectory: Trajectory
) -> Position:
    """Put a state back and return its position; see `EMPPruner.load_state_dict`.

    Raises:
        ValueError: The state does not fit; nothing was changed.
    """
    _check_fits(state, config, mode, weights)
    masks = {w.name: _mask(state, w) for w in weights}
    stashes = {w.name: _stash(state, mode, w, masks[w.name]) for w in weights}
    trajectory.restore(state["trajectory"])
    for weight in weights:
        weight.mask, weight.stash = masks[weight.name], stashes[weight.name]
        with torch.no_grad():
            mode.restore(weight)
    steps, epochs, last, at_refresh = state["position"]
    return steps, epochs, last, at_refresh


def _check_fits(state: dict[str, Any], config: EMPConfig, mode: MaskMode, weights: Sequence[MaskedWeight]) -> None:
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError("this is not the state of an EMP pruner (no known 'format'); pass what state_dict() returned")
    now = {"mode": mode.name, "scope": config.scope, "criterion": config.criterion, "target": config.target}
    for key, value in now.items():
        if state[key] != value:
            raise ValueError(
                f"the checkpoint was trained with {key}={state[key]!r}, this run has {key}={value!r}; resume with the "
                "same setting, or load only the model's weights to start anew"
            )
    shapes = {weight.name: list(weight.segment.shape) for weight in weights}
    if shapes != state["shapes"]:
        differ = sorted(n for n in {*shapes, *state["shapes"]} if shapes.get(n) != state["shapes"].get(n))
        raise ValueError(
            f"the checkpoint's masks belong to other parameters: {', '.join(differ[:5])} differ in name or shape "
            f"({len(differ)} in all); resume with the same model, include and exclude"
        )


def _mask(state: dict[str, Any], weight: MaskedWeight) -> Tensor | None:
    if weight.name not in state["masks"]:
        return None
    flat = unpack_bits(state["masks"][weight.name], weight.weight.numel())
    # to the parameter's memory format, so that masking never walks two layouts at once
    mask = torch.empty_like(weight.weight, dtype=torch.bool)
    return mask.copy_(flat.view(weight.weight.shape))


def _stash(state: dict[str, Any], mode: MaskMode, weight: MaskedWeight, mask: Tensor | None) -> Tensor | None:
    if mask is None or mode.name != "feedback":
        return None
    stash = state["stash"].get(weight.name)
    pruned = int((~mask).sum())
    if stash is None or stash.numel() != pruned:
        held = "none" if stash is None else stash.numel()
        raise ValueError(
            f"{pruned} dense values belong behind the mask of {weight.name!r}, the checkpoint holds {held}"
        )
    return stash.to(device=weight.weight.device, dtype=weight.weight.dtype, copy=True)
