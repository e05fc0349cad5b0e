"""Which layers of a model are hidden ones, which are gated by each other, and what comes behind them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import takewhile

from torch import Tensor, nn

from emp_callbacks.targets.dataflow import Dataflow, Kind, Met, Place
from emp_callbacks.targets.gates import Gated, factors, find_gated
from emp_callbacks.targets.heads import projections
from emp_callbacks.targets.tracing import called
from emp_callbacks.targets.unit_search import (
    CONVOLUTIONS,
    UnitSearch,
    chain,
    is_batch_norm,
    is_convolution,
    is_dense,
    is_depthwise,
    is_layer,
    own,
)
from emp_callbacks.targets.weights import FROZEN

OUTPUT = "an output of the model, or nothing is seen that reads it"
STREAM = "writes into a residual stream, or no activation or dense layer is seen to read it"
ATTENTION = "a projection of attention"
EXCITATION = "computes factors for other channels, as squeeze-and-excitation does"
GATE = "multiplies something else than a layer like it"
EMBEDDING = "cuts an image into patches or makes tokens of it"
DEPTHWISE = "depthwise: its channels are those of the layer before"
TIED = "tied to an embedding"

_UNITWISE: set[Kind] = {"pass", "norm", "activation"}
_MOVED: set[Kind] = {*_UNITWISE, "layout", "depthwise"}
_ANYWAY: set[Kind] = {*_MOVED, "sum", "product", "split", "mix", "other"}


class LayerRoles:
    """What the layers of one model are for, as its modules' forwards say, and where they do not, names and sizes."""

    def __init__(self, search: UnitSearch) -> None:
        self._search = search
        self.flow = Dataflow(search)
        self.layers = [module for module in search.modules() if is_layer(module)]
        self.gated = find_gated(search, self.flow)
        self._met = {layer: self.flow.walk(self.flow.outputs(layer), _UNITWISE) for layer in self.layers}
        self._named_norms = {layer: norm for module in search.modules() for layer, norm in _norms(search, module)}
        self._across: dict[nn.Module, list[nn.Module]] = {layer: [] for layer in self.layers}
        self._behind = {layer: self._find_behind(layer) for layer in self.layers}
        of_units = [found for layer, found in self._behind.items() if not is_depthwise(layer)]
        self._feeders = Counter(module for found in of_units for module in found)

    # ---- what comes behind -----------------------------------------------------------------------------------------

    def behind(self, layer: nn.Module) -> list[nn.Module]:
        """Return the norms that a layer's units pass by themselves, and depthwise convolutions, in order."""
        return [module for module in self._behind[layer] if self._feeders[module] == 1 or is_depthwise(layer)]

    def not_its_own(self, layer: nn.Module) -> list[nn.Module]:
        """Return the norms behind a layer whose scale and shift are not of its units.

        They are behind other layers too, or they normalise along another dimension, as a LayerNorm does that reads
        the pixels of a convolution as they are.
        """
        return [module for module in self._behind[layer] if module not in self.behind(layer)] + self._across[layer]

    def behind_gated(self, gated: Gated) -> list[nn.Module]:
        """Return the norms behind gated layers, before and after they are multiplied."""
        before = [module for part in gated.parts for module in self.behind(part)]
        if gated.place is None:
            return before
        met = self.flow.walk([gated.place], _UNITWISE)
        return before + [module for one in met if one.kind == "norm" and (module := self._module(one)) is not None]

    def _find_behind(self, layer: nn.Module) -> list[nn.Module]:
        met = self._met[layer]
        if self._is_lost(met):
            return [norm] if (norm := self._named_norms.get(layer)) is not None else []
        if "sum" not in _kinds(met) and not is_depthwise(layer):
            met = self.flow.walk(self.flow.outputs(layer), _MOVED)
        modules = [self._module(one) for one in met if one.kind in ("norm", "depthwise")]
        found = [module for module in dict.fromkeys(modules) if module is not None]
        if "sum" in _kinds(met):
            found = [module for module in found if not is_depthwise(module)]
        if is_convolution(layer) and not any(_is_laid_out(one) for one in met):
            dims = len(self._search.shape(own(layer, "weight"))) - 1
            self._across[layer] = [module for module in found if _is_layer_norm(module, unless=dims)]
        return [module for module in found if module not in self._across[layer]]

    def _module(self, met: Met) -> nn.Module | None:
        return None if met.place is None else self.flow.callee(met.place)

    # ---- hidden layers ---------------------------------------------------------------------------------------------

    def left_out(self) -> dict[nn.Module, str]:
        """Return the layers that are no hidden ones by the default rule, and why not."""
        embeddings = {m.weight for m in self._search.modules() if isinstance(m, nn.Embedding)}
        gated = {part for one in self.gated for part in one.parts}
        read_on = {layer for module in self._search.modules() for layer in _read_on(self._search, module)}
        reserved = self._reserved()
        found: dict[nn.Module, str] = {}
        for layer in self.layers:
            weight = own(layer, "weight")
            why: str | None
            if not weight.requires_grad or weight in embeddings:
                why = TIED if weight in embeddings else FROZEN
            elif layer in gated:
                why = None
            elif layer in reserved:
                why = reserved[layer]
            elif is_convolution(layer):
                why = self._why_no_channels(layer)
            else:
                why = self._why_not_hidden(layer, layer in read_on)
            if why is not None:
                found[layer] = why
        return found

    def _why_not_hidden(self, layer: nn.Module, read_by_size: bool) -> str | None:
        met = self._met[layer]
        kinds = _kinds(met)
        if self._is_lost(met):
            return None if read_by_size else STREAM
        if "product" in kinds:
            return GATE
        if self.is_output(layer):
            return OUTPUT
        if "layout" in kinds:
            kinds = _kinds(self.flow.walk(self.flow.outputs(layer), _MOVED))
            return None if "activation" in kinds and kinds <= {*_MOVED, "layer"} else STREAM
        activated = "activation" in kinds and not kinds & {"sum", "mix"}
        read = "layer" in kinds and kinds <= {*_UNITWISE, "layer", "output"}
        unsure = "unknown" in kinds and "sum" not in kinds and read_by_size
        return None if activated or read or unsure else STREAM

    def _why_no_channels(self, layer: nn.Module) -> str | None:
        if is_depthwise(layer):
            return DEPTHWISE
        met = self._met[layer]
        moved = _kinds(self.flow.walk(self.flow.outputs(layer), {*_MOVED, "split"}))
        if "mix" in moved:
            return ATTENTION
        if "layout" in _kinds(self.flow.walk(self.flow.outputs(layer), {"pass"})) and not moved <= {*_MOVED, "layer"}:
            return EMBEDDING
        if "product" in _kinds(met) and not self._is_lost(met):
            return GATE
        output = self.is_output(layer)
        if output is None:
            output = not self._is_read_by_size(layer) and not self._behind[layer]
        return OUTPUT if output else None

    def _is_lost(self, met: list[Met]) -> bool:
        """Say whether nothing is known of what becomes of a layer's outputs."""
        return _kinds(met) == {"unknown"}

    def is_output(self, layer: nn.Module) -> bool | None:
        """Say whether no layer reads what becomes of a layer's outputs; None if that is not known."""
        kinds = _kinds(self.flow.walk(self.flow.outputs(layer), _ANYWAY))
        return False if kinds & {"layer", "opaque"} else True if "output" in kinds and "unknown" not in kinds else None

    def _is_read_by_size(self, layer: nn.Module) -> bool:
        """Say whether a later layer of the model has as many inputs as this one has outputs."""
        modules = [*self._search.modules()]
        later = modules[modules.index(layer) + 1 :]
        inputs = {self._search.inputs(other) * getattr(other, "groups", 1) for other in later if is_layer(other)}
        inputs |= {other.input_size for other in later if isinstance(other, nn.RNNBase)}
        return self._search.outputs(layer) in inputs

    def _reserved(self) -> dict[nn.Module, str]:
        """Return the layers that have a part of their own: in attention, patch embeddings, excitation or an MLP."""
        search = self._search
        convolutions = [layer for layer in self.layers if is_convolution(layer)]
        found = {layer: EMBEDDING for layer in convolutions[:1] if _cuts_patches(layer)}
        found |= {gated.reader: STREAM for gated in self.gated if is_dense(gated.reader)}
        for module in search.modules():
            found |= dict.fromkeys(projections(module), ATTENTION)
            if module is not search.model and not self.flow.is_known(module) and _attends(module):
                links = [_sole_dense(link) or link for _, link in chain(module)]
                found |= {link: ATTENTION for link in links if is_layer(link)}
        for module, graph in self.flow.graphs():
            for node in graph.nodes:
                place = Place(module, node)
                found |= dict.fromkeys(factors(self.flow, place), EXCITATION)
                if called(node) in ("matmul", "bmm", "scaled_dot_product_attention", "einsum", "baddbmm"):
                    read = self.flow.walk([place], {"pass", "layout"})
                    readers = [self._module(one) for one in read if one.kind == "layer"]
                    found |= {layer: ATTENTION for layer in readers if is_convolution(layer)}
        for layer in convolutions:  # an MLP of 1x1 convolutions writes into a residual stream as any other does
            readers = [self._module(one) for one in self._met[layer] if one.kind == "layer"]
            in_mlp = _is_pointwise(layer) and "activation" in _kinds(self._met[layer]) and len(readers) == 1
            found |= {reader: STREAM for reader in readers if reader and in_mlp and self._adds_pointwise(reader)}
        return found

    def _adds_pointwise(self, layer: nn.Module) -> bool:
        return _is_pointwise(layer) and is_layer(layer) and not _kinds(self._met[layer]) & {"activation", "layer"}


