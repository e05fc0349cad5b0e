"""From settings and a model to layers: what is scored, where its parts lie, which hooks watch it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from emp_callbacks.backends import Backend
from emp_callbacks.config import EMPConfig
from emp_callbacks.core.group_pattern import GroupPattern
from emp_callbacks.criteria import Criterion
from emp_callbacks.criteria.attention import EDGE_SCORES
from emp_callbacks.criteria.output_norm import OutputNorm
from emp_callbacks.criteria.wanda import is_observable
from emp_callbacks.layer import FeatureLayer, Layer, Member, UnitLayer, WeightLayer
from emp_callbacks.layer.expert_activity import ExpertActivity, Shown, can_be_watched
from emp_callbacks.layer.head_norms import HeadNorms
from emp_callbacks.layer.masked_weight import MaskedWeight
from emp_callbacks.layer.observers import ActivationSizes, InputSquares, Observer, can_unfold
from emp_callbacks.layer.segment import Segment
from emp_callbacks.targets import (
    NO_MULTIPLE,
    UNIT_TARGETS,
    LeftOut,
    UnitTarget,
    WeightTarget,
    canonical_name,
    few,
    left_out,
    left_out_neurons,
    prunable_weights,
)
from emp_callbacks.targets.attention_edges import EdgeSite, edge_sites
from emp_callbacks.targets.dynamic_heads import DynamicHeadSite, dynamic_head_sites
from emp_callbacks.targets.experts import stacked_experts
from emp_callbacks.targets.features import FeatureSite, feature_sites
from emp_callbacks.targets.forward_site import CountRule
from emp_callbacks.targets.head_outputs import HeadOutputs
from emp_callbacks.targets.names import matches

DynamicSite = FeatureSite | EdgeSite | DynamicHeadSite
Globs = Sequence[str] | None


def find_layers(config: EMPConfig, criterion: Criterion, backend: Backend) -> list[Layer]:
    """Return every layer whose components compete for a static mask, in the model's own order. Collective.

    Raises:
        ValueError: The settings select nothing, or a layer that the criterion cannot score; the message names it.
        NotImplementedError: A parameter is sharded in a way that is not supported.
    """
    _check_shapes(backend.module)
    if config.target == "weights":
        layers = _weight_layers(config, criterion, backend)
    elif config.target == "features":
        layers = _feature_layers(config, backend)
    else:
        layers = _unit_layers(config, criterion, backend)
    _check_scorable(layers, criterion)
    return layers


def find_dynamic_sites(config: EMPConfig, criterion: Criterion, backend: Backend, rule: CountRule) -> list[DynamicSite]:
    """Return the modules whose features, heads or edges are chosen anew in every forward pass; hooks not yet attached.

    Raises:
        ValueError: The settings select nothing, or a parameter has no shape yet.
    """
    _check_shapes(backend.module)
    if config.target == "features":
        form = config.feature_form
        return [*feature_sites(backend.module, config.include, config.exclude, form, "activation", rule)]
    if config.target == "heads":
        targets = UNIT_TARGETS["heads"](*_rules(config, backend))
        return [*dynamic_head_sites(backend.module, targets, config.feature_form.per, rule)]
    return [*edge_sites(backend.module, config.include, config.exclude, EDGE_SCORES[type(criterion)], rule)]


def chosen_parameters(config: EMPConfig, backend: Backend) -> list[nn.Parameter]:
    """Return the parameters that masks are for, as model and optimizers are now; [] where outputs are masked.

    Raises:
        ValueError: There are none.
    """
    if config.target == "weights":
        return [target.parameter for target in _weight_targets(config, backend)]
    if config.target not in UNIT_TARGETS or config.is_dynamic:
        return []
    return [m.weight.parameter for target in _unit_targets(config, backend) for m in target.members if m.masked]


def find_left_out(config: EMPConfig, backend: Backend, weights: Sequence[MaskedWeight]) -> list[LeftOut]:
    """Return the parameters of the model that no mask reaches, and why; [] where modules' outputs are masked."""
    if config.target == "weights":
        found = left_out(*_rules(config, backend), backend.updates())
        masked, known = {weight.name for weight in weights}, {one.name for one in found}
        odd = prunable_weights(*_rules(config, backend), backend.updates()) if config.pattern is not None else []
        odd = [target for target in odd if target.name not in masked | known]
        return found + [LeftOut(t.name, NO_MULTIPLE, backend.full_shape(t.parameter).numel()) for t in odd]
    if not weights:
        return []
    masked = {weight.name for weight in weights}
    parameters = {canonical_name(name): p for name, p in backend.module.named_parameters()}
    usual = f"part of no chosen {config.target.replace('_', ' ').removesuffix('s')}"
    by_default = config.target == "neurons" and not config.include
    reasons = left_out_neurons(backend.module, backend.full_shape) if by_default else {}
    return [
        LeftOut(name, reasons.get(name, usual), backend.full_shape(p).numel())
        for name, p in parameters.items()
        if name not in masked
    ]


