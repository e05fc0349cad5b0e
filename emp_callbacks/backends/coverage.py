"""Do the ranks together hold every parameter, and who counts what several of them hold?"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import replace

import torch

from emp_callbacks.backends.base import Backend
from emp_callbacks.layer.segment import Segment


def counted_once(segments: Sequence[Segment], backend: Backend, made_by: str) -> list[Segment]:
    """Return the segments such that the ranks together count every weight once. Collective.

    Of the ranks that hold the same part (HSDP; parameters that tensor parallelism left alone) the first counts it.

    Args:
        segments: This rank's part of every parameter, in the same order on every rank; of sharded ones all is counted.
        backend: Sums over ranks, and the optimizers.
        made_by: What sharded the parameters, for error messages.

    Raises:
        RuntimeError: The ranks hold different parameters, or parts that overlap or leave something out.
        NotImplementedError: A shard is not what its placements say.
        ValueError: An optimizer was made before the parameters were sharded.
    """
    _check_same_model(segments, backend)
    _check_updated(segments, backend.optimizers, made_by)
    held = backend.from_all(torch.tensor([_place(segment) for segment in segments]))
    once = []
    for i, segment in enumerate(segments):
        if held[:, i, 3].any():
            raise NotImplementedError(f"the shards of {segment.name!r} are not as its placements say; exclude it")
        is_held_before = bool((held[: backend.rank, i] == held[backend.rank, i]).all(1).any())
        skip = is_held_before and not segment.replicated
        once.append(replace(segment, counted=slice(0, 0)) if skip else segment)
    counted = torch.tensor([len(range(s.weight.numel())[s.counted]) for s in once])
    for segment, count in zip(once, backend.all_sum(counted).tolist(), strict=True):
        if count != segment.size:
            raise RuntimeError(
                f"the ranks together count {count} of the {segment.size} weights of {segment.name!r}; shard the model "
                "over all ranks of the job, in the same way wherever it is replicated"
            )
    return once


def _place(segment: Segment) -> tuple[int, int, int, bool]:
    """Return first position, length and digest of where a segment lies, and whether its positions do not fit it."""
    numel, at = segment.weight.numel(), segment.positions
    if isinstance(at, int):
        return at, numel, 0, False
    return int(at[:1].sum()), numel, zlib.crc32(at.cpu().numpy().tobytes()), at.numel() != numel


def _check_same_model(segments: Sequence[Segment], backend: Backend) -> None:
    listing = zlib.crc32(repr([(s.name, tuple(s.shape)) for s in segments]).encode())
    if len(set(backend.from_all(torch.tensor(listing)).tolist())) > 1:
        raise RuntimeError(
            "the ranks hold different parameters (pipeline or expert parallelism?); EMP needs the same model on all"
        )


def _check_updated(segments: Sequence[Segment], optimizers: Sequence[torch.optim.Optimizer], made_by: str) -> None:
    updated = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    for segment in segments:
        if optimizers and segment.owner.requires_grad and id(segment.owner) not in updated:
            raise ValueError(
                f"no optimizer updates {segment.name!r} as {made_by} sharded it; make the optimizer after "
                f"{made_by}, from model.parameters(), or exclude the parameter"
            )
