"""A forward pass over many samples, a block at a time: only one block's weights are in memory.

The model's own forward pass runs once per block and sample, in which the blocks before answer with what they returned
when they were run, and what follows is not run. So masks, positions and whatever else a model hands its blocks are its
own. What a block returned is kept as long as a later one reads it; a first pass over one sample sees that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from emp_callbacks.folders.skeleton import Skeleton
from emp_callbacks.folders.units import Unit, merged, split

__all__ = ["BlockWalk", "Visit"]

Inputs = Mapping[str, Tensor]
_FEW = 64  # tokens of the sample that shows which block reads which


class BlockWalk:
    """Runs a model over samples, block by block.

    Args:
        skeleton: The model, empty.
        units: What is in memory one after the other, see `find_units`; changed to what the model calls once.
        example: Keyword arguments of the model's forward, for a sample that shows what reads what.
        together: Whether a unit that is called more than once in a pass becomes a part of what is called once: so must
            be whatever is pruned.

    Attributes:
        units: The units.
        order: The unit of each call, in the order of the calls.
        last_readers: For each call, the last one that reads what it returned.

    Raises:
        NotImplementedError: A block reads what another computed inside.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        units: Sequence[Unit],
        example: Inputs,
        *,
        together: Callable[[Unit], bool] = lambda _: False,
    ) -> None:
        self._skeleton = skeleton
        self.units, self.order, self.last_readers = _traced(skeleton, list(units), example, together)
        self._inputs: Sequence[Inputs] = ()
        self._answers: list[list[Any]] = []

    def visits(
        self,
        inputs: Sequence[Inputs],
        *,
        on_run: Callable[[], None] = lambda: None,
        on_output: Callable[[int, Any], None] = lambda _, __: None,
    ) -> Iterator[Visit]:
        """Yield each call in turn, the unit's weights loaded meanwhile.

        Args:
            inputs: Keyword arguments of the model's forward, one sample each, on the CPU.
            on_run: Called after each sample that passed a unit.
            on_output: Takes the number of a sample and what the model returned for it, at the last visit.
        """
        self._inputs, self._answers = inputs, [[] for _ in inputs]
        rest = self._skeleton.outside(unit.module for unit in self.units)
        self._skeleton.load(rest)
        try:
            for number, unit in enumerate(self.order):
                with self._skeleton.loaded([unit.module]):
                    yield Visit(unit, partial(self._run, number, on_run, on_output))
        finally:
            self._skeleton.unload(rest)
            self._inputs, self._answers = (), []

    def bytes_held(self, number: int) -> int:
        """Return the memory in which what a call returned is kept now, for all samples."""
        leaves = [leaf for answers in self._answers for leaf in tree_leaves(answers[number])]
        return sum(leaf.untyped_storage().nbytes() for leaf in leaves if isinstance(leaf, Tensor))

    @torch.no_grad()
    def _run(
        self, number: int, on_run: Callable[[], None], on_output: Callable[[int, Any], None], *, keep: bool
    ) -> None:
        calls = _Calls(self.units, len(self.order))
        with calls.caught():
            for i, inputs in enumerate(self._inputs):
                made, output = calls.replay(self._skeleton, inputs, self._answers[i], number)
                if keep:
                    self._keep(i, number, made)
                    if output is not None:
                        on_output(i, output)
                on_run()

    def _keep(self, i: int, number: int, made: Any) -> None:
        """Keep what a call returned for a sample, and only the shapes of what no later call reads."""
        answers = self._answers[i]
        last = self._answers[i - 1][number] if i else None
        answers.append(_kept(made, last) if self.last_readers[number] > number else _shapes(made))
        for before, reader in enumerate(self.last_readers[:number]):
            if reader == number:
                answers[before] = _shapes(answers[before])


class Visit:
    """A unit whose weights are in memory.

    Attributes:
        unit: The unit.
    """

    def __init__(self, unit: Unit, run: Callable[..., None]) -> None:
        self.unit = unit
        self._run = run

    def run(self, *, keep: bool) -> None:
        """Run all samples through the unit; with `keep` what it returns is what later units read."""
        self._run(keep=keep)


class _Done(BaseException):
    """Leaves a forward pass whose remainder is not wanted; no `except Exception` stops it."""


