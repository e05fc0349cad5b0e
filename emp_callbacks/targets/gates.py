"""Layers whose outputs are multiplied: gated MLPs, whose units are pruned together, and factors for other channels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import fx, nn

from emp_callbacks.targets.dataflow import Dataflow, Place
from emp_callbacks.targets.tracing import called
from emp_callbacks.targets.unit_search import UnitSearch, child, is_dense, is_depthwise, is_layer, own

# Where a module's forward cannot be traced: the names of two layers whose outputs are multiplied and of what reads the
# product (Llama, timm's SwiGLU, T5, Meta's Llama), and of one whose halves are.
_GATED = (
    ("gate_proj", "up_proj", "down_proj"),
    ("fc1_g", "fc1_x", "fc2"),
    ("wi_0", "wi_1", "wo"),
    ("w1", "w3", "w2"),
)
_GATED_IN_ONE = (("gate_up_proj", "down_proj"), ("w12", "w3"))
_HALVES = ("chunk", "tensor_split", "split", "split_with_sizes")
_SIZES = ("chunks", "indices_or_sections", "split_size_or_sections", "split_size", "split_sizes")
_MOST_IN_FACTORS = 3


class Gated(NamedTuple):
    """Layers whose outputs, or one whose halves, are multiplied unit by unit.

    Attributes:
        owner: The module that gives the name: the layer itself if it is one.
        parts: One or two layers.
        units: How many products there are.
        reader: The layer that reads them, or the first of several.
        place: Where they are multiplied; None where only names say so.
    """

    owner: nn.Module
    parts: tuple[nn.Module, ...]
    units: int
    reader: nn.Module
    place: Place | None


def find_gated(search: UnitSearch, flow: Dataflow) -> list[Gated]:
    """Return the gated layers of a model; a layer that takes part in several products is none."""
    found = [gated for module, graph in flow.graphs() for gated in _products(search, flow, module, graph)]
    taken = Counter(part for gated in found for part in gated.parts)
    found = [gated for gated in found if all(taken[part] == 1 for part in gated.parts)]
    unknown = [module for module in search.modules() if not flow.is_known(module)]
    return found + [gated for module in unknown if (gated := _by_name(search, module)) is not None]


def factors(flow: Dataflow, place: Place) -> list[nn.Module]:
    """Return the layers that compute from a value what that value is multiplied with: few, as in excitation."""
    operands = place.node.all_input_nodes
    if called(place.node) not in ("mul", "multiply") or len(operands) != 2:
        return []
    for value, other in (operands, operands[::-1]):
        computed, depends = _between(value, other)
        callees = [flow.callee(Place(place.module, node)) for node in computed]
        layers = [part for callee in callees if callee is not None for part in callee.modules() if is_layer(part)]
        if depends and sum(not is_depthwise(layer) for layer in layers) <= _MOST_IN_FACTORS:
            return layers
    return []


def _between(value: fx.Node, result: fx.Node) -> tuple[list[fx.Node], bool]:
    """Return the nodes that a result is computed by, no further back than a value, and whether it depends on that."""
    nodes, depends, waiting = [result], False, [result]
    while waiting:
        for node in waiting.pop().all_input_nodes:
            depends = depends or node is value
            if node is not value and node not in nodes:
                nodes.append(node)
                waiting.append(node)
    return nodes, depends


def _products(search: UnitSearch, flow: Dataflow, module: nn.Module, graph: fx.Graph) -> Iterator[Gated]:
    for node in graph.nodes:
        place = Place(module, node)
        operands = [Place(module, one) for one in node.all_input_nodes if not one.meta["is_constant"]]
        is_glu = called(node) == "glu" or isinstance(flow.callee(place), nn.GLU)
        if is_glu and len(operands) == 1:
            parts, of = _sources(flow, operands), 2
        elif called(node) in ("mul", "multiply") and len(operands) == 2 and not factors(flow, place):
            halves = [_half(search, flow, one) for one in operands]
            known = [half for half in halves if half is not None]
            if {which for _, which in known} == {0, 1} and known[0][0] is known[1][0]:
                parts, of = [known[0][0]], 2
            else:
                parts, of = _sources(flow, operands), 1
        else:
            continue
        if len(parts) == 3 - of and (gated := _gated(search, flow, place, parts, of)) is not None:
            yield gated


def _gated(search: UnitSearch, flow: Dataflow, place: Place, parts: list[nn.Module], of: int) -> Gated | None:
    outputs = {search.outputs(part) for part in parts}
    if len(outputs) > 1 or (count := outputs.pop()) % of:
        return None
    met = flow.walk([place], {"pass", "norm", "activation"})
    readers = [flow.callee(one.place) for one in met if one.kind == "layer" and one.place is not None]
    known = [reader for reader in readers if is_layer(reader) and search.inputs(reader) == count // of]
    if not known or len(known) < len(readers):
        return None
    return Gated(parts[0] if of == 2 else place.module, tuple(parts), count // of, known[0], place)


def _sources(flow: Dataflow, places: list[Place]) -> list[nn.Module]:
    """Return the different layers whose outputs these values are, each changed by itself; [] if one is another's."""
    found = [flow.sources(place) for place in places]
    layers = [layer for calls in found for call in calls if (layer := flow.callee(call)) is not None]
    return list(dict.fromkeys(layers)) if all(found) else []


