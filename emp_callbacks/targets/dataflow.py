"""What becomes of the outputs of a model's modules: read off what every module's forward does with its children."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Literal, NamedTuple

from torch import fx, nn

from emp_callbacks.targets.activation_modules import is_activation
from emp_callbacks.targets.tracing import called, signature, traced
from emp_callbacks.targets.unit_search import UnitSearch, is_depthwise, is_layer
from emp_callbacks.targets.wrappers import innermost

Kind = Literal[
    "pass",  # each output comes from one unit, and is 0 where that is
    "activation",  # a function of each value by itself
    "norm",
    "depthwise",
    "layer",  # anything that reads its inputs with weights
    "opaque",  # a module that could not be traced
    "sum",
    "product",  # with a value that the unit has no part in
    "layout",  # units are moved to another dimension
    "split",
    "mix",  # values are multiplied as matrices, as in attention
    "other",
    "output",  # of the model
    "unknown",
]

_ACTIVATIONS = {
    *("relu", "relu6", "gelu", "silu", "tanh", "leaky_relu", "elu", "selu", "celu", "mish", "hardswish", "hardtanh"),
    *("softplus", "sigmoid", "hardsigmoid", "logsigmoid", "prelu", "softsign", "threshold", "rrelu", "clamp", "square"),
    *("pow", "exp", "erf", "sin", "neg", "abs", "clip", "clamp_min", "sqrt"),
}
_PASS = {
    *("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout", "contiguous", "to"),
    *("float", "half", "bfloat16", "type", "type_as", "clone", "flatten", "reshape", "view", "squeeze", "unsqueeze"),
    *(
        "reshape_as",
        "view_as",
        "expand_as",
        "mean",
        "sum",
        "amax",
        "getitem",
        "getattr",
        "interpolate",
        "pad",
        "expand",
        "repeat_interleave",
        "masked_fill",
    ),
    *(f"{kind}_pool{d}d" for kind in ("max", "avg", "adaptive_avg", "adaptive_max", "lp") for d in (1, 2, 3)),
}
_SUMS = {"add", "sub", "subtract"}
_PRODUCTS = {"mul", "multiply", "truediv", "div", "divide"}
_LAYOUTS = {"permute", "transpose", "movedim", "swapaxes", "swapdims", "T", "mT", "rearrange", "unfold"}
_MIXES = {"matmul", "bmm", "einsum", "baddbmm", "scaled_dot_product_attention", "softmax"}
_READS = {"linear", "bilinear", "addmm", *(f"conv{t}{d}d" for t in ("", "_transpose") for d in (1, 2, 3))}
_SPLITS = {"split", "chunk", "tensor_split", "unbind", "split_with_sizes"}
_STORES = {"append", "extend", "insert", "setitem", "update"}  # where to is not seen
_SIZES = {"size", "shape", "dim", "ndim", "device", "dtype", "numel", "get_device", "is_floating_point"}
_PASS_MODULES = {f"torch.nn.modules.{name}" for name in ("dropout", "pooling", "padding", "upsampling", "flatten")}


class Place(NamedTuple):
    """A value in a model's forward: what a node of one module's graph puts out."""

    module: nn.Module
    node: fx.Node


class Met(NamedTuple):
    """What a walk came to: of which kind, and where; no place where a value leaves what is known."""

    kind: Kind
    place: Place | None


class Dataflow:
    """The graphs of all modules of a model whose forward can be traced, joined where one calls another.

    Tracing runs the Python code of every module's forward once, in evaluation mode, with stand-ins for tensors and for
    the calls of other modules: nothing is computed, no hook runs. What depends on the values or shapes of its inputs
    cannot be traced: whatever goes on in such a module is "unknown".
    """

    def __init__(self, search: UnitSearch) -> None:
        self._search = search
        self._root = next(search.modules())
        self._graphs: dict[nn.Module, fx.Graph] = {}
        self._calls: dict[nn.Module, list[Place]] = {}
        self._callees: dict[fx.Node, nn.Module] = {}
        for module in search.modules():
            if _is_followed(search, module) and (graph := traced(module)) is not None:
                self._graphs[module] = graph
                for node in graph.nodes:
                    if node.op == "call_module":
                        callee = innermost(module.get_submodule(str(node.target).removeprefix("module.")))
                        self._callees[node] = callee
                        self._calls.setdefault(callee, []).append(Place(module, node))

    def graphs(self) -> Iterator[tuple[nn.Module, fx.Graph]]:
        """Yield every module that could be traced, with its graph."""
        yield from self._graphs.items()

    def is_known(self, module: nn.Module) -> bool:
        """Say whether the module could be traced."""
        return module in self._graphs

    def callee(self, place: Place) -> nn.Module | None:
        """Return the module that is called at a place, past wrappers; None if none is."""
        return self._callees.get(place.node)

    def outputs(self, layer: nn.Module) -> list[Place]:
        """Return where a layer's outputs come to be; [] if nothing that could be traced calls it."""
        own = self._graphs.get(layer)  # of a subclass, which may do more with them before it returns
        inside = [Place(layer, node) for node in own.nodes if called(node) in _READS] if own is not None else []
        return inside or self._calls.get(layer, [])

    def walk(self, starts: Collection[Place], through: Collection[Kind]) -> list[Met]:
        """Return everything that values at `starts` come to, once each, following them through the given kinds."""
        if not starts:
            return [Met("unknown", None)]
        reached, waiting, joins, met = {*starts}, [*starts], set[Place](), dict[Met, None]()
        while waiting or joins:
            if waiting:
                uses = [use for use in self._uses(waiting.pop()) if use not in reached]
                met |= {Met(use, None): None for use in uses if not isinstance(use, Place)}
                borders = [use for use in uses if isinstance(use, Place) and self._is_border(use)]
                reached.update(borders)
                waiting += borders
                joins.update(use for use in uses if isinstance(use, Place) and use not in reached)
                continue
            # Where values come together the others have to be known: in the order of the forward.
            place = min(joins, key=lambda one: int(one.node.meta["order"]))
            joins.remove(place)
            if (kind := self._kind(place, reached)) is not None:
                met[Met(kind, place)] = None
                if kind in through:
                    reached.add(place)
                    waiting.append(place)
        return [*met]

    def sources(self, place: Place) -> list[Place]:
        """Return the call of the layer whose outputs a value is, each changed by itself; [] if it is none's."""
        if is_layer(self.callee(place)):
            return [place]
        before = self.before(place)
        return [] if before is None else self.sources(before)

    def before(self, place: Place) -> Place | None:
        """Return the value that this one is, each number changed by itself; None if it is no such value."""
        callee, node = self.callee(place), place.node
        inputs = [one for one in node.all_input_nodes if not one.meta["is_constant"]]
        if callee in self._graphs and not self._changes_each(callee):
            returned = self._graphs[callee].output_node().args[0]
            return Place(callee, returned) if isinstance(returned, fx.Node) else None
        if len(inputs) != 1 or called(node) in ("getitem", "getattr"):
            return None
        before = Place(place.module, inputs[0])
        known = callee in self._graphs or self._kind(place, {before}) in ("pass", "activation", "norm")
        return before if known else None

    def _changes_each(self, module: nn.Module) -> bool:
        """Say whether all that a module does is to change its inputs one by one, as an activation does."""
        reached: set[Place] = set()
        for node in self._graphs[module].nodes:
            place = Place(module, node)
            callee = self.callee(place)
            if callee in self._graphs:
                if not self._changes_each(callee):
                    return False
            elif not self._is_given(node) and self._kind(place, reached) not in ("pass", "activation", None):
                return False
            reached.add(place)
        return True

    @staticmethod
    def _is_given(node: fx.Node) -> bool:
        return node.op in ("placeholder", "get_attr", "output") or bool(node.meta["is_input"])

    def _uses(self, place: Place) -> Iterator[Place | Literal["output", "unknown"]]:
        """Yield where a value is used: in other modules too, as an output of the model, or unknown."""
        for user in place.node.users:
            use = Place(place.module, user)
            if user.op == "output":
                yield from self._returned(place.module)
            elif self._is_border(use):
                yield from self._entered(use, place.node)
            else:
                yield use

    def _returned(self, module: nn.Module) -> Iterator[Place | Literal["output", "unknown"]]:
        if module is self._root:
            yield "output"
        elif module in self._calls:
            yield from self._calls[module]
        else:
            yield "unknown"

    def _is_border(self, place: Place) -> bool:
        """Say whether a place is an input of a module that could be traced, or a call of one."""
        callee = self.callee(place)
        return place.node.meta["is_input"] or (callee in self._graphs and not is_layer(callee))

    def _entered(self, call: Place, value: fx.Node) -> Iterator[Place | Literal["unknown"]]:
        """Yield the inputs of a module that are a value which it is called with."""
        callee, node = self.callee(call), call.node
        assert callee is not None
        inputs = {one.args[1]: one for one in self._graphs[callee].nodes if one.meta["is_input"]}
        bound = signature(type(callee).forward).bind(callee, *node.args, **node.kwargs).arguments
        for name, argument in bound.items():
            values: list[fx.Node] = []
            fx.map_arg(argument, values.append)
            if value in values:
                yield Place(callee, inputs[name]) if name in inputs else "unknown"

    def _kind(self, place: Place, reached: Collection[Place]) -> Kind | None:
        """Return what is done at a place, where a walk has reached others; None where only a shape is read."""
        callee, node = self.callee(place), place.node
        if callee is not None:
            return _module_kind(self._search, callee)
        name = called(node)
        nodes = [one for one in node.all_input_nodes if not one.meta["is_constant"]]
        if name in _SIZES or (name == "getattr" and node.args[1] in _SIZES):
            return None
        if name in _SUMS:
            return "pass" if len(nodes) == 1 or all(Place(place.module, one) in reached for one in nodes) else "sum"
        if name in _PRODUCTS:
            own = all(self._comes_from(Place(place.module, one), reached) for one in nodes)
            return "pass" if own or len(nodes) == 1 else "product"
        if name == "getattr" and node.args[1] in _LAYOUTS:
            return "layout"
        kinds: tuple[tuple[set[str], Kind], ...] = (
            (_ACTIVATIONS, "activation"), (_PASS, "pass"), (_LAYOUTS, "layout"), (_MIXES, "mix"), (_READS, "layer"),
            (_SPLITS, "split"), (_STORES, "unknown"),
        )  # fmt: skip
        return next((kind for names, kind in kinds if name in names), "other")

    def _comes_from(self, place: Place, reached: Collection[Place]) -> bool:
        """Say whether a value is, or is computed in the same module from, one that a walk has reached."""
        waiting, before = [place.node], {place.node}
        while waiting:
            node = waiting.pop()
            if Place(place.module, node) in reached:
                return True
            new = [one for one in node.all_input_nodes if one not in before]
            before.update(new)
            waiting += new
        return False