def _rules(config: EMPConfig, backend: Backend) -> tuple[nn.Module, Globs, Globs, Callable[[nn.Parameter], torch.Size]]:
    return backend.module, config.include, config.exclude, backend.full_shape


def _is_updated(target: UnitTarget, updates: Callable[[nn.Parameter], bool]) -> bool:
    return any(updates(member.weight.parameter) for member in target.members if member.masked)


def adapter_names(layers: Sequence[Layer]) -> set[str]:
    """Return the names of masked parameters that PEFT's adapters bring: a merged model has them no more."""
    members = [member for layer in layers if isinstance(layer, UnitLayer) for member in layer.members]
    return {member.segment.name for member in members if member.role == "adapter"}


def check_not_frozen(layers: Sequence[Layer], backend: Backend, criterion: Criterion, growth: Criterion | None) -> None:
    """Raise ValueError where one of the criteria reads gradients and none of the layers can have any."""
    if "gradients" not in (criterion.needs, growth.needs if growth else None):
        return
    adapters = adapter_names(layers)
    parameters = {canonical_name(name): p for name, p in backend.module.named_parameters()}
    masked = [weight.name for layer in layers for weight in layer.weights if weight.name not in adapters]
    if masked and not any(parameters[name].requires_grad for name in masked if name in parameters):
        raise ValueError(
            f"what is to be pruned is frozen ({few(masked, 2)}) and has no gradients, by which it is to be scored: use "
            "a criterion that does without ('magnitude', 'wanda', 'weight_norm', 'activation'; grow='random'), or "
            "requires_grad_(True)"
        )


def _check_shapes(model: nn.Module) -> None:
    """Raise ValueError, which names the module, where a lazy one has not learned its parameters' shapes yet."""
    for name, module in model.named_modules():
        if any(is_lazy(parameter) for parameter in module.parameters(recurse=False)):
            own = canonical_name(f"{name}.")[:-1]
            raise ValueError(
                f"{own!r} ({type(module).__name__}) has no shape yet: run one batch through the model first"
            )


def _check_scorable(layers: Sequence[Layer], criterion: Criterion) -> None:
    """Raise one ValueError for all layers that the criterion cannot score, with the patterns that leave them out."""
    refused: dict[str, ValueError] = {}
    for layer in layers:
        try:
            criterion.check(layer)
        except ValueError as error:
            refused[layer.name] = error
    if not refused:
        return
    names, reason = list(refused), next(iter(refused.values()))
    others = f"; the same holds of {', '.join(map(repr, names[1:]))}" if len(names) > 1 else ""
    patterns = patterns_for(names, [layer.name for layer in layers if layer.name not in refused])
    raise ValueError(f"{reason}{others} (to leave out all: exclude={patterns}, beside what is excluded already)")


