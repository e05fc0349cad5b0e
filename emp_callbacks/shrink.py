"""Pruned heads, neurons and channels taken out of a model for good: smaller tensors, the same outputs."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from glob import escape
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from emp_callbacks.targets.heads import attention_heads
from emp_callbacks.targets.neurons import neurons
from emp_callbacks.targets.units import UnitTarget

__all__ = ["SHRUNK_KEY", "Cut", "ShrinkReport", "ShrunkLayer", "load_shrunk", "pruned_units", "shrink"]

SHRUNK_KEY = "emp_shrunk"
"""Key of the safetensors metadata under which a file of a shrunk model says what was cut."""

_PROBES = 12  # runs with random weights; see _zero_inputs
_TOLERANCE = 1e-4


class Cut(NamedTuple):
    """What is left of one axis of a module: `kept`, increasing indices below `of`, its size in the dense model."""

    of: int
    kept: list[int]


Surgery = dict[str, dict[str, Cut]]
"""Module name -> axis ("outputs", "inputs", or "heads" of an attention module) -> what is left of it."""


class ShrunkLayer(NamedTuple):
    """One layer with pruned units; those that are pruned but not removed had to stay.

    A unit stays where what reads it is not zero without it: another layer is added to it that keeps the unit, or its
    zero becomes another value on the way (sigmoid, layer norm). A layer's last unit stays, too.
    """

    name: str
    units: int
    pruned: int
    removed: int


@dataclass(frozen=True, kw_only=True)
class ShrinkReport:
    """What `shrink` did.

    Attributes:
        layers: Every layer that has pruned units.
        surgery: What is left of each module that was cut.
        parameters: Number of parameters before and after; tied ones count once.
        flops: Floating-point operations of the example before and after, as torch's FlopCounterMode counts them.
        difference: Largest |difference| of the outputs on the example, relative to their largest magnitude.
    """

    layers: tuple[ShrunkLayer, ...]
    surgery: Surgery
    parameters: tuple[int, int]
    flops: tuple[int, int]
    difference: float

    def metadata(self) -> dict[str, str]:
        """Return what a safetensors file of the shrunk model must carry for `load_shrunk`."""
        cuts = {name: {axis: cut._asdict() for axis, cut in axes.items()} for name, axes in self.surgery.items()}
        return {SHRUNK_KEY: json.dumps({"format": 1, "modules": cuts}, separators=(",", ":"))}


def pruned_units(model: nn.Module) -> dict[str, Tensor]:
    """Return which heads and neurons of a masked model are alive, for every layer that has dead ones.

    A head is dead if its columns of the output projection are zero; a neuron if its weights and bias are, and the
    scale and shift of its batch norm where it has one.

    Returns:
        Module name -> bool, shape (units,), True = alive, on the CPU.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> _ = nn.init.ones_(model[0].weight), nn.init.zeros_(model[0].bias)
        >>> _ = model[0].weight.data[1].zero_()
        >>> pruned_units(model)
        {'0': tensor([ True, False,  True])}
    """
    alive = {target.name: _alive(target) for target in _all_units(model)}
    return {name: units for name, units in alive.items() if not units.all()}


def shrink(
    model: nn.Module,
    kept: Mapping[str, Tensor],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> ShrinkReport:
    """Remove pruned heads, neurons and channels from a masked model, in place, with all that depends on them.

    The parameters become new, smaller ones: an optimizer has to be made anew.

    Args:
        model: A plain model whose pruned units are zero, as a pruner leaves them; not sharded.
        kept: Module name -> bool, shape (units,), True = kept: `pruner.masks`, or `pruned_units(model)`.
        args: Positional arguments of an example call, on the model's device; the outputs before and after are
            compared on it.
        kwargs: Keyword arguments of the example call.

    Returns:
        What was removed and what had to stay, parameter counts and FLOPs, and the largest difference.

    Raises:
        ImportError: Neurons are to be removed and torch-pruning is not installed.
        ValueError: `kept` names no such layer, or has another number of units.
        NotImplementedError: Heads of an attention that cannot have fewer of them, or the shrunk model does not run;
            the model is as it was.
        ArithmeticError: The outputs changed by more than 1e-4 (relative; 8 units of rounding in half precision): the
            model was not masked, or its zeros become something else on their way. The model is as it was.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> with torch.no_grad():
        ...     model[0].weight[1] = 0
        ...     model[0].bias[1] = 0
        >>> shrink(model, {"0": torch.tensor([True, False, True])}, (torch.ones(1, 2),)).parameters
        (13, 9)
        >>> model[2].in_features
        2
    """
    run = partial(_outputs, model, tuple(args), dict(kwargs or {}))
    with _evaluating(model):
        before, flops_before = _measured(run)
        parameters_before = _parameter_count(model)
        surgery, layers = _plan(model, kept, run)
        undo = _snapshot(model, surgery)
        try:
            _perform(model, surgery)
            after, flops_after = _run_shrunk(run)
            difference = _difference(before, after)
        except Exception:
            undo()
            raise
    return ShrinkReport(
        layers=tuple(layers),
        surgery=surgery,
        parameters=(parameters_before, _parameter_count(model)),
        flops=(flops_before, flops_after),
        difference=difference,
    )


def load_shrunk(model: nn.Module, file: str | os.PathLike[str]) -> nn.Module:
    """Cut a dense model to the shape of a file that `emp export --shrink` or `emp prune --shrink` wrote, and load it.

    Args:
        model: The dense architecture, freshly made; changed in place. Its weights do not matter.
        file: The safetensors file.

    Returns:
        The model.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file does not say what was cut, or belongs to another architecture; the model may be cut
            already then.
    """
    from safetensors import safe_open
    from safetensors.torch import load_file

    if not os.path.isfile(file):
        raise FileNotFoundError(f"{os.fspath(file)} does not exist")
    with safe_open(file, framework="pt") as opened:
        text = (opened.metadata() or {}).get(SHRUNK_KEY)
    if text is None:
        raise ValueError(
            f"{os.fspath(file)} is not a shrunk model (no {SHRUNK_KEY!r} in its metadata); "
            "load it with model.load_state_dict(safetensors.torch.load_file(file))"
        )
    try:
        modules = json.loads(text)["modules"]
        surgery = {name: {axis: Cut(**cut) for axis, cut in axes.items()} for name, axes in modules.items()}
        _perform(model, surgery)
        model.load_state_dict(load_file(file))
    except (AttributeError, RuntimeError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:400]
        raise ValueError(f"{os.fspath(file)} does not fit this {type(model).__name__}: {reason}") from error
    return model


# ---- what is dead --------------------------------------------------------------------------------------------------


def _all_units(model: nn.Module) -> list[UnitTarget]:
    found = []
    for finder in (attention_heads, neurons):
        with suppress(ValueError):  # a model need not have both
            found += finder(model)
    return found


def _alive(target: UnitTarget) -> Tensor:
    alive = torch.zeros(target.units, dtype=torch.bool)
    for member in target.members:
        if member.masked:
            slices = member.weight.parameter.detach().movedim(member.dim, 0)
            live = (slices.reshape(len(slices), -1) != 0).any(1).cpu() & (member.unit_of >= 0)
            alive[member.unit_of[live]] = True
    return alive


# ---- what is cut ---------------------------------------------------------------------------------------------------


def _plan(model: nn.Module, kept: Mapping[str, Tensor], run: Callable[[], Any]) -> tuple[Surgery, list[ShrunkLayer]]:
    """Return what to cut off every module, and what that means for each layer in `kept` with pruned units."""
    surgery: Surgery = {}
    layers, channels = [], []
    for name, mask in kept.items():
        if mask.all():
            continue
        target = _target(model, name)
        _check_units(name, mask.numel(), target.units)
        if any(member.role == "output" for member in target.members):
            layers.append(_cut_heads(model, target, ~mask.cpu(), surgery))
        else:
            channels.append((target, ~mask.cpu()))
    if channels:
        layers += _cut_channels(model, channels, run, surgery)
    return surgery, layers


def _target(model: nn.Module, name: str) -> UnitTarget:
    """Return the layer called `name` and its units."""
    for finder in (attention_heads, neurons):
        with suppress(ValueError):  # of the other kind, or there is none of this kind
            for target in finder(model, include=[escape(name)]):
                if target.name == name:
                    return target
    raise ValueError(
        f"{type(model).__name__} has no layer {name!r} with heads or neurons that can be taken out; "
        "pass the model that the masks belong to"
    )


def _check_units(name: str, given: int, units: int) -> None:
    if given != units:
        raise ValueError(f"the mask of {name!r} is for {given} units, the layer has {units}; pass its own pruner.masks")


def _cut_heads(model: nn.Module, target: UnitTarget, pruned: Tensor, surgery: Surgery) -> ShrunkLayer:
    """Add to `surgery` what the heads of one attention take with them."""
    if isinstance(model.get_submodule(target.name), nn.MultiheadAttention):
        raise NotImplementedError(
            f"{target.name!r} is a torch.nn.MultiheadAttention, whose width must be num_heads * head_dim = embed_dim: "
            "it cannot have fewer heads. Leave it out with exclude, or export without --shrink"
        )
    alive = ~pruned
    if pruned.all():  # an attention without heads is none
        alive[0] = True
    kept_or_none = torch.cat([alive, torch.tensor([True])])  # the last is for -1: of no head, always kept
    for member in target.members:
        owner = member.weight.name.rpartition(".")[0]
        _check_cuttable(model, owner, target.name)
        axis = "inputs" if member.role == "output" else "outputs"
        surgery.setdefault(owner, {})[axis] = _cut_of(kept_or_none[member.unit_of])
    surgery.setdefault(target.name, {})["heads"] = _cut_of(alive)
    return ShrunkLayer(target.name, target.units, int(pruned.sum()), int((~alive).sum()))


def _cut_channels(
    model: nn.Module, layers: Sequence[tuple[UnitTarget, Tensor]], run: Callable[[], Any], surgery: Surgery
) -> list[ShrunkLayer]:
    """Add to `surgery` what the neurons and channels of all layers take with them."""
    rows = [_rows(model, target, pruned) for target, pruned in layers]
    removed = _removable(model, {module: gone for own in rows for module, gone in own.items()}, run)
    names = {module: name for name, module in model.named_modules()}
    for (module, axis), gone in removed.items():
        left = torch.ones(_size(module, axis), dtype=torch.bool)
        left[list(gone)] = False
        surgery.setdefault(names[module], {})[axis] = _cut_of(left)
    report = []
    for (target, pruned), own in zip(layers, rows, strict=True):
        taken = sum(len(removed.get((module, "outputs"), set()) & {*gone}) for module, gone in own.items())
        per_unit = sum(map(len, own.values())) // int(pruned.sum())
        report.append(ShrunkLayer(target.name, target.units, int(pruned.sum()), taken // per_unit))
    return report


def _rows(model: nn.Module, target: UnitTarget, pruned: Tensor) -> dict[nn.Module, list[int]]:
    """Return the outputs of each of the target's layers that belong to pruned units."""
    return {
        model.get_submodule(member.weight.name.rpartition(".")[0]): torch.isin(member.unit_of, pruned.nonzero())
        .nonzero()
        .flatten()
        .tolist()
        for member in target.members
        if member.role == "weight"
    }


