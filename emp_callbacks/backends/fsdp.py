"""Parameters sharded by PyTorch itself: `fully_shard` (FSDP2, DTensors) and FullyShardedDataParallel (FSDP1)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor, distribute_tensor

from emp_callbacks.backends.base import Backend
from emp_callbacks.backends.coverage import counted_once
from emp_callbacks.backends.group import Group, group_of
from emp_callbacks.backends.local import LocalBackend
from emp_callbacks.layer.segment import Segment
from emp_callbacks.targets import WeightTarget


@final
class FSDP2Backend(Backend):
    """Parameters that `torch.distributed.fsdp.fully_shard` made DTensors, also on a mesh with replicas (HSDP).

    Parameters that it left alone are whole on every rank.

    Args:
        module: The user's own module, after `fully_shard`.
        optimizers: Made after `fully_shard`, from the module's parameters.
    """

    name = "fsdp2"

    def __init__(self, module: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        super().__init__(module, optimizers)
        # A forward without gradients leaves the root's parameters gathered, and the module then shows plain tensors.
        self.refresh_copies()
        self.group = _group_of_meshes([p.device_mesh for p in module.parameters() if isinstance(p, DTensor)])
        self._homes: dict[Tensor, tuple[nn.Module, str]] = {}

    def segments(self, targets: Sequence[WeightTarget]) -> list[Segment]:
        """Return this rank's part of every target, in order. Collective."""
        self._homes = {p: (m, name) for m in self.module.modules() for name, p in m.named_parameters(recurse=False)}
        whole = LocalBackend(self.module, self.optimizers, self.group).segments(targets)
        segments = [
            _dtensor_segment(segment, target.parameter) if isinstance(target.parameter, DTensor) else segment
            for segment, target in zip(whole, targets, strict=True)
        ]
        return counted_once(segments, self, made_by="fully_shard")

    def refresh_copies(self) -> None:
        # Drops gathered copies, which the next forward would use as they are.
        for module in self.module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def forward_copies(self, segment: Segment) -> list[Tensor]:
        module, name = self._homes[segment.owner]
        shown = getattr(module, name)
        # Under tensor parallelism the gathered copy is a DTensor that lies elsewhere: not looked into.
        if shown is segment.owner or isinstance(shown, DTensor):
            return []
        return [shown.detach() if segment.replicated else _at(shown.detach().reshape(-1), segment)]