def _half(search: UnitSearch, flow: Dataflow, place: Place) -> tuple[nn.Module, int] | None:
    """Return the layer of whose outputs a value is the first or the second half, changed by itself, and which."""
    node, callee = place.node, flow.callee(place)
    if called(node) != "getitem":
        before = flow.before(place)
        return None if before is None or is_layer(callee) else _half(search, flow, before)
    whole: Any = node.args[0]
    index: Any = node.args[1]
    if isinstance(index, tuple):  # [..., :n] or [..., n:]
        layer, which = _sole_source(flow, Place(place.module, whole)), _sliced(index)
        return None if layer is None or which is None or 2 * which[1] != search.outputs(layer) else (layer, which[0])
    if called(whole) not in _HALVES or index not in (0, 1):
        return None
    layer = _sole_source(flow, Place(place.module, whole.args[0]))
    sizes = next(iter([*whole.args[1:2], *(whole.kwargs[key] for key in _SIZES if key in whole.kwargs)]), None)
    if layer is None or sizes is None:
        return None
    outputs = search.outputs(layer)
    halved = sizes == 2 if called(whole) in ("chunk", "tensor_split") else sizes in (outputs // 2, [outputs // 2] * 2)
    return (layer, index) if halved else None


def _sliced(index: tuple[object, ...]) -> tuple[int, int] | None:
    """Return which half an index takes and where it begins or ends; None if it takes something else."""
    cuts = [one for one in index if isinstance(one, slice) and one != slice(None)]
    if len(cuts) != 1 or cuts[0].step is not None or not isinstance(cuts[0].start or cuts[0].stop, int):
        return None
    return (1, cuts[0].start) if cuts[0].stop is None else (0, cuts[0].stop) if not cuts[0].start else None


def _sole_source(flow: Dataflow, place: Place) -> nn.Module | None:
    layers = _sources(flow, [place])
    return layers[0] if len(layers) == 1 else None


def _by_name(search: UnitSearch, module: nn.Module) -> Gated | None:
    for names in _GATED:
        first, second, reader = (child(module, name) for name in names)
        if is_dense(first) and is_dense(second) and is_dense(reader):
            same = search.shape(own(first, "weight")) == search.shape(own(second, "weight"))
            if same and search.outputs(first) == search.inputs(reader):
                return Gated(module, (first, second), search.outputs(first), reader, None)
    for name, last in _GATED_IN_ONE:
        layer, reader = child(module, name), child(module, last)
        if is_dense(layer) and is_dense(reader) and search.outputs(layer) == 2 * search.inputs(reader):
            return Gated(layer, (layer,), search.inputs(reader), reader, None)
    return None
