"""A pruner's state as plain tensors, numbers and strings, and its way back, checked before anything changes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from emp_callbacks.checkpoint.evidence import check_evidence, damaged
from emp_callbacks.config import EMPConfig
from emp_callbacks.core.packing import pack_bits, unpack_bits
from emp_callbacks.layer import FeatureLayer, Layer, UnitLayer, WeightLayer
from emp_callbacks.layer.mask_mode import MaskMode
from emp_callbacks.layer.masked_weight import MaskedWeight
from emp_callbacks.schedule import Clock
from emp_callbacks.targets import few
from emp_callbacks.targets.forward_site import ForwardSite
from emp_callbacks.trajectory import Trajectory, check_state

FORMAT = 3
FoundMask = tuple[Tensor | None, Tensor | None]
"""Flat mask and dense values behind it, as a checkpoint holds them for one segment; None where it holds none."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a checkpoint holds, read and checked as a whole before anything changes.

    Attributes:
        clock: Where the run stood.
        masks: What `fit_masks` returned, for every masked parameter.
        units: Layer name -> record of its mask, of layers that have one of their own.
        trajectory: What `Trajectory.state()` returned.
        batches: The optimizer steps whose gradients were gathered.
        evidence: What `Evidence.tensors()` returned.
        seed: `Criterion.seed` of the run; None where there is none.
        gates: How learned gates stood, not yet checked; None where there are none.
    """

    clock: Clock
    masks: list[FoundMask]
    units: dict[str, dict[str, Any]]
    trajectory: Mapping[str, Any]
    batches: list[int]
    evidence: dict[str, Tensor]
    seed: int | None = None
    gates: Any = None


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
        "pattern": config.pattern,
        "unit": config.schedule.unit,
        "clock": asdict(clock),
        "shapes": _shapes(layers),
        "units": {layer.name: _unit_record(layer) for layer in layers if _has_own_mask(layer)},
        "trajectory": trajectory.state(),
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


def check_format(state: Any) -> None:
    """Raise ValueError unless this is a state that this version wrote."""
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        held = state.get("format") if isinstance(state, dict) else None
        raise ValueError(
            f"this is not the state of an EMP pruner of this version (format {held!r}, not {FORMAT}); pass what it "
            "saved, or load only the model's weights to start anew"
        )


def check_fits(state: Any, config: EMPConfig, mode: MaskMode, layers: Sequence[Layer]) -> Clock:
    """Check what `describe` returned against this run and return its clock.

    Raises:
        ValueError: It is of another mode, scope, criterion, target or model, or is not such a state.
    """
    check_format(state)
    now = {"mode": mode.name, "scope": config.scope, "criterion": config.criterion_name, "target": config.target}
    now["pattern"] = config.pattern
    for key, value in now.items():
        if state.get(key) != value:
            raise ValueError(
                f"the checkpoint was trained with {key}={state.get(key)!r}, this run has {key}={value!r}; resume with "
                "the same setting, or load only the model's weights to start anew"
            )
    shapes, held = _shapes(layers), state.get("shapes")
    if not isinstance(held, dict) or not isinstance(state.get("units"), dict):
        raise damaged("it holds no parameter shapes")
    unknown = sorted(state["units"].keys() - {layer.name for layer in layers})
    if shapes != held or unknown:
        differ = sorted(n for n in {*shapes, *held} if shapes.get(n) != held.get(n)) or unknown
        raise ValueError(f"the checkpoint's masks belong to other parameters: {_difference(shapes, held, differ)}")
    try:
        check_state(state["trajectory"])
        _check_units(state["units"], layers)
        return _clock_in(config.schedule.unit, _clock(state["clock"]), state)
    except (KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:
        raise damaged(f"its position, units or trajectory cannot be read ({error})") from error


def _difference(shapes: dict[str, Any], held: dict[str, Any], differ: list[str]) -> str:
    """Return in what way this run's parameters, of which some differ, are not those that the checkpoint holds."""
    missing = [name for name in differ if name not in shapes]
    if missing:
        return (
            f"{_some(missing)} masked there and not chosen here: resume with the same model, include and exclude. What "
            "is frozen now, or in no optimizer yet (layers that were thawed during that run), must be thawed and given "
            "to the optimizer before the state is loaded, or be named in include"
        )
    what = "of another shape there" if held.keys() & {*differ} else "chosen here and not there"
    return f"{_some(differ)} {what}: resume with the same model, include and exclude"


def _some(names: list[str]) -> str:
    return few(names, most=5) + (" is" if len(names) == 1 else " are")


def _clock_in(unit: str | None, clock: Clock, state: dict[str, Any]) -> Clock:
    """Return the clock for a schedule of this unit: a position in another is none of it."""
    if state.get("unit", unit) == unit:
        return clock
    return replace(clock, last_position=clock.epochs if unit == "epoch" else clock.steps)