def _kinds(met: list[Met]) -> set[Kind]:
    return {one.kind for one in met}


def _is_layer_norm(module: nn.Module, unless: int) -> bool:
    """Say whether the module is torch's own LayerNorm, unless over that many dimensions: of a convolution, over all."""
    if not isinstance(module, nn.LayerNorm) or type(module).forward is not nn.LayerNorm.forward:
        return False
    return len(module.normalized_shape) != unless


def _is_laid_out(met: Met) -> bool:
    """Say whether channels, after this, lie along the last dimension, or may do so."""
    names = ("mean", "sum", "amax", "flatten", "reshape", "view", "squeeze", "getitem")
    return met.kind == "layout" or (met.kind == "pass" and met.place is not None and called(met.place.node) in names)


def _is_pointwise(layer: nn.Module | None) -> bool:
    return isinstance(layer, CONVOLUTIONS) and {*layer.kernel_size} == {1} and layer.groups == 1


def _cuts_patches(layer: nn.Module) -> bool:
    return isinstance(layer, CONVOLUTIONS) and layer.kernel_size == layer.stride and max(layer.stride) > 1


# ---- where a forward cannot be traced: names and sizes ---------------------------------------------------------------


def _attends(module: nn.Module) -> bool:
    kind = type(module).__name__
    return "Attention" in kind or "Attn" in kind


