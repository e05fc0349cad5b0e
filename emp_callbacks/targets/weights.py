"""Single weights as units: which parameters of a model are scored."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from torch import nn

from emp_callbacks.targets.adapters import adapter_parameters
from emp_callbacks.targets.experts import routers
from emp_callbacks.targets.matrices import A_FUNCTION, NOT_A_WEIGHT, Owned, no_matrix, outputs_of
from emp_callbacks.targets.names import check_patterns, few, known_names, matches
from emp_callbacks.targets.parametrised import GAIN, WeightNormed, parametrised, weight_norms
from emp_callbacks.targets.shapes import FullShape, own_shape


class WeightTarget(NamedTuple):
    """One prunable parameter.

    Attributes:
        name: Name in the model, without what torch.compile or a wrapper added.
        parameter: The parameter itself; looked up through this object at every use, never copied.
        output_dim: Dimension that counts output units: the rows of `scope="row"`.
        stacked: Whether dimension 0 counts matrices, such as experts, each with output units of its own.
        normed: The weight norm whose direction it is, if it is one.
    """

    name: str
    parameter: nn.Parameter
    output_dim: int
    stacked: bool = False
    normed: WeightNormed | None = None

    @property
    def input_dim(self) -> int:
        """Dimension that counts the inputs of one output unit; of a vector there is none."""
        return (3 if self.stacked else 1) - self.output_dim


class LeftOut(NamedTuple):
    """One parameter that is not pruned.

    Attributes:
        name: Name in the model.
        reason: Why not.
        size: Its weights.
    """

    name: str
    reason: str
    size: int


ADAPTER = "an adapter of PEFT"
FROZEN = "frozen (requires_grad=False)"
NOT_UPDATED = "no given optimizer updates it"
NOT_FLOATING = "not a real floating-point tensor"
ROUTER = "the router of a mixture of experts"
PARAMETRISED = "a weight is computed from it (parametrised), which a mask on it does not reach"
NO_MULTIPLE = "its inputs are no multiple of the pattern's M"
# Of these a user expects that they are pruned; of norms, biases and embeddings nobody does.
SURPRISING = (FROZEN, NOT_UPDATED, NOT_FLOATING, NOT_A_WEIGHT, A_FUNCTION, PARAMETRISED, NO_MULTIPLE)

Updates = Callable[[nn.Parameter], bool]


def anything(parameter: nn.Parameter) -> bool:  # noqa: ARG001
    """Say that a parameter may be updated: of a model that nobody trains."""
    return True


def prunable_weights(
    model: nn.Module,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    full_shape: FullShape = own_shape,
    updates: Updates = anything,
) -> list[WeightTarget]:
    """Return the parameters that EMP scores, each once, in the model's own order.

    By default: the trainable floating-point matrices and kernels, updated by an optimizer, that inputs are multiplied
    with. That is the weight of torch's dense, convolution, recurrent and attention layers and of classes derived from
    them, 3-D parameters of experts (one matrix for each), the direction of a weight norm, and what the forward pass of
    any other module multiplies its input with; where that cannot be followed, parameters of two or more dimensions that
    their author calls a weight. Not: norms, embeddings, heads tied to an embedding, routers of experts, tables and
    tokens that are added, weights that a layer computes from a parameter (spectral norm, weight standardisation), and
    PEFT's adapters.

    Args:
        model: Any module; tied parameters and shared modules count once, under their first name.
        include: Glob patterns on parameter names, with or without what PEFT put into them, that replace the default
            rule: only what they name, and also norms, biases, embeddings or frozen parameters if named. Adapters
            are named only by a pattern that matches nothing else.
        exclude: Glob patterns on parameter names to leave out.
        full_shape: Gives the shape that a parameter has in the unsharded model.
        updates: Says whether an optimizer updates a parameter.

    Raises:
        ValueError: A pattern matches no parameter, or nothing is left to prune.
        TypeError: A named parameter is not floating-point.
    """
    owners = _owners(model)
    every_name = [name for owned in owners.values() for name, _ in owned]
    check_patterns([*(include or ()), *(exclude or ())], every_name, "parameter", "blocks.*.weight")
    for owned in owners.values():
        _check_not_pruned_by_torch(owned, include, exclude)
    reasons = _reasons(model, owners, include, exclude, full_shape, updates)
    targets = _targets(model, {p: owned for p, owned in owners.items() if reasons[p] is None}, full_shape)
    if not targets and ADAPTER in reasons.values():
        _refuse_adapters(model, owners, reasons)
    if not targets and NOT_UPDATED in reasons.values():
        named = [owned[0][0] for p, owned in owners.items() if reasons[p] == NOT_UPDATED]
        raise ValueError(
            f"no optimizer updates {named[0]!r} or any other weight of {type(model).__name__} that EMP would prune: "
            "make the optimizer from this model's parameters as they are now (after fully_shard or "
            "FullyShardedDataParallel), of a DeepSpeed engine pass the engine itself, or name weights in include"
        )
    if not targets and FROZEN in reasons.values():
        raise ValueError(
            f"the weights of {type(model).__name__} that EMP would prune are frozen (requires_grad=False): thaw them, "
            "model.requires_grad_(True), or name them in include to prune them as they are"
        )
    _check_targets(targets, model, full_shape)
    return targets


def _check_not_pruned_by_torch(
    owned: list[tuple[str, nn.Module]], include: Sequence[str] | None, exclude: Sequence[str] | None
) -> None:
    for name, module in owned:
        own = name.removesuffix("_orig")
        hidden = f"{own.rpartition('.')[2]}_mask"
        names = [name, own]
        if own == name or hidden not in module._buffers or matches(names, exclude or ()):
            continue
        if include is None or matches(names, include):
            raise ValueError(
                f"{own!r} is pruned by torch.nn.utils.prune: make that final with prune.remove(module, "
                f"{own.rpartition('.')[2]!r}) first, or exclude {name!r}"
            )


def left_out(
    model: nn.Module,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    full_shape: FullShape = own_shape,
    updates: Updates = anything,
) -> list[LeftOut]:
    """Return the parameters that `prunable_weights` does not, and why not; arguments as there."""
    owners = _owners(model)
    reasons = _reasons(model, owners, include, exclude, full_shape, updates)
    return [LeftOut(owners[p][0][0], why, full_shape(p).numel()) for p, why in reasons.items() if why is not None]


def _refuse_adapters(
    model: nn.Module, owners: Mapping[nn.Parameter, Owned], reasons: Mapping[nn.Parameter, str | None]
) -> None:
    base = [owned[0][0] for parameter, owned in owners.items() if reasons[parameter] == FROZEN]
    wrapped = any("base_layer" in name for owned in owners.values() for name, _ in owned)
    patterns = "include=['*base_layer.weight'] is all adapted layers; or use" if wrapped else "use include with"
    raise ValueError(
        f"{type(model).__name__} trains adapters of PEFT, which are not pruned, and its base is frozen "
        f"({few(base, 2) or 'no floating-point weights'}). Name what to prune of the base: {patterns} patterns on the "
        "names of your own model"
    )


def _owners(model: nn.Module) -> dict[nn.Parameter, Owned]:
    """Return, for each parameter, every name it has and the module that owns it under that name."""
    owners: dict[nn.Parameter, Owned] = {p: [] for p in model.parameters()}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, parameter in module.named_parameters(recurse=False):
            known = known_names(f"{prefix}.{name}" if prefix else name)
            owners[parameter].extend((one, module) for one in known)
    return owners


def _reasons(
    model: nn.Module,
    owners: Mapping[nn.Parameter, Owned],
    include: Sequence[str] | None,
    exclude: Sequence[str] | None,
    full_shape: FullShape,
    updates: Updates,
) -> dict[nn.Parameter, str | None]:
    """Return why each parameter is not pruned; None if it is."""
    adapters = adapter_parameters(model)
    base = [name for parameter, owned in owners.items() if parameter not in adapters for name, _ in owned]
    for_adapters = [pattern for pattern in include or () if not matches(base, [pattern])]
    apart = _not_for_masks(model, full_shape)
    reasons: dict[nn.Parameter, str | None] = {}
    for parameter, owned in owners.items():
        names = [name for name, _ in owned]
        if parameter in adapters and not matches(names, for_adapters):
            reasons[parameter] = ADAPTER
        elif exclude and matches(names, exclude):
            reasons[parameter] = "excluded"
        elif include:
            reasons[parameter] = None if matches(names, include) else "not included"
        else:
            known = apart[parameter] if parameter in apart else no_matrix(parameter, owned, full_shape)
            reasons[parameter] = known or _not_trained(parameter, updates)
    return reasons


def _not_for_masks(model: nn.Module, full_shape: FullShape) -> dict[nn.Parameter, str | None]:
    """Return why masks are not for these parameters, whatever they look like; None of those that look otherwise."""
    found: dict[nn.Parameter, str | None] = dict.fromkeys(routers(model, full_shape), ROUTER)
    found |= dict.fromkeys(parametrised(model), PARAMETRISED)
    for norm in weight_norms(model):
        found |= {norm.gain: GAIN, norm.direction: None}
    return found


def _not_trained(parameter: nn.Parameter, updates: Updates) -> str | None:
    """Return why the values of a parameter are not for us to change; None if they are."""
    if not parameter.is_floating_point():
        return NOT_FLOATING
    if not parameter.requires_grad:
        return FROZEN
    return None if updates(parameter) else NOT_UPDATED


def _targets(model: nn.Module, owners: Mapping[nn.Parameter, Owned], full_shape: FullShape) -> list[WeightTarget]:
    normed = {norm.direction: norm for norm in weight_norms(model)}
    targets = []
    for parameter, owned in owners.items():
        name, module = owned[0]
        norm = normed.get(parameter)
        dim, stacked = outputs_of(norm.layer if norm else module, name.rpartition(".")[2], parameter, full_shape)
        targets.append(WeightTarget(name, parameter, dim, stacked, norm))
    return targets


def _check_targets(targets: list[WeightTarget], model: nn.Module, full_shape: FullShape) -> None:
    if not targets:
        held = [f"{name} {tuple(full_shape(p))}" for name, p in model.named_parameters()][:8]
        raise ValueError(
            f"{type(model).__name__} has no weights to prune by these rules; it holds "
            f"{'; '.join(held) if held else 'no parameters at all'}. Name what you want with include=['pattern']"
        )
    if doubled := [name for name, count in Counter(target.name for target in targets).items() if count > 1]:
        raise ValueError(f"two parameters are called {doubled[0]!r} without what PEFT puts into names; exclude one")
    for target in targets:
        if not target.parameter.is_floating_point():
            raise TypeError(
                f"parameter {target.name!r} is {target.parameter.dtype} (quantized?); EMP scores floating-point "
                "weights: exclude it, or load the model without quantization"
            )
        if 0 in (shape := full_shape(target.parameter)):
            raise ValueError(f"parameter {target.name!r} has no elements (shape {tuple(shape)})")