def _cut_of(left: Tensor) -> Cut:
    return Cut(len(left), left.nonzero().flatten().tolist())


def _check_cuttable(model: nn.Module, owner: str, attention: str) -> None:
    if not _cuttable(model.get_submodule(owner), _uses(model)):
        raise NotImplementedError(
            f"{owner!r} of {attention!r} is a {type(model.get_submodule(owner)).__name__} that cannot be cut (of an "
            "unknown kind, or its weight is tied to another's); export it without --shrink"
        )


def _removable(
    model: nn.Module, pruned: Mapping[nn.Module, list[int]], run: Callable[[], Any]
) -> dict[tuple[nn.Module, str], set[int]]:
    """Return, for each module and axis, the indices that can go without changing any output.

    Torch-Pruning's dependency graph says which indices of which modules go together. They can go if everything that
    reads them reads zeros: a layer that is added to a pruned one and keeps the unit holds it in place.
    """
    graph = _dependency_graph(model, run)
    zeros, uses = _zero_inputs(model, run), _uses(model)
    removed: dict[tuple[nn.Module, str], set[int]] = {}
    for module, indices in pruned.items():
        if module not in graph.module2node or not _cuttable(module, uses):
            continue
        remove = graph.get_pruner_of_module(module).prune_out_channels
        stay = _must_stay(graph, graph.get_pruning_group(module, remove, indices), zeros, uses)
        if going := [i for i in indices if i not in stay]:
            for item in graph.get_pruning_group(module, remove, going):
                if _kind(part := item.dep.target.module) is not None:
                    removed.setdefault((part, _axis(graph, item)), set()).update(item.idxs)
    return removed


