"""Where DeepSpeed's optimizer wrappers keep a parameter: the tensor that is updated, its gradient, the copies.

Found by attribute, not by class: nothing here imports DeepSpeed. Its own `safe_get_*` functions and `_hp_mapping` are
not used, because they return other parameters' values under `round_robin_gradients`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, final

import torch
import torch.distributed as dist
from torch import Tensor

from emp_callbacks.layer.segment import Segment


class Place(NamedTuple):
    """This rank's part of one parameter.

    Attributes:
        owner: The tensor that the innermost optimizer updates.
        view: Takes a tensor laid out like `owner` and returns the part in it.
        length: Elements of the part; 0 if this rank has none of the parameter.
        start: Flat index of its first element in the full parameter.
        pending: Returns the gradient that DeepSpeed will hand to the owner, laid out like the part; None once the
            owner has it, or if there is none. Writes to it reach the norm that clips.
    """

    owner: Tensor
    view: Callable[[Tensor], Tensor]
    length: int
    start: int
    pending: Callable[[], Tensor | None]


@dataclass(frozen=True, eq=False, kw_only=True)
class ZeroSegment(Segment):
    """A segment whose gradient waits in DeepSpeed's buffers until the optimizer's own step."""

    pending: Callable[[], Tensor | None]

    @property
    def gradient(self) -> Tensor | None:
        """The gradient that the optimizer will read, also before DeepSpeed clips it; None if there is none."""
        return self.pending() if self.owner.grad is None else self.view(self.owner.grad)


Held = tuple[Any, Segment]  # a parameter, which under stage 3 has attributes that torch does not know


class Layout(ABC):
    """One of DeepSpeed's ways to keep parameters.

    Attributes:
        replicated: Whether every rank holds every parameter in full.
    """

    replicated = False

    @abstractmethod
    def place(self, parameter: Any) -> Place | None:
        """Return this rank's part of a parameter; None if the optimizer does not update it."""

    @abstractmethod
    def owners(self) -> Iterable[Tensor]:
        """Return every tensor that the innermost optimizer updates."""

    def copies(self, parameter: Any, segment: Segment) -> list[Tensor]:  # noqa: ARG002
        """Return this rank's part of every tensor that forward reads instead of the owner, laid out like it."""
        return []

    def update_copies(self, held: Sequence[Held]) -> None:
        """Make what forward reads equal to the owners. Collective."""

    def correct_norms(self, held: Sequence[Held]) -> None:
        """Replace gradient norms that were taken before the gradients changed."""


@final
class PlainLayout(Layout):
    """Stage 0 in fp32: the parameters themselves are updated."""

    replicated = True

    def __init__(self, base: torch.optim.Optimizer) -> None:
        self._base = base

    def place(self, parameter: Any) -> Place | None:
        if not any(parameter is tensor for tensor in self.owners()):
            return None
        return Place(parameter, _whole, parameter.numel(), 0, _none)

    def owners(self) -> Iterable[Tensor]:
        return [tensor for group in self._base.param_groups for tensor in group["params"]]


@final
class HalfLayout(Layout):
    """Stage 0 in bf16 or fp16: fp32 masters of whole parameters, one by one or flattened per group."""

    replicated = True

    def __init__(self, wrapper: Any) -> None:
        self._wrapper = wrapper
        self._flat = hasattr(wrapper, "fp32_groups_flat")

    def place(self, parameter: Any) -> Place | None:
        waiting = partial(getattr, parameter, "grad")
        for halves, owner in zip(self._wrapper.fp16_groups, self._groups(), strict=True):
            offset = 0
            for i, half in enumerate(halves):
                if half is parameter:
                    view = partial(_shaped, offset=offset, shape=parameter.shape) if self._flat else _whole
                    return Place(owner if self._flat else owner[i], view, parameter.numel(), 0, waiting)
                offset += half.numel()
        return None

    def owners(self) -> Iterable[Tensor]:
        return self._groups() if self._flat else [tensor for group in self._groups() for tensor in group]

    def copies(self, parameter: Any, segment: Segment) -> list[Tensor]:  # noqa: ARG002
        return [parameter.data]

    def update_copies(self, held: Sequence[Held]) -> None:
        for parameter, segment in held:
            parameter.data.copy_(segment.weight)

    def _groups(self) -> Any:
        return self._wrapper.fp32_groups_flat if self._flat else self._wrapper.fp32_groups