def patterns_for(names: Sequence[str], others: Sequence[str]) -> list[str]:
    """Return short glob patterns that match all of `names` and none of `others`."""
    found: dict[str, None] = {}
    for name in names:
        parts = name.split(".")
        ends = ("*." + ".".join(parts[-i:]) for i in range(1, len(parts)))
        found[next((end for end in ends if not matches(others, [end])), name)] = None
    return list(found)


def _weight_layers(config: EMPConfig, criterion: Criterion, backend: Backend) -> list[Layer]:
    targets = _weight_targets(config, backend)
    observed = criterion.needs == "inputs"
    inputs = _input_observers(backend, targets, config.certify) if observed else [None] * len(targets)
    parts = zip(targets, backend.segments(targets), inputs, strict=True)
    return [_weight_layer(target, segment, observer, config, backend) for target, segment, observer in parts]


def _weight_layer(
    target: WeightTarget, segment: Segment, inputs: Observer | None, config: EMPConfig, backend: Backend
) -> WeightLayer:
    if target.normed is None:
        return WeightLayer(segment, backend, inputs)
    by_row = config.scope == "row" or config.pattern is not None
    hindrance = (
        "is sharded" * (not segment.replicated)
        or "is not for mode='rewire'" * (config.mode == "rewire")
        or "has no norm for each output, as this scope needs" * (by_row and target.normed.dim != target.output_dim)
    )
    if hindrance:
        raise ValueError(
            f"{target.name!r} is the direction of a weight norm, of which no slice may lose all weights, and it "
            f"{hindrance}: exclude it, or take the norm off (torch.nn.utils.parametrize.remove_parametrizations)"
        )
    return WeightLayer(replace(segment, never_empty=target.normed.dim), backend, inputs, target.normed)


def _weight_targets(config: EMPConfig, backend: Backend) -> list[WeightTarget]:
    """Return the parameters to prune: with a pattern those whose inputs come in groups of M.

    Raises:
        ValueError: One that `include` names has other inputs, or none is left.
    """
    targets = prunable_weights(*_rules(config, backend), backend.updates())
    if config.pattern is None:
        return targets
    size = GroupPattern.parse(config.pattern).size
    fit = []
    for target in targets:
        shape = backend.full_shape(target.parameter)
        inputs = shape[target.input_dim] if len(shape) > 1 else 1
        if inputs % size == 0:
            fit.append(target)
        elif config.include:
            raise ValueError(
                f"{target.name!r} has {inputs} inputs, which pattern={config.pattern!r} does not divide into groups of "
                f"{size}: exclude it"
            )
    if not fit:
        raise ValueError(f"no weight has a multiple of {size} inputs, as pattern={config.pattern!r} needs")
    return fit


