"""What pruned neurons and channels take with them, read off Torch-Pruning's dependency graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from emp_callbacks.extras import needs
from emp_callbacks.shrinking.report import ShrunkLayer
from emp_callbacks.shrinking.surgery import Surgery, axes_of, axis_size, cut_of, is_conv1d
from emp_callbacks.shrinking.zero_inputs import zero_inputs
from emp_callbacks.targets.units import UnitTarget

__all__ = ["cut_channels"]


def cut_channels(
    model: nn.Module,
    layers: Sequence[tuple[UnitTarget, Tensor]],
    cuttable: set[nn.Module],
    run: Callable[..., Any],
    surgery: Surgery,
) -> list[ShrunkLayer]:
    """Add to `surgery` what the pruned neurons and channels of all layers take with them.

    Args:
        model: The masked model.
        layers: Each layer with its pruned units, bool, shape (units,).
        cuttable: Modules that can be cut.
        run: Calls the model on the example, with other parameters if given `parameters`.
        surgery: Is changed.

    Raises:
        ImportError: torch-pruning is not installed.
        NotImplementedError: Torch-Pruning cannot follow the model.
    """
    rows = [_rows(model, target, pruned) for target, pruned in layers]
    removed = _removable(model, {module: gone for own in rows for module, gone in own.items()}, cuttable, run)
    names = {module: name for name, module in model.named_modules()}
    for (module, axis), gone in removed.items():
        left = torch.ones(axis_size(module, axis), dtype=torch.bool)
        left[list(gone)] = False
        surgery.setdefault(names[module], {})[axis] = cut_of(left)
    report = []
    for (target, pruned), own in zip(layers, rows, strict=True):
        taken = sum(len(removed.get((module, "outputs"), set()) & {*gone}) for module, gone in own.items())
        per_unit = sum(map(len, own.values())) // int(pruned.sum())
        report.append(ShrunkLayer(target.name, target.units, int(pruned.sum()), taken // per_unit))
    return report


def _rows(model: nn.Module, target: UnitTarget, pruned: Tensor) -> dict[nn.Module, list[int]]:
    """Return the outputs of each of the target's layers that belong to pruned units."""
    return {
        model.get_submodule(member.weight.name.rpartition(".")[0]): pruned[member.unit_of].nonzero().flatten().tolist()
        for member in target.members
        if member.role == "weight"
    }


def _removable(
    model: nn.Module, pruned: Mapping[nn.Module, list[int]], cuttable: set[nn.Module], run: Callable[..., Any]
) -> dict[tuple[nn.Module, str], set[int]]:
    """Return, for each module and axis, the indices that can go without changing any output.

    Torch-Pruning's dependency graph says which indices of which modules go together. They can go if everything that
    reads them reads zeros: a layer that is added to a pruned one and keeps the unit holds it in place.
    """
    graph, zeros = _dependency_graph(model, run), zero_inputs(model, run)
    removed: dict[tuple[nn.Module, str], set[int]] = {}
    for module, indices in pruned.items():
        if module not in graph.module2node or module not in cuttable:
            continue
        remove = graph.get_pruner_of_module(module).prune_out_channels
        stay = _must_stay(graph, graph.get_pruning_group(module, remove, indices), zeros, cuttable)
        if going := [i for i in indices if i not in stay]:
            for item in graph.get_pruning_group(module, remove, going):
                if (part := item.dep.target.module) in cuttable:
                    removed.setdefault((part, _axis(graph, item)), set()).update(item.idxs)
    return removed


def _must_stay(graph: Any, group: Any, zeros: Mapping[nn.Module, Tensor], cuttable: set[nn.Module]) -> set[int]:
    """Return the units of the group's first layer that cannot be removed."""
    stay: set[int] = set()
    everything = set(group[0].idxs)
    read = False
    for item in group:
        module = item.dep.target.module
        if _is_operation(module):
            continue
        if module not in cuttable:  # a layer norm, an embedding, the model's output: they need all of it
            return everything
        axis = _axis(graph, item)
        if max(item.idxs) >= axis_size(module, axis):  # the graph misread a reshape
            return everything
        if axis == "inputs":
            read = True
            zero = zeros.get(module)
            stay |= {root for i, root in zip(item.idxs, item.root_idxs, strict=True) if zero is None or not zero[i]}
    if not read:
        return everything
    return stay | _last_units(graph, group, stay, cuttable)


def _last_units(graph: Any, group: Any, stay: set[int], cuttable: set[nn.Module]) -> set[int]:
    """Return a unit to keep where a layer would be left with none."""
    last = set()
    for item in group:
        if item.dep.target.module not in cuttable:
            continue
        going = [(i, root) for i, root in zip(item.idxs, item.root_idxs, strict=True) if root not in stay]
        if len({i for i, _ in going}) == axis_size(item.dep.target.module, _axis(graph, item)):
            last.add(going[0][1])
    return last


def _is_operation(module: Any) -> bool:
    """Return whether the graph's node is an operation without parameters, not the model's output."""
    kind = type(module).__name__
    own_parameters = isinstance(module, nn.Parameter) or next(module.parameters(recurse=False), None) is not None
    return not own_parameters and kind.startswith("_") and kind.endswith("Op") and kind != "_OutputOp"


def _axis(graph: Any, item: Any) -> str:
    one_sided = "inputs" not in axes_of(item.dep.target.module)
    return "outputs" if one_sided or graph.is_out_channel_pruning_fn(item.dep.handler) else "inputs"


# ---- the graph -----------------------------------------------------------------------------------------------------


def _dependency_graph(model: nn.Module, run: Callable[..., Any]) -> Any:
    """Return Torch-Pruning's graph of the model; it is only asked, the cuts are made here."""
    needs("removing neurons and channels", "shrink", "torch_pruning")
    import torch_pruning as tp

    kinds = {type(module) for module in model.modules() if is_conv1d(module)}
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
    class Conv1DPruner(tp.BasePruningFunc):  # type: ignore[misc]
        """transformers' Conv1D, of which the graph needs the sizes."""

        def prune_out_channels(self, layer: nn.Module, idxs: Sequence[int]) -> nn.Module:
            raise NotImplementedError

        def prune_in_channels(self, layer: nn.Module, idxs: Sequence[int]) -> nn.Module:
            raise NotImplementedError

        def get_out_channels(self, layer: nn.Module) -> int:
            return axis_size(layer, "outputs")

        def get_in_channels(self, layer: nn.Module) -> int:
            return axis_size(layer, "inputs")

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