def _clock(record: dict[str, Any]) -> Clock:
    if missing := [field.name for field in fields(Clock) if field.name not in record]:
        raise ValueError(f"its clock says nothing of {', '.join(missing)}")
    clock = Clock(**record)
    counts = [value for value in asdict(clock).values() if value is not None or clock.epoch_length is not None]
    if not all(type(value) is int and value >= 0 for value in counts):
        raise ValueError(f"clock {record}")
    latest = max(clock.steps, clock.epochs)
    if clock.last_position > latest or max(clock.steps_at_refresh, clock.steps_at_epoch) > clock.steps:
        raise ValueError(f"a clock that is ahead of itself, {record}")
    return clock


def _check_units(units: dict[str, dict[str, Any]], layers: Sequence[Layer]) -> None:
    """Check the masks of layers that have one of their own."""
    own = {layer.name: layer for layer in layers if not isinstance(layer, WeightLayer)}
    if foreign := sorted(units.keys() - own.keys()):
        raise ValueError(f"units of {foreign[:5]}")
    for name, record in units.items():
        layer, size, pruned, mean = own[name], record["units"], record["pruned"], record["mean"]
        if type(size) is not int or (layer.is_known and size != layer.mask_or_ones.numel()):
            raise ValueError(f"{size} units of {name!r}")
        if not all(type(unit) is int and 0 <= unit < size for unit in pruned) or len({*pruned}) != len(pruned):
            raise ValueError(f"the pruned ones of {size} units of {name!r}")
        centered = isinstance(layer, FeatureLayer) and layer.site.form.center == "mean"
        if (mean is not None) != centered or (centered and torch.tensor(mean, dtype=torch.float64).shape != (size,)):
            raise ValueError(f"the means of {size} units of {name!r}")


def check_masked(names: Collection[str], units: Mapping[str, Any], layers: Sequence[Layer]) -> None:
    """Check that a layer's masks are all there or none: of every parameter that it masks, and its own.

    Args:
        names: The parameters that have masks.
        units: The layers that have masks of their own.
        layers: All layers.

    Raises:
        ValueError: They are masks of something else.
    """
    weights = {weight.name for weight in masked_weights(layers)}
    if foreign := sorted(str(name) for name in names if name not in weights):
        raise ValueError(f"the checkpoint's masks belong to other parameters: {', '.join(foreign[:5])}")
    for layer in layers:
        found = [weight.name in names for weight in layer.weights]
        found += [layer.name in units] if found and isinstance(layer, UnitLayer) else []
        if any(found) and not all(found):
            raise damaged(f"of {layer.name!r} it holds only some of the masks")


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
        if (record := units.get(layer.name)) is None:
            layer.put_back(None, None)
        else:
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


def read_state(
    state: Any, config: EMPConfig, mode: MaskMode, layers: Sequence[Layer], sites: Sequence[ForwardSite]
) -> Found:
    """Read and check what `EMPPruner.state_dict` returned; changes nothing.

    Raises:
        ValueError: The state does not fit.
    """
    clock = check_fits(state, config, mode, layers)
    _check_averages(state.get("averages", ()))
    weights = masked_weights(layers)
    masks, stash = _tensors(state, "masks"), _tensors(state, "stash")
    check_masked(masks, state["units"], layers)
    if foreign := sorted(map(str, stash.keys() - masks.keys())):
        raise ValueError(f"the checkpoint holds dense values behind no mask: {', '.join(foreign[:5])}")
    found = [(_unpacked(masks, weight), stash.get(weight.name)) for weight in weights]
    fitting = fit_masks(mode, weights, found)
    evidence = state.get("evidence")
    held = evidence if isinstance(evidence, dict) else {}
    batches, tensors = check_evidence(held.get("batches"), held.get("tensors"), layers, sites)
    return Found(
        clock=clock,
        masks=fitting,
        units=state["units"],
        trajectory=state["trajectory"],
        batches=batches,
        evidence=tensors,
        seed=read_seed(state),
        gates=state.get("gates"),
    )


def read_seed(state: Mapping[str, Any]) -> int | None:
    """Return the seed of a run's random scores; None where the state, of another criterion or older, has none.

    Raises:
        ValueError: It is no integer.
    """
    seed = state.get("seed")
    if "seed" in state and type(seed) is not int:
        raise damaged(f"its seed is {seed!r}, not an integer")
    return seed


def _check_averages(averages: Any) -> None:
    """Raise ValueError unless these are, for each average, dense values by name."""
    several = isinstance(averages, (list, tuple)) and all(isinstance(held, Mapping) for held in averages)
    values = [value for held in averages for value in held.values()] if several else []
    if not several or not all(isinstance(value, Tensor) and value.is_floating_point() for value in values):
        raise damaged("its averages are no floating-point tensors by name")


def _tensors(state: dict[str, Any], key: str) -> dict[str, Tensor]:
    held = state.get(key)
    if not isinstance(held, dict) or not all(isinstance(value, Tensor) for value in held.values()):
        raise damaged(f"its {key} are no tensors by name")
    return held


def _unpacked(masks: Mapping[str, Tensor], weight: MaskedWeight) -> Tensor | None:
    packed = masks.get(weight.name)
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
    if not stash.is_floating_point():  # NaN and Inf a run may have behind a mask
        raise damaged(f"the dense values behind the mask of {weight.name!r} are {stash.dtype}")
    return mask, stash.to(device=weight.weight.device, dtype=weight.weight.dtype, copy=True)