def _input_observers(backend: Backend, targets: Sequence[WeightTarget], products: bool) -> list[Observer | None]:
    """Return for each parameter an observer of what it multiplies; None where no module shows that."""
    of_experts = _expert_observers(backend)
    owners: dict[int, tuple[str, nn.Module]] = {}
    for name, module in backend.module.named_modules():
        if is_observable(module):
            owners.setdefault(id(module.weight), (canonical_name(f"{name}.")[:-1], module))
    for target in targets:
        if target.normed is not None and is_observable(target.normed.layer):
            owners[id(target.parameter)] = (target.name, target.normed.layer)
    observers: list[Observer | None] = []
    for target in targets:
        if id(target.parameter) not in owners:
            observers.append(of_experts.get(id(target.parameter)))
            continue
        name, module = owners[id(target.parameter)]
        shape, groups = backend.full_shape(target.parameter), getattr(module, "groups", 1)
        patch = (groups, math.prod(shape) // shape[target.output_dim]) if products and can_unfold(module) else None
        observers.append(InputSquares(name, module, shape[1 - target.output_dim] * groups, patch))
    return observers


def _expert_observers(backend: Backend) -> dict[int, Observer]:
    """Return what watches the inputs of each stack of experts' matrices, by the id of the parameter."""
    found: dict[int, Observer] = {}
    for name, module in backend.module.named_modules():
        stacked = stacked_experts(module, backend.full_shape)
        if stacked is not None and can_be_watched(stacked):
            own = canonical_name(f"{name}.")[:-1]
            found.setdefault(id(stacked.up), ExpertActivity(f"{own}.{stacked.names[0]}", stacked, "inputs"))
            found.setdefault(id(stacked.down), ExpertActivity(f"{own}.{stacked.names[1]}", stacked, "hidden_squares"))
    return found


def _feature_layers(config: EMPConfig, backend: Backend) -> list[Layer]:
    # Random scores need the features' number alone, which the cheapest statistic brings.
    statistic = "activation" if config.criterion_name == "random" else config.criterion_name
    form, applied = config.feature_form, not config.observe_only
    sites = feature_sites(backend.module, config.include, config.exclude, form, statistic, _no_rule)
    return [FeatureLayer(site, backend, applied=applied) for site in sites]


def _no_rule(n_eff: Tensor, size: int, nonzero: Tensor) -> Tensor:
    raise NotImplementedError("static masks are decided by the pruner")


def _unit_layers(config: EMPConfig, criterion: Criterion, backend: Backend) -> list[Layer]:
    targets = _unit_targets(config, backend)
    parameters = {id(m.weight.parameter): m.weight for target in targets for m in target.members}
    segments = dict(zip(parameters, backend.segments(list(parameters.values())), strict=True))
    return [_unit_layer(target, segments, criterion, backend) for target in targets]


def _unit_targets(config: EMPConfig, backend: Backend) -> list[UnitTarget]:
    targets = UNIT_TARGETS[config.target](*_rules(config, backend))
    _check_masked_once(targets)
    updates = backend.updates()
    targets = [target for target in targets if config.include or _is_updated(target, updates)]
    if not targets:
        raise ValueError(
            f"no optimizer updates the {config.target} of {type(backend.module).__name__}: make the optimizer from "
            "this model's parameters, of a DeepSpeed engine pass the engine itself, or name modules in include"
        )
    return targets


def gated_attentions(config: EMPConfig, backend: Backend) -> list[HeadOutputs]:
    """Return where the outputs of the heads pass by that have gates, in the order of their layers."""
    return [target.heads for target in _unit_targets(config, backend) if target.heads is not None]


def _unit_layer(target: UnitTarget, segments: dict[int, Segment], criterion: Criterion, backend: Backend) -> UnitLayer:
    members = [
        Member(
            segment=segments[id(m.weight.parameter)],
            dims=m.dims,
            unit_of=m.unit_of,
            masked=m.masked,
            scored=m.scored,
            role=m.role,
        )
        for m in target.members
    ]
    shows_norms = isinstance(criterion, OutputNorm)
    observer = _unit_observer(target, shows_norms) if criterion.needs == "activations" else None
    return UnitLayer(target.name, target.units, members, backend, observer, target.least)


def _unit_observer(target: UnitTarget, shows_norms: bool) -> Observer | None:
    if target.experts is not None:
        shown: Shown = "outputs" if target.whole_experts else "hidden"
        return ExpertActivity(target.name, target.experts, shown) if can_be_watched(target.experts) else None
    if shows_norms and target.heads is not None:
        return HeadNorms(target.heads)
    if target.observed is None:
        return None
    module, side = target.observed
    return ActivationSizes(target.name, module, target.units, side)


def _check_masked_once(targets: Sequence[UnitTarget]) -> None:
    masked_by: dict[int, str] = {}
    for target in targets:
        for member in target.members:
            if not member.masked:
                continue
            other = masked_by.setdefault(id(member.weight.parameter), target.name)
            if other != target.name:
                raise ValueError(
                    f"{other!r} and {target.name!r} both prune {member.weight.name!r}, which they share; exclude one"
                )