def _must_stay(graph: Any, group: Any, zeros: Mapping[nn.Module, Tensor], uses: Counter[int]) -> set[int]:
    """Return the units of the group's first layer that cannot be removed."""
    stay: set[int] = set()
    everything = set(group[0].idxs)
    read = False
    for item in group:
        module = item.dep.target.module
        if _is_operation(module):
            continue
        if not _cuttable(module, uses):  # a layer norm, an embedding, the model's output: they need all of it
            return everything
        axis = _axis(graph, item)
        if max(item.idxs) >= _size(module, axis):  # the graph misread a reshape
            return everything
        if axis == "inputs":
            read = True
            zero = zeros.get(module)
            stay |= {root for i, root in zip(item.idxs, item.root_idxs, strict=True) if zero is None or not zero[i]}
    if not read:
        return everything
    return stay | _last_units(graph, group, stay)


def _last_units(graph: Any, group: Any, stay: set[int]) -> set[int]:
    """Return a unit to keep where a layer would be left with none."""
    last = set()
    for item in group:
        if _kind(item.dep.target.module) is None:
            continue
        going = [(i, root) for i, root in zip(item.idxs, item.root_idxs, strict=True) if root not in stay]
        if len({i for i, _ in going}) == _size(item.dep.target.module, _axis(graph, item)):
            last.add(going[0][1])
    return last