@final
class FlatLayout(Layout):
    """Stages 1 and 2: each group is one flat buffer, cut into one part per rank.

    Where a parameter lies in the buffer is read off its address: right for any order, alignment and padding.
    """

    def __init__(self, wrapper: Any) -> None:
        self._wrapper = wrapper
        # BF16_Optimizer keeps every gradient in full on each rank, and clips by that: too late for a rank's own mask.
        self._whole_gradients = hasattr(wrapper, "bf16_groups_flat")

    def place(self, parameter: Any) -> Place | None:
        buffers = self._wrapper.bf16_groups_flat if self._whole_gradients else self._wrapper.bit16_groups_flat
        storage = parameter.data.untyped_storage().data_ptr()
        for i, (buffer, owner) in enumerate(zip(buffers, self.owners(), strict=True)):
            at = (parameter.data.data_ptr() - buffer.data_ptr()) // buffer.element_size()
            if buffer.untyped_storage().data_ptr() != storage or not 0 <= at < buffer.numel():
                continue
            first = dist.get_rank(self._wrapper.real_dp_process_group[i]) * owner.numel()
            begin = max(at, first)
            count = max(min(at + parameter.numel(), first + owner.numel()) - begin, 0)
            offset, start = (begin - first, begin - at) if count else (0, 0)
            pending = _none if self._whole_gradients else partial(self._averaged, i, offset, count)
            return Place(owner, partial(_part, offset=offset, count=count), count, start, pending)
        return None

    def owners(self) -> Iterable[Tensor]:
        if self._whole_gradients:
            return list(self._wrapper.fp32_groups_flat_partition)
        return list(self._wrapper.single_partition_of_fp32_groups)

    def copies(self, parameter: Any, segment: Segment) -> list[Tensor]:
        return [_same_part(parameter.data, segment)]

    def update_copies(self, held: Sequence[Held]) -> None:  # noqa: ARG002
        self._wrapper.update_lp_params()

    def correct_norms(self, held: Sequence[Held]) -> None:
        if getattr(self._wrapper, "cpu_offload", False):
            _correct_norms(self._wrapper, held)

    def _averaged(self, group: int, offset: int, count: int) -> Tensor | None:
        """Return a part of the group's gradients, which lie one after the other as the owner's values do."""
        pieces = self._wrapper.averaged_gradients.get(group)
        begin = 0
        for i, piece in enumerate(pieces or ()):
            if begin <= offset and offset + count <= begin + piece.numel():
                if not piece.is_contiguous():
                    pieces[i] = piece = piece.contiguous()  # as DeepSpeed itself will, when it flattens the list
                return _part(piece.detach(), offset=offset - begin, count=count)
            begin += piece.numel()
        return None


@final
class PartitionedLayout(Layout):
    """Stage 3: every parameter is cut into one part per rank, the last ones padded; the parts lie in flat buffers."""

    def __init__(self, wrapper: Any) -> None:
        self._wrapper = wrapper

    def place(self, parameter: Any) -> Place | None:
        if not hasattr(parameter, "ds_id"):
            return None
        found = self._wrapper.grad_position.get(self._wrapper.get_param_id(parameter))
        if found is None:
            return None
        group, offset, padded = found
        start = dist.get_rank(getattr(parameter, "ds_process_group", self._wrapper.dp_process_group)) * padded
        count = max(min(padded, parameter.ds_numel - start), 0)
        owner = self._wrapper.fp32_partitioned_groups_flat[group]
        member = next(i for i, other in enumerate(self._wrapper.fp16_groups[group]) if other is parameter)
        pending = partial(self._averaged, group, member, count)
        return Place(owner, partial(_part, offset=offset, count=count), count, start if count else 0, pending)

    def owners(self) -> Iterable[Tensor]:
        return list(self._wrapper.fp32_partitioned_groups_flat)

    def copies(self, parameter: Any, segment: Segment) -> list[Tensor]:
        shard = _part(parameter.ds_tensor.data, offset=0, count=segment.weight.numel())
        gathered = parameter.data.numel() == segment.size
        return [shard, _same_part(parameter.data, segment)] if gathered else [shard]

    def update_copies(self, held: Sequence[Held]) -> None:
        # Parameters that a forward without gradient gathered would stay as they are: partition them first.
        self._wrapper.checkpoint_event_prologue()
        for parameter, segment in held:
            self.copies(parameter, segment)[0].copy_(segment.weight)
        self._wrapper.checkpoint_event_epilogue()

    def correct_norms(self, held: Sequence[Held]) -> None:
        if self._wrapper.offload_optimizer:
            _correct_norms(self._wrapper, held)

    def _averaged(self, group: int, member: int, count: int) -> Tensor | None:
        pieces = self._wrapper.averaged_gradients.get(group)
        return None if pieces is None else _part(pieces[member].detach(), offset=0, count=count)


def layout_of(wrapper: Any, base: torch.optim.Optimizer) -> Layout | None:
    """Return how `engine.optimizer` keeps the parameters; None if it is of no known kind."""
    if wrapper is base:
        return PlainLayout(base)
    if hasattr(wrapper, "fp32_partitioned_groups_flat"):
        return PartitionedLayout(wrapper)
    if hasattr(wrapper, "single_partition_of_fp32_groups") or hasattr(wrapper, "fp32_groups_flat_partition"):
        return FlatLayout(wrapper)
    if hasattr(wrapper, "fp32_groups_flat") or hasattr(wrapper, "fp32_groups"):
        return HalfLayout(wrapper)
    return None


def _correct_norms(wrapper: Any, held: Sequence[Held]) -> None:
    # With an offloaded optimizer DeepSpeed takes each norm in backward and only adds them up in step().
    norms = wrapper.norm_for_param_grads
    for parameter, segment in held:
        gradient = segment.gradient
        if gradient is not None and gradient.numel() and (key := wrapper.get_param_id(parameter)) in norms:
            norms[key] = gradient.to(norms[key].dtype).norm(2).to(norms[key].device)


def _whole(tensor: Tensor) -> Tensor:
    return tensor


def _part(tensor: Tensor, *, offset: int, count: int) -> Tensor:
    return tensor.view(-1)[offset : offset + count]


def _same_part(full: Tensor, segment: Segment) -> Tensor:
    assert isinstance(segment.positions, int)
    return _part(full, offset=segment.positions, count=segment.weight.numel())


def _shaped(tensor: Tensor, *, offset: int, shape: torch.Size) -> Tensor:
    return tensor[offset : offset + shape.numel()].view(shape)


def _none() -> None:
    return None