def _read_on(search: UnitSearch, module: nn.Module) -> Iterator[nn.Module]:
    """Yield the dense layers among the children of `module` that another one, by its size, reads."""
    links = [_sole_dense(link) or link for _, link in chain(module)]
    dense = [link for link in links if is_dense(link)]
    for index, layer in enumerate(dense[:-1]):
        if any(search.inputs(other) == search.outputs(layer) for other in dense[index + 1 :]):
            yield layer


def _sole_dense(module: nn.Module) -> nn.Module | None:
    """Return the dense layer of a module that holds just one, like a layer with its norm and activation."""
    found = [part for part in module.modules() if is_layer(part)]
    return found[0] if len(found) == 1 and is_dense(found[0]) else None


def _norms(search: UnitSearch, module: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Yield each layer among the children of `module` with the batch norm that follows it, by names and order.

    In a Sequential that is the next layer or norm. Among attributes, of the layers that have none yet, it is the one
    whose name ends most alike (conv1, conv2, bn1, bn2), else the nearest. A Sequential that ends in a layer (a deep
    stem) counts as that layer where the norm is the very next attribute.
    """
    waiting: list[tuple[str, nn.Module]] = []
    ending: list[tuple[str, nn.Module]] = []
    for name, link in chain(module):
        if is_layer(link):
            waiting = [*([] if isinstance(module, nn.Sequential) else waiting), (name, link)]
        elif is_batch_norm(link):
            fits = [found for found in waiting + ending if search.outputs(found[1]) == _channels(link)]
            if fits:
                best = max(reversed(fits), key=lambda found: _common_ending(found[0], name))
                waiting = [found for found in waiting if found is not best]
                yield best[1], link
        ending = [(name, last) for _, last in chain(link)[-1:] if isinstance(link, nn.Sequential) and is_layer(last)]


def _channels(norm: nn.Module) -> int | None:
    mean = norm._buffers["running_mean"]
    count = getattr(norm, "num_features", None)
    return count if isinstance(count, int) else len(mean) if isinstance(mean, Tensor) else None


def _common_ending(one: str, other: str) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one[::-1], other[::-1], strict=False)))