@final
class FSDP1Backend(Backend):
    """Parameters inside the flat parameters of FullyShardedDataParallel with `use_orig_params=True`.

    Args:
        module: The module, wrapped: the outermost FullyShardedDataParallel is part of it.
        optimizers: Made after wrapping, from the wrapped module's parameters.

    Raises:
        NotImplementedError: The model was wrapped with `use_orig_params=False`, which hides the single parameters.
        TypeError: The module is only the inside of the outermost wrapper.
    """

    name = "fsdp1"

    def __init__(self, module: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        super().__init__(module, optimizers)
        wrappers = FullyShardedDataParallel.fsdp_modules(module)
        # A wrapper whose parameters all lie in inner wrappers has no handle.
        self._wrappers = [wrapper for wrapper in wrappers if _handle(wrapper) is not None]
        if not all(_handle(wrapper)._use_orig_params for wrapper in self._wrappers):
            raise NotImplementedError(
                "FullyShardedDataParallel(use_orig_params=False) fuses weights, biases and norms into one parameter; "
                "wrap the model with use_orig_params=True, and make the optimizer after that"
            )
        self.refresh_copies()
        self.group = _group_of_wrappers(wrappers)
        self._parts: dict[Tensor, _FlatPart] = {}
        for wrapper in self._wrappers:
            self._parts.update(_flat_parts(wrapper))
        if any(getattr(p, "_fsdp_flattened", False) and p not in self._parts for p in module.parameters()):
            raise TypeError("the model is only the inside of a FullyShardedDataParallel; pass the outermost wrapper")

    def full_shape(self, parameter: nn.Parameter) -> torch.Size:
        return self._parts[parameter].shape if parameter in self._parts else parameter.shape

    def segments(self, targets: Sequence[WeightTarget]) -> list[Segment]:
        """Return this rank's part of every target, in order. Collective."""
        whole = LocalBackend(self.module, self.optimizers, self.group).segments(targets)
        segments = [self._segment(segment) for segment in whole]
        return counted_once(segments, self, made_by="FullyShardedDataParallel")

    def _segment(self, whole: Segment) -> Segment:
        part = self._parts.get(whole.owner)
        if part is None or not part.is_sharded:
            return whole
        if not part.is_contiguous:
            raise NotImplementedError(
                f"parameter {whole.name!r} was not contiguous (channels_last?) when FullyShardedDataParallel sharded "
                "it; make the model contiguous before wrapping, or exclude the parameter"
            )
        return replace(
            whole,
            shape=part.shape,
            positions=part.start,
            replicated=False,
            counted=slice(0, part.numel),
        )

    def refresh_copies(self) -> None:
        # Private: FSDP1 offers no other way to drop a gathered copy without writing all of it back.
        from torch.distributed.fsdp._runtime_utils import _reshard

        for wrapper in self._wrappers:
            handle = _handle(wrapper)
            # Nothing is gathered before the first forward, nor where every rank holds everything.
            if handle.uses_sharded_strategy and hasattr(handle.flat_param, "_full_param_padded"):
                _reshard(wrapper, handle, True)

    def forward_copies(self, segment: Segment) -> list[Tensor]:
        part = self._parts.get(segment.owner)
        gathered = None if part is None else getattr(part.flat_parameter, "_full_param_padded", None)
        if part is None or gathered is None or not part.is_sharded or not gathered.untyped_storage().size():
            return []
        return [gathered[part.offset : part.offset + part.numel]]


# ---- FSDP2 --------------------------------------------------------------------------------------------------------


def _group_of_meshes(meshes: Sequence[DeviceMesh]) -> Group:
    """Return the processes on which any of these meshes lies. Collective over them."""
    distinct = list(dict.fromkeys(meshes))
    if not distinct:
        return None
    flat = [mesh.get_group() for mesh in distinct if mesh.ndim == 1]
    return group_of({rank for mesh in distinct for rank in mesh.mesh.flatten().tolist()}, flat)


def _dtensor_segment(whole: Segment, parameter: DTensor) -> Segment:
    """Return this rank's part of a parameter that lies on a device mesh as its placements say."""
    mesh, placements = parameter.device_mesh, parameter.placements
    if all(placement.is_replicate() or mesh.size(i) == 1 for i, placement in enumerate(placements)):
        return replace(whole, view=_local)
    local = parameter.to_local()
    at = _flat_positions(parameter)
    return replace(
        whole,
        view=_local_flat,
        positions=_run_or_indices(at, local) if at.numel() == local.numel() else at,  # the misfit is told later, by all
        replicated=False,
        counted=slice(0, local.numel()),
    )


def _flat_positions(parameter: DTensor) -> Tensor:
    """Return the flat index in the full parameter of each element of the local shard, ascending; sends nothing."""
    shape, mesh = parameter.shape, parameter.device_mesh
    positions = torch.zeros((), dtype=torch.int64, device=mesh.device_type)
    for dim, size in enumerate(shape):
        # Expanded, so that only the local part of the index along one dimension is ever laid out in memory.
        along = torch.arange(size, device=mesh.device_type).view(-1, *[1] * (len(shape) - dim - 1)).expand(shape)
        local = distribute_tensor(along, mesh, parameter.placements, src_data_rank=None).to_local()
        positions = positions * size + local
    return positions.reshape(-1)


def _run_or_indices(positions: Tensor, local: Tensor) -> int | Tensor:
    """Return the first of ascending positions if the others follow it without a gap, else all of them."""
    if not positions.numel():
        return 0
    first, last = int(positions[0]), int(positions[-1])
    return first if last - first + 1 == positions.numel() else positions.to(local.device)


def _at(full: Tensor, segment: Segment) -> Tensor:
    """Return the part of a full parameter, flat, that lies where the segment does."""
    at = segment.positions
    return full[at : at + segment.weight.numel()] if isinstance(at, int) else full[at]


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _local_flat(tensor: Tensor) -> Tensor:
    return _local(tensor).view(-1)


# ---- FSDP1 --------------------------------------------------------------------------------------------------------


def _group_of_wrappers(wrappers: Sequence[FullyShardedDataParallel]) -> Group:
    """Return the processes over which any of these is sharded or replicated. Collective over them."""
    pairs = {(wrapper.process_group, getattr(wrapper, "_inter_node_pg", None)) for wrapper in wrappers}
    ranks: set[int] = set()
    for shards, replicas in sorted(pairs, key=lambda pair: dist.get_process_group_ranks(pair[0])):
        own = dist.get_process_group_ranks(shards)
        rows: list[list[int]] = [own]
        if replicas is not None:  # each of these processes knows another set of shards
            rows = [[]] * dist.get_world_size(replicas)
            dist.all_gather_object(rows, own, group=replicas)
        ranks.update(*rows)
    return group_of(ranks, [shards for shards, _ in pairs])


class _FlatPart(NamedTuple):
    """What of one original parameter lies in this rank's shard of a flat parameter.

    `start` is the flat index in the full parameter of the first of `numel` elements, `offset` its index in the flat
    parameter of all ranks.
    """

    shape: torch.Size
    start: int
    numel: int
    flat_parameter: Any
    offset: int
    is_sharded: bool
    is_contiguous: bool


def _handle(wrapper: FullyShardedDataParallel) -> Any:
    # Private, as is all that follows from it: FSDP1 has no public way to ask what lies where.
    return wrapper._handle


def _flat_parts(wrapper: FullyShardedDataParallel) -> Iterator[tuple[nn.Parameter, _FlatPart]]:
    """Yield every original parameter of one wrapper with its part.

    The original parameter stays the same object for life, the one that module, optimizer and state know; FSDP only
    points its data at the local shard, flat and possibly empty, or at a gathered copy.
    """
    handle = _handle(wrapper)
    flat = handle.flat_param
    first = handle.rank * flat._sharded_size.numel()  # of this rank's shard in the padded whole
    rows = zip(flat._params, flat._shapes, flat._shard_param_infos, flat._contiguities, strict=True)
    for parameter, shape, info, is_contiguous in rows:
        start, numel = (info.intra_param_start_idx, info.numel_in_shard) if info.in_shard else (0, 0)
        offset = first + (info.offset_in_shard or 0)
        yield parameter, _FlatPart(shape, start, numel, flat, offset, handle.uses_sharded_strategy, is_contiguous)
