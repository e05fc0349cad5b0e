"""Which channels of a model's layers are read by which others, found by running it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from math import ceil
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["Links", "Read", "channel_links"]

_SUBSETS = 64  # random sets of channels that tell apart what has several readers
_MATRIX = 1 << 27  # elements of the table of what may read what


class Read(NamedTuple):
    """What one call of a module reads.

    Attributes:
        module: The module.
        inputs: Number of its inputs.
        sources: Layer -> its outputs and this module's inputs that they reach, int64, both of shape (links,).
        mixed: Layer -> bool, shape (outputs,): outputs that reach too many inputs to tell which (norms, attention).
        held: Name of a parameter or buffer outside layers -> bool, shape (inputs,): inputs that it reaches.
    """

    module: nn.Module
    inputs: int
    sources: dict[nn.Module, tuple[Tensor, Tensor]]
    mixed: dict[nn.Module, Tensor]
    held: dict[str, Tensor]


class Links(NamedTuple):
    """What reads what.

    Attributes:
        reads: Every read that has to do with the layers asked for.
        calls: Module -> how many times it was called.
        given_out: Layer -> bool, shape (outputs,): outputs that reach the model's own.
    """

    reads: list[Read]
    calls: Counter[nn.Module]
    given_out: dict[nn.Module, Tensor]


def channel_dim(module: nn.Module, value: Tensor) -> int:
    """Return the dimension of the channels in what a layer or norm reads or gives."""
    weight = getattr(module, "weight", None)
    if weight is not None and weight.dim() > 1:
        return 1 - int(weight.dim())
    return 1 if value.dim() > 1 else 0


def channel_links(
    model: nn.Module,
    run: Callable[..., Any],
    layers: Collection[nn.Module],
    passing: Collection[nn.Module],
    wanted: Collection[nn.Module],
) -> Links:
    """Return which output channels of layers reach which input channels of others, with no layer between.

    The model runs once on its example, each layer's output replaced by random numbers, which autograd follows from
    there to the inputs of the next layers: through anything that the model does in between (additions, products,
    concatenations, splits, shuffles, reshapes). Gradients of random sets of a layer's inputs then tell which of them
    an output reaches. A link that does not exist may be found between channels that norms or attention mix; one that
    exists is not missed, unless the model hides it from autograd.

    Args:
        model: The model, in evaluation mode.
        run: Calls it on the example, with other parameters if given `parameters`.
        layers: Modules that mix their inputs: dense layers and convolutions.
        passing: Modules that act on each channel alone (batch norms, depthwise convolutions): channels pass them.
        wanted: Layers whose links are asked for; those of layers that are read together with them come with them.
    """
    leaves: dict[Tensor, nn.Module] = {}
    inputs: list[tuple[nn.Module, Tensor]] = []
    calls: Counter[nn.Module] = Counter()
    drawn = torch.Generator().manual_seed(0)

    def note(module: nn.Module, given: tuple[Any, ...]) -> None:
        calls[module] += 1
        if given and isinstance(given[0], Tensor) and given[0].requires_grad:
            inputs.append((module, given[0].clone()))  # what follows may write into it

    def replace(module: nn.Module, _: tuple[Any, ...], output: Any) -> Any:
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return output
        leaf = (0.1 * _random(output, drawn)).requires_grad_()  # small: a ReLU6 saturates
        leaves[leaf] = module
        return leaf.clone()  # the model may write into it

    hooks = [module.register_forward_pre_hook(note) for module in (*layers, *passing)]
    hooks += [module.register_forward_hook(replace) for module in layers]
    values = _values(model, passing, drawn)
    try:
        with torch.enable_grad():
            outputs = [output for output in run(parameters=values) if output.requires_grad]
    finally:
        for hook in hooks:
            hook.remove()
    held = {value: name for name, value in values.items() if value.requires_grad}
    reached = [_reached(x, [*leaves, *held], drawn) for _, x in inputs]
    relevant = _read_together([{leaves[leaf] for leaf in found if leaf in leaves} for found in reached], set(wanted))
    reads = []
    for (module, x), found in zip(inputs, reached, strict=True):
        if any(leaves.get(tensor) in relevant for tensor in found):
            reads.append(_read(module, x, found, leaves, held, drawn))
    return Links(reads, calls, _given_out(outputs, leaves, drawn))


def _values(model: nn.Module, passing: Collection[nn.Module], drawn: torch.Generator) -> dict[str, Tensor]:
    """Return parameters and buffers that let every channel through; those outside `passing` need gradients."""
    values: dict[str, Tensor] = {}
    shared: dict[Tensor, Tensor] = {}  # tied ones have one value
    for prefix, module in model.named_modules():
        for name, tensor in {**module._parameters, **module._buffers}.items():
            if tensor is None or not tensor.is_floating_point() or tensor.numel() < 2:
                continue
            if tensor not in shared:
                if module in passing:
                    shared[tensor] = _passed(name, tensor, drawn)
                elif isinstance(tensor, nn.Parameter) and tensor.dim() < 2:
                    shared[tensor] = (0.1 * _random(tensor, drawn)).requires_grad_()
                else:
                    shared[tensor] = tensor.detach().clone().requires_grad_()
            values[f"{prefix}.{name}" if prefix else name] = shared[tensor]
    return values


def _passed(name: str, tensor: Tensor, drawn: torch.Generator) -> Tensor:
    if name == "running_mean":
        return torch.zeros_like(tensor)
    if name == "running_var" or (name == "weight" and tensor.dim() == 1):
        return torch.ones_like(tensor)
    return 0.1 * _random(tensor, drawn)


def _random(like: Tensor, drawn: torch.Generator) -> Tensor:
    """Return numbers that rectifiers let through and that cancel no others; in [0.5, 1.5)."""
    return (0.5 + torch.rand(like.shape, generator=drawn)).to(like)


def _reached(
    x: Tensor, tensors: Sequence[Tensor], drawn: torch.Generator, channels: Tensor | None = None, dim: int = 0
) -> list[Tensor]:
    """Return those of the tensors that x depends on, or that some of its channels do."""
    weights = _random(x, drawn)
    if channels is not None:
        weights = weights * _along(channels, x, dim)
    found = torch.autograd.grad(x, tensors, weights, retain_graph=True, allow_unused=True)
    return [tensor for tensor, gradient in zip(tensors, found, strict=True) if gradient is not None and gradient.any()]


def _read_together(reads: Sequence[set[nn.Module]], wanted: set[nn.Module]) -> set[nn.Module]:
    """Return `wanted` with all layers that are read by a module that reads one of them, and so on."""
    relevant = set(wanted)
    while True:
        more = {layer for read in reads if read & relevant for layer in read} - relevant
        if not more:
            return relevant
        relevant |= more


def _given_out(
    outputs: Sequence[Tensor], leaves: Mapping[Tensor, nn.Module], drawn: torch.Generator
) -> dict[nn.Module, Tensor]:
    given: dict[nn.Module, Tensor] = {}
    for output in outputs:
        tensors = list(leaves)
        found = torch.autograd.grad(output, tensors, _random(output, drawn), retain_graph=True, allow_unused=True)
        for leaf, gradient in zip(tensors, found, strict=True):
            if gradient is not None:
                hit = _hit(gradient, channel_dim(leaves[leaf], leaf))
                given[leaves[leaf]] = given[leaves[leaf]] | hit if leaves[leaf] in given else hit
    return given


def _hit(gradient: Tensor, dim: int) -> Tensor:
    rows = gradient.movedim(dim, 0)
    return rows.reshape(len(rows), -1).any(1).cpu()


def _read(
    module: nn.Module,
    x: Tensor,
    found: Sequence[Tensor],
    leaves: Mapping[Tensor, nn.Module],
    held: Mapping[Tensor, str],
    drawn: torch.Generator,
) -> Read:
    dim = channel_dim(module, x)
    read = Read(module, x.shape[dim], {}, {}, {})
    followed = [tensor for tensor in found if tensor in leaves]
    dims = [channel_dim(leaves[leaf], leaf) for leaf in followed]
    for leaf, (outputs, inputs, mixed) in zip(followed, _links(x, dim, followed, dims, drawn), strict=True):
        layer = leaves[leaf]
        if layer in read.sources:  # a layer that is called more than once
            before = read.sources[layer]
            outputs, inputs = torch.cat([before[0], outputs]), torch.cat([before[1], inputs])
            mixed = mixed | read.mixed[layer]
        read.sources[layer], read.mixed[layer] = (outputs, inputs), mixed
    others = [tensor for tensor in found if tensor in held]
    for layer, (_, inputs) in read.sources.items() if others else ():
        theirs = torch.zeros(read.inputs, dtype=torch.bool)
        theirs[inputs] = True
        for tensor in _reached(x, others, drawn, theirs | bool(read.mixed[layer].any()), dim):
            read.held[held[tensor]] = read.held.get(held[tensor], torch.zeros_like(theirs)) | theirs
    return read


def _links(
    x: Tensor, dim: int, tensors: Sequence[Tensor], dims: Sequence[int], drawn: torch.Generator
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield, for each tensor, its channels and those of x that they reach, and bool which channels are mixed.

    A channel that reaches one input alone is found by the bits of its number; one that reaches a block of neighbours
    (a flattened map) by the bits of the block's number; one that reaches a few (a concatenation with itself) by random
    sets: an input is one of them if all sets that hold it are hit.
    """
    size = x.shape[dim]

    def hits(sets: Tensor) -> list[Tensor]:
        """Return, for each tensor, bool, shape (sets, channels): whether a channel reaches a set of inputs."""
        rows: list[list[Tensor]] = [[] for _ in tensors]
        weights = _random(x, drawn)
        for members in sets:
            chosen = weights * _along(members, x, dim)
            gradients = torch.autograd.grad(x, tensors, chosen, retain_graph=True, allow_unused=True)
            for row, tensor, at, gradient in zip(rows, tensors, dims, gradients, strict=True):
                none = torch.zeros(tensor.shape[at], dtype=torch.bool)
                row.append(none if gradient is None else _hit(gradient, at))
        return [torch.stack(row) for row in rows]

    single = hits(_bits(torch.arange(size)))
    by_block: dict[int, list[Tensor]] = {}
    by_subset: list[Tensor] = []
    subsets = torch.rand(_SUBSETS, size, generator=drawn) < 0.25
    for index, found in enumerate(single):
        outputs, inputs, left = _decoded(found)
        block = size // found.shape[1]
        if left.any() and block > 1 and size % found.shape[1] == 0:
            if block not in by_block:
                by_block[block] = hits(_bits(torch.arange(size) // block))
            more, blocks, unclear = _decoded(by_block[block][index])
            taken = left[more] & ~unclear[more]
            more, blocks = more[taken], blocks[taken]
            outputs = torch.cat([outputs, more.repeat_interleave(block)])
            inputs = torch.cat([inputs, (blocks[:, None] * block + torch.arange(block)).flatten()])
            left = left.clone()
            left[more] = False
        if left.any() and int(left.sum()) * size <= _MATRIX:
            by_subset = by_subset or hits(subsets)
            missed = (~by_subset[index][:, left]).float().T @ subsets.float()
            few = (missed == 0) & ((missed == 0).sum(1, keepdim=True) <= 4)
            unit, reader = few.nonzero(as_tuple=True)
            named = left.nonzero().flatten()
            outputs, inputs = torch.cat([outputs, named[unit]]), torch.cat([inputs, reader])
            left = left.clone()
            left[named[few.any(1)]] = False
        yield outputs, inputs, left


def _along(channels: Tensor, x: Tensor, dim: int) -> Tensor:
    """Return one number per channel in a shape that multiplies x."""
    shape = [1] * x.dim()
    shape[dim] = len(channels)
    return channels.to(x).reshape(shape)


def _bits(numbers: Tensor) -> Tensor:
    """Return the sets of each bit of the numbers that is 1, then of each that is 0; bool, shape (sets, numbers)."""
    count = max(1, ceil(int(numbers.max())).bit_length())
    ones = (numbers[None] >> torch.arange(count)[:, None]) & 1 == 1
    return torch.cat([ones, ~ones])


def _decoded(found: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the channels that reach one number alone, those numbers, and bool which channels reach more."""
    ones, zeros = found.chunk(2)
    linked = found.any(0)
    alone = linked & (ones ^ zeros).all(0)
    numbers = (ones.long() << torch.arange(len(ones))[:, None]).sum(0)
    return alone.nonzero().flatten(), numbers[alone], linked & ~alone