class _Calls:
    """Stands before the units of a model in a forward pass."""

    def __init__(self, units: Sequence[Unit], count: int) -> None:
        self._units, self._count = units, count
        self._position, self._at = 0, 0
        self._answers: Sequence[Any] = ()
        self._made: Any = None

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Inside the block calls of the units come here."""
        with ExitStack() as stack:
            for unit in self._units:
                stack.enter_context(_forward(unit.module, self._call))
            yield

    def replay(self, skeleton: Skeleton, inputs: Inputs, answers: Sequence[Any], at: int) -> tuple[Any, Any]:
        """Run one sample up to a call, whose predecessors have answered; return what it and the model returned.

        The model returns something at the last call only.
        """
        self._position, self._at, self._answers, self._made, output = 0, at, answers, None, None
        with suppress(_Done):
            output = skeleton.call(inputs)
        if self._position != at + 1:
            raise NotImplementedError(
                f"{type(skeleton.model).__name__} calls its blocks in another order for another sample, so that it "
                "cannot be followed block by block"
            )
        return self._made, output

    def _call(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        number, self._position = self._position, self._position + 1
        if number < self._at:
            device = next((leaf.device for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)), None)
            return tree_map(partial(_lent, device=device), self._answers[number])
        self._made = forward(*args, **kwargs)
        if number < self._count - 1:
            raise _Done
        return self._made


@contextmanager
def _forward(module: nn.Module, call: Callable[..., Any]) -> Iterator[None]:
    """Inside the block, calls of a module go to `call`, with its own forward before the arguments."""
    own = module.__dict__.get("forward")
    module.forward = partial(call, module.forward)
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


def _lent(leaf: Any, device: torch.device | None) -> Any:
    """Return a kept tensor for a call that may write into it."""
    if not isinstance(leaf, Tensor) or _is_shape(leaf):
        return leaf.to(device) if isinstance(leaf, Tensor) and device is not None else leaf
    return leaf.to(device, copy=True)


def _kept(made: Any, of_last_sample: Any) -> Any:
    """Return what a call returned, on the CPU; what is the same for all samples, such as a bias of positions, once."""

    def keep(leaf: Any, last: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        own = leaf.detach().to("cpu", copy=True)
        return last if isinstance(last, Tensor) and last.shape == own.shape and torch.equal(last, own) else own

    if of_last_sample is None:
        return tree_map(partial(keep, last=None), made)
    return tree_map(keep, made, of_last_sample)


def _shapes(kept: Any) -> Any:
    """Return tensors of the same shapes and dtypes that take no memory."""
    return tree_map(
        lambda leaf: torch.zeros((), dtype=leaf.dtype).expand(leaf.shape) if isinstance(leaf, Tensor) else leaf, kept
    )


def _is_shape(leaf: Tensor) -> bool:
    return leaf.numel() > 1 and not any(leaf.stride())


# ---- which call reads what another returned ------------------------------------------------------------------------


class _Within(Exception):  # noqa: N818
    """A unit is not called itself, but what is in it."""

    def __init__(self, unit: Unit) -> None:
        super().__init__(unit.name)
        self.unit = unit


def _traced(
    skeleton: Skeleton, units: list[Unit], inputs: Inputs, together: Callable[[Unit], bool]
) -> tuple[list[Unit], list[Unit], list[int]]:
    """Return the units as the model calls them, the unit of each call, and the last call that reads each call's."""
    few = {
        name: value[:, :_FEW] if value.dim() == 2 and not value.is_floating_point() else value
        for name, value in inputs.items()
    }
    while True:
        trace = _Trace(skeleton, units)
        try:
            trace.run(few)
        except _Within as found:
            units = split(units, found.unit)
            continue
        again = next((unit for unit in units if trace.order.count(unit) > 1 and together(unit)), None)
        if again is None:
            called = [unit for unit in units if unit in trace.order]
            return called, trace.order, trace.last_readers()
        units = merged(skeleton.model, units, again)


class _Trace(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """One pass over one sample that sees which call reads what another returned.

    Each tensor made outside of the units is marked with the calls that it follows from, as far as their returns go; one
    made inside of a unit with that call as its inside.
    """

    def __init__(self, skeleton: Skeleton, units: Sequence[Unit]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._skeleton, self._units = skeleton, units
        self._marks: Any = WeakTensorKeyDictionary()
        self._reads: list[set[int]] = []
        self._inside: Unit | None = None
        self.order: list[Unit] = []

    def last_readers(self) -> list[int]:
        """Return, for each call, the last one that reads what it returned; the last of all also stands for the end."""
        found = list(range(len(self.order)))
        for reader, read in enumerate(self._reads):
            for number in read:
                found[number] = max(found[number], min(reader, len(self.order) - 1))
        return found

    @torch.no_grad()
    def run(self, inputs: Inputs) -> None:
        rest = self._skeleton.outside(unit.module for unit in self._units)
        self._skeleton.load(rest)
        try:
            with ExitStack() as stack:
                for unit in self._units:
                    stack.enter_context(_forward(unit.module, partial(self._call, unit)))
                    for module in unit.module.modules():
                        handle = module.register_forward_pre_hook(partial(self._entered, unit))
                        stack.callback(handle.remove)
                with self:
                    output = self._skeleton.call(inputs)
        finally:
            self._skeleton.unload(rest)
        self._reads.append({mark for leaf in _tensors(_scored(output)) for mark in self._marks.get(leaf, ())})

    def _entered(self, unit: Unit, module: nn.Module, args: Any) -> None:  # noqa: ARG002
        if self._inside is not unit and module is not unit.module:
            raise _Within(unit)

    def _call(self, unit: Unit, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        number = len(self.order)
        self.order.append(unit)
        self._reads.append(set())
        self._inside = unit
        with self._skeleton.loaded([unit.module]):
            made = forward(*args, **kwargs)
        self._inside = None
        for leaf in _tensors(made):
            self._marks[leaf] = {number}
        return made

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        read = {mark for leaf in _tensors((args, kwargs)) for mark in self._marks.get(leaf, ())}
        made = func(*args, **(kwargs or {}))
        now = len(self.order) - 1
        own = {-1 - now} if self._inside is not None else set()
        if hidden := sorted(-1 - mark for mark in read - own if mark < 0):
            reader = self.order[now].name if self._inside is not None else type(self._skeleton.model).__name__
            raise NotImplementedError(
                f"{reader} reads what {self.order[hidden[0]].name} computed inside, not what it returned: this model "
                "cannot be followed block by block; use a criterion that reads no inputs, such as magnitude"
            )
        if self._inside is not None:
            self._reads[now] |= read - own
            read = own
        for leaf in _tensors(made):
            self._marks[leaf] = read | self._marks.get(leaf, set()) if self._inside is None else read
        return made


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _scored(output: Any) -> Any:
    """Return what is asked of a model's output: its logits, else all of it."""
    logits = getattr(output, "logits", None)
    return output if logits is None else logits