def _dependency_graph(model: nn.Module, run: Callable[[], Any]) -> Any:
    """Return Torch-Pruning's graph of the model; it is only asked, the cuts are made here."""
    try:
        import torch_pruning as tp
    except ImportError as error:
        raise ImportError(
            "removing neurons and channels needs torch-pruning: pip install 'emp-callbacks[shrink]'"
        ) from error

    kinds = {type(module) for module in model.modules() if _kind(module) == "conv1d"}
    try:
        with _all_trainable(model):
            graph = tp.DependencyGraph().build_dependency(
                model,
                None,
                forward_fn=lambda *_: run(),
                customized_pruners={kind: _conv1d_pruner(tp) for kind in kinds},
                verbose=False,
            )
    except Exception as error:
        raise NotImplementedError(
            f"Torch-Pruning cannot follow this {type(model).__name__} ({type(error).__name__}: {error}); "
            "call it without a cache (use_cache=False) if it has one, or export without --shrink"
        ) from error
    for node in graph.module2node.values():
        if type(node.module).__name__ == "_SplitOp":  # Torch-Pruning ignores splits behind position embeddings
            node.enable_index_mapping = True
    return graph


def _conv1d_pruner(tp: Any) -> Any:
    class Conv1DPruner(tp.BasePruningFunc):
        """transformers' Conv1D, of which the graph needs the sizes."""

        def prune_out_channels(self, layer: nn.Module, idxs: Sequence[int]) -> nn.Module:
            raise NotImplementedError

        def prune_in_channels(self, layer: nn.Module, idxs: Sequence[int]) -> nn.Module:
            raise NotImplementedError

        def get_out_channels(self, layer: nn.Module) -> int:
            return _size(layer, "outputs")

        def get_in_channels(self, layer: nn.Module) -> int:
            return _size(layer, "inputs")

    return Conv1DPruner()