def _module_kind(search: UnitSearch, module: nn.Module) -> Kind:
    if is_depthwise(module):
        return "depthwise"
    if is_layer(module):
        return "layer"
    if search.is_norm(module):
        return "norm"
    kinds = {kind.__module__ for kind in type(module).__mro__}
    if is_activation(module) or ("torch.nn.modules.activation" in kinds and not isinstance(module, _NO_ACTIVATIONS)):
        return "activation"
    if isinstance(module, nn.Identity) or kinds & _PASS_MODULES:
        return "pass"
    if next(module.parameters(), None) is None:
        return "unknown"
    return "opaque" if module._modules and not isinstance(module, nn.MultiheadAttention) else "layer"


_NO_ACTIVATIONS = (nn.MultiheadAttention, nn.Softmax, nn.LogSoftmax, nn.Softmax2d, nn.Softmin)


def _is_followed(search: UnitSearch, module: nn.Module) -> bool:
    """Say whether a module's own forward tells something: not those that torch computes, nor norms and activations."""
    if type(module).forward is nn.Module.forward or isinstance(module, nn.MultiheadAttention):
        return False
    if is_layer(module):
        return bool(module._modules)
    of_torch = type(module).__module__.startswith("torch.nn.modules.") and not isinstance(module, nn.Sequential)
    return not of_torch and _module_kind(search, module) in ("layer", "opaque", "unknown")