@contextmanager
def _all_trainable(model: nn.Module) -> Iterator[None]:
    """Let autograd, off which the graph is read, see every parameter in the block."""
    frozen = [p for p in model.parameters() if p.is_floating_point() and not p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def _is_operation(module: Any) -> bool:
    """Return whether the graph's node is an operation without parameters, not the model's output."""
    kind = type(module).__name__
    own_parameters = isinstance(module, nn.Parameter) or next(module.parameters(recurse=False), None) is not None
    return not own_parameters and kind.startswith("_") and kind.endswith("Op") and kind != "_OutputOp"


def _axis(graph: Any, item: Any) -> str:
    kind = _kind(item.dep.target.module)
    one_sided = kind in ("batch_norm", "depthwise")
    return "outputs" if one_sided or graph.is_out_channel_pruning_fn(item.dep.handler) else "inputs"


@torch.no_grad()
def _zero_inputs(model: nn.Module, run: Callable[..., Any]) -> dict[nn.Module, Tensor]:
    """Return, for each layer that reads channels, which of them are zero whatever the weights that are not.

    Besides as they are, the weights are multiplied by random numbers: zeros stay zeros, so a channel that is exactly
    zero in all runs is so by its structure (pruned rows, also behind batch norms, products and activations that map
    0 to 0), and a ReLU that happens to be silent on the example is not mistaken for it.
    """
    zeros: dict[nn.Module, Tensor] = {}

    def look(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if inputs and isinstance(inputs[0], Tensor):
            rows = inputs[0].movedim(_channel_dim(module), 0)
            zero = (rows.reshape(len(rows), -1) == 0).all(1).cpu()
            zeros[module] = zeros[module] & zero if module in zeros else zero

    readers = [module for module in model.modules() if "inputs" in _AXES.get(_kind(module) or "", {})]
    hooks = [module.register_forward_pre_hook(look) for module in readers]
    try:
        run()
        for probe in range(_PROBES):
            # In pairs: what a bias alone holds below zero in one, it lifts above zero in the other.
            generator, sign = torch.Generator().manual_seed(probe // 2), (-1) ** probe
            run(parameters={name: _drawn(p, generator, sign) for name, p in model.named_parameters()})
    finally:
        for hook in hooks:
            hook.remove()
    return zeros


def _drawn(parameter: Tensor, generator: torch.Generator, sign: int) -> Tensor:
    """Return the parameter times random factors, one per row times one per column; biases and scales also by `sign`."""
    if not parameter.is_floating_point():
        return parameter
    drawn = parameter * sign if parameter.dim() == 1 else parameter
    for dim, size in enumerate(parameter.shape):
        factors = 0.5 + torch.rand(size, generator=generator)
        factors *= torch.randint(0, 2, (size,), generator=generator) * 2 - 1
        drawn = drawn * factors.to(parameter).reshape(-1, *[1] * (parameter.dim() - dim - 1))
    return drawn


def _channel_dim(module: nn.Module) -> int:
    return 1 - module.weight.dim() if _kind(module) == "conv" else -1  # type: ignore[operator]


# ---- kinds of modules ----------------------------------------------------------------------------------------------


class _Axis(NamedTuple):
    """The tensors that lie along an axis of a module, by dimension, and the attributes that state its size."""

    dims: dict[str, int]
    sizes: tuple[str, ...]


_AXES: dict[str, dict[str, _Axis]] = {
    "linear": {
        "outputs": _Axis({"weight": 0, "bias": 0}, ("out_features",)),
        "inputs": _Axis({"weight": 1}, ("in_features",)),
    },
    "conv1d": {"outputs": _Axis({"weight": 1, "bias": 0}, ("nf",)), "inputs": _Axis({"weight": 0}, ("nx",))},
    "conv": {
        "outputs": _Axis({"weight": 0, "bias": 0}, ("out_channels",)),
        "inputs": _Axis({"weight": 1}, ("in_channels",)),
    },
    "depthwise": {"outputs": _Axis({"weight": 0, "bias": 0}, ("out_channels", "in_channels", "groups"))},
    "batch_norm": {
        "outputs": _Axis({"weight": 0, "bias": 0, "running_mean": 0, "running_var": 0}, ("num_features",)),
    },
}

# What attention modules call the number of their heads, and the width of all heads together.
_HEAD_COUNTS = ("num_heads", "num_attention_heads", "num_key_value_heads", "num_kv_heads", "n_heads", "n_head")
_HEAD_WIDTHS = ("attn_dim", "kv_dim", "all_head_size", "split_size")


def _kind(module: Any) -> str | None:
    """Return the row of _AXES that describes a module; None if none does."""
    kind = _kind_by_class(module)
    if kind is None:
        return None
    held = {name for name, value in {**module._parameters, **module._buffers}.items() if value is not None}
    known = {name for axis in _AXES[kind].values() for name in axis.dims}
    return kind if held <= known | {"num_batches_tracked"} else None


def _kind_by_class(module: Any) -> str | None:
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return "batch_norm"
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        depthwise = module.groups == module.in_channels == module.out_channels
        return "conv" if module.groups == 1 else "depthwise" if depthwise else None
    return "conv1d" if type(module).__name__ == "Conv1D" and isinstance(module, nn.Module) else None


def _uses(model: nn.Module) -> Counter[int]:
    """Return how many modules hold each parameter, by its id."""
    return Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)


def _cuttable(module: Any, uses: Counter[int]) -> bool:
    """Return whether a module has a known kind and its parameters to itself."""
    return _kind(module) is not None and all(uses[id(p)] == 1 for p in module._parameters.values() if p is not None)


def _size(module: nn.Module, axis: str) -> int:
    first = next(iter(_AXES[_kind(module) or ""][axis].sizes))
    return int(getattr(module, first))


# ---- the cut -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _perform(model: nn.Module, surgery: Surgery) -> None:
    for name, axes in surgery.items():
        module = model.get_submodule(name)
        for axis, cut in axes.items():
            if axis == "heads":
                _set_heads(module, cut)
            else:
                _cut(name, module, axis, cut)


def _cut(name: str, module: nn.Module, axis: str, cut: Cut) -> None:
    known = _AXES.get(_kind(module) or "", {}).get(axis)
    if known is None or _size(module, axis) != cut.of:
        raise ValueError(f"{name!r} has no {axis} of size {cut.of} to cut; start from the dense architecture")
    for tensor, dim in known.dims.items():
        value = getattr(module, tensor, None)
        if value is not None:
            left = value.detach().index_select(dim, torch.tensor(cut.kept, device=value.device))
            is_parameter = isinstance(value, nn.Parameter)
            setattr(module, tensor, nn.Parameter(left, value.requires_grad) if is_parameter else left)
    for attribute in known.sizes:
        setattr(module, attribute, len(cut.kept))


def _set_heads(attention: nn.Module, cut: Cut) -> None:
    """Tell an attention and its parts how many heads are left."""
    for module in attention.modules():
        for attribute in (*_HEAD_COUNTS, *_HEAD_WIDTHS):
            size = vars(module).get(attribute)
            if isinstance(size, int):
                setattr(module, attribute, size * len(cut.kept) // cut.of)


def _snapshot(model: nn.Module, surgery: Surgery) -> Callable[[], None]:
    """Return a function that gives every module that the surgery touches its present tensors and sizes back."""
    touched = {part for name in surgery for part in model.get_submodule(name).modules()}
    saved = [(part, vars(part).copy(), part._parameters.copy(), part._buffers.copy()) for part in touched]

    def undo() -> None:
        for part, attributes, parameters, buffers in saved:
            vars(part).update(attributes)
            part._parameters.update(parameters)
            part._buffers.update(buffers)

    return undo


# ---- running and comparing -----------------------------------------------------------------------------------------


def _outputs(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], parameters: dict[str, Tensor] | None = None
) -> list[Tensor]:
    """Return the floating-point tensors in what the model gives for the example."""
    held = model(*args, **kwargs) if parameters is None else functional_call(model, parameters, args, kwargs)
    return list(_tensors(held))


def _tensors(held: Any) -> Iterator[Tensor]:
    if isinstance(held, Tensor) and held.is_floating_point():
        yield held
    elif isinstance(held, (Mapping, list, tuple)):
        for value in held.values() if isinstance(held, Mapping) else held:
            yield from _tensors(value)


@torch.no_grad()
def _measured(run: Callable[[], list[Tensor]]) -> tuple[list[Tensor], int]:
    with FlopCounterMode(display=False) as counter:
        outputs = run()
    return outputs, counter.get_total_flops()


def _run_shrunk(run: Callable[[], list[Tensor]]) -> tuple[list[Tensor], int]:
    try:
        return _measured(run)
    except Exception as error:
        raise NotImplementedError(
            f"the shrunk model does not run ({' '.join(str(error).split())[:300]}); "
            "leave the layers concerned out with exclude, or export without --shrink"
        ) from error


def _difference(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """Return the largest relative difference; raise ArithmeticError if it is more than rounding."""
    worst = 0.0
    for old, new in zip(before, after, strict=True):
        if old.shape != new.shape:
            raise NotImplementedError(
                f"the model's output would shrink from {tuple(old.shape)} to {tuple(new.shape)}; "
                "leave its layer out with exclude"
            )
        scale = float(old.abs().max()) or 1.0
        relative = float((old - new).abs().max()) / scale
        if not relative <= max(_TOLERANCE, 8 * torch.finfo(old.dtype).eps):  # also if it is NaN
            raise ArithmeticError(
                f"the shrunk model's outputs differ by {relative:.2g} of the largest output: units in `kept` are not "
                "zero in this model (apply the masks first), or zero units still have an effect (on a norm, a sigmoid)"
            )
        worst = max(worst, relative)
    return worst


def _parameter_count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module into evaluation mode for the block."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
